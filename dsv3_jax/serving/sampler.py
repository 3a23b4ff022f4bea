"""From logits to the next token of each sequence."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.typing import AnyArray, Array, Bool, Float, Int, UInt


class Sampling(NamedTuple):
    """How each sequence chooses its tokens; one entry a sequence."""

    temperature: Float[AnyArray, "B"]
    """0: the likeliest token, whatever the others say."""
    top_k: Int[AnyArray, "B"]
    """Only the k likeliest tokens; 0: all."""
    top_p: Float[AnyArray, "B"]
    """Only the smallest set of tokens with at least this probability; 1: all."""
    seed: UInt[AnyArray, "B"]


def next_token(logits: Float[Array, "B V"], positions: Int[Array, "B"], sampling: Sampling | None) -> Int[Array, "B"]:
    """The token at `positions` of each sequence; without `sampling` the likeliest of every sequence."""
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)  # the lowest id among equals
    if sampling is None:
        return likeliest
    return jnp.where(sampling.temperature == 0, likeliest, draw(logits, positions, sampling))


def draw(logits: Float[Array, "B V"], positions: Int[Array, "B"], sampling: Sampling) -> Int[Array, "B"]:
    """Draws from softmax(logits / temperature) restricted to `allowed`, where temperature > 0.

    The key is made of a sequence's own seed and the token's position in it, so its tokens do not depend on its row,
    its neighbours, or padding.
    """
    logits = logits.astype(jnp.float32)
    below_best = logits - logits.max(axis=-1, keepdims=True)  # so that a tiny temperature gives 0 and -inf, never NaN
    scaled = below_best / jnp.maximum(sampling.temperature, jnp.finfo(jnp.float32).tiny)[:, None]
    is_cut = (sampling.top_k > 0) | (sampling.top_p < 1)
    scaled = jax.lax.cond(
        is_cut.any(),  # nothing is sorted for a batch that takes all tokens
        lambda: jnp.where(allowed(scaled, top_k=sampling.top_k, top_p=sampling.top_p), scaled, -jnp.inf),
        lambda: scaled,
    )

    def of_one(seed, position, logits):
        key = jax.random.key(seed, impl="threefry2x32")  # others draw differently under vmap
        return jax.random.categorical(jax.random.fold_in(key, position), logits)

    return jax.vmap(of_one)(sampling.seed, positions, scaled).astype(jnp.int32)


def allowed(
    logits: Float[Array, "B V"], *, top_k: Int[AnyArray, "B"], top_p: Float[AnyArray, "B"]
) -> Bool[Array, "B V"]:
    """True for the `top_k` likeliest tokens (0: all) that also lie in the smallest set of probability ≥ `top_p`.

    top_k is applied first, top_p to what is left, renormalised. The likeliest token is always allowed; of equal ones
    those of the lowest ids.
    """
    at_most = jnp.where(top_k > 0, top_k, logits.shape[-1]).astype(jnp.float32)
    in_top_k = _likeliest(logits, jnp.ones_like(logits), at_most)
    probability = jax.nn.softmax(jnp.where(in_top_k, logits, -jnp.inf), axis=-1)
    return in_top_k & (_likeliest(logits, probability, top_p) | (top_p >= 1)[:, None])  # a sum may round to 1 too early


def _likeliest(
    logits: Float[Array, "B V"], mass: Float[Array, "B V"], least: Float[AnyArray, "B"]
) -> Bool[Array, "B V"]:
    """The fewest likeliest tokens of which the mass is at least `least`; all where there is less than that.

    Finds the last one's logit bit by bit instead of sorting, which takes several times as long.
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    order = jax.lax.bitcast_convert_type(bits ^ ((bits >> 31) & 0x7FFFFFFF) ^ -(2**31), jnp.uint32)  # that of floats

    def try_bit(step, last):
        higher = last | (jnp.uint32(1) << (31 - step).astype(jnp.uint32))
        is_enough = jnp.where(order >= higher[:, None], mass, 0).sum(axis=-1) >= least
        return jnp.where(is_enough, higher, last)

    last = jax.lax.fori_loop(0, 32, try_bit, jnp.zeros(len(logits), jnp.uint32))[:, None]
    is_above, is_last = order > last, order == last
    mass_above = jnp.where(is_above, mass, 0).sum(axis=-1, keepdims=True)
    mass_before = mass_above + jnp.cumsum(jnp.where(is_last, mass, 0), axis=-1) - mass
    return is_above | (is_last & (mass_before < least[:, None]))


def logprobs_of(logits: Float[Array, "B V"], tokens: Int[Array, "B"]) -> Float[Array, "B"]:
    """The tokens' log-probabilities under softmax(logits), whatever temperature and cuts chose them."""
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
