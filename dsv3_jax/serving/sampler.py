"""From logits to the next token of each sequence."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.serving.edits import Edits, edited
from dsv3_jax.typing import AnyArray, Array, Bool, Float, Int, Key, UInt


class Sampling(NamedTuple):
    """How each sequence chooses its tokens; one entry a sequence."""

    temperature: Float[AnyArray, "B"]
    """0: the likeliest token, whatever the others say."""
    top_k: Int[AnyArray, "B"]
    """Only the k likeliest tokens; 0: all."""
    top_p: Float[AnyArray, "B"]
    """Only the smallest set of tokens with at least this probability; 1: all."""
    min_p: Float[AnyArray, "B"]
    """Only tokens with at least this share of the likeliest one's probability; 0: all."""
    seed: UInt[AnyArray, "B"]


class TopLogprobs(NamedTuple):
    """A token's log-probability under softmax(logits) in each row, beside those of the likeliest tokens."""

    logprob: Float[Array, "B"]
    rank: Int[Array, "B"]
    """How many tokens are at least as likely as it; 1 for the likeliest."""
    top_ids: Int[Array, "B width"]
    """The likeliest first; of equal ones the lowest id."""
    top_logprobs: Float[Array, "B width"]


def sample(
    logits: Float[Array, "B V"],
    positions: Int[Array, "B"],
    sampling: Sampling | None,
    edits: Edits | None = None,
) -> Int[Array, "B"]:
    """The token at `positions` of each sequence; without `sampling` the likeliest of every sequence.

    A row depends on nothing but itself, whoever its neighbours are: the key of a draw is made of the sequence's own
    seed and the token's position in it. A batch of which no row draws costs an argmax.
    """
    logits = logits.astype(jnp.float32)
    if edits is not None:
        logits = edited(logits, positions, edits)
    likeliest = _highest(logits)
    if sampling is None:
        return likeliest
    is_drawn = sampling.temperature > 0
    drawn = jax.lax.cond(is_drawn.any(), lambda: _draw(logits, positions, sampling), lambda: likeliest)
    return jnp.where(is_drawn, drawn, likeliest)


def top_logprobs(logits: Float[Array, "B V"], tokens: Int[Array, "B"], *, width: int) -> TopLogprobs:
    """Log-probabilities of `tokens` and of the `width` likeliest, whatever temperature and cuts chose."""
    logits = logits.astype(jnp.float32)
    best, ids = jax.lax.optimization_barrier(jax.lax.top_k(logits, width))  # or XLA slices a sort on CPUs
    own = jnp.take_along_axis(logits, tokens[:, None], axis=-1)
    rank = (logits >= own).sum(axis=-1, dtype=jnp.int32)
    highest = best[:, :1]
    whole = jnp.log(jnp.exp(logits - highest).sum(axis=-1, keepdims=True))
    return TopLogprobs((own - highest - whole)[:, 0], rank, ids, best - highest - whole)


def logprobs_of(logits: Float[Array, "B V"], tokens: Int[Array, "B"]) -> Float[Array, "B"]:
    """The tokens' log-probabilities under softmax(logits), whatever temperature and cuts chose them."""
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]


def _highest(values: Float[Array, "B V"]) -> Int[Array, "B"]:
    """The lowest id of the highest value; a third of the time of `argmax` on CPUs. Some id where all are NaN."""
    best = values.max(axis=-1, keepdims=True)
    size = values.shape[-1]
    return jnp.minimum(jnp.where(values == best, _ids(size), size).min(axis=-1), size - 1)


def _ids(size: int) -> Int[Array, "1 V"]:
    return jnp.arange(size, dtype=jnp.int32)[None, :]


def _draw(logits: Float[Array, "B V"], positions: Int[Array, "B"], sampling: Sampling) -> Int[Array, "B"]:
    """Draws from softmax(logits / temperature), restricted by min_p, top_k and top_p, where temperature > 0.

    How a row draws depends on its own parameters alone.
    """
    key_of = jax.vmap(lambda seed, place: jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), place))
    keys = key_of(sampling.seed, positions)
    below_best = logits - logits.max(axis=-1, keepdims=True)  # so that a tiny temperature gives 0 and -inf, never NaN
    scaled = below_best / jnp.maximum(sampling.temperature, jnp.finfo(jnp.float32).tiny)[:, None]
    scaled = jnp.where(scaled < 0, scaled, 0.0)  # `top_k` takes -0 for less than 0
    scaled = jax.lax.optimization_barrier(scaled)  # or it is computed once for each of its readers
    is_few = (sampling.temperature > 0) & (sampling.top_k > 0) & (sampling.top_k <= min(_FEW, logits.shape[-1]))
    is_cut = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
    is_cut = (sampling.temperature > 0) & is_cut & ~is_few
    of_all = _one_of(scaled, keys, 0)
    of_few = jax.lax.cond(is_few.any(), lambda: _one_of_few(scaled, keys, sampling), lambda: of_all)
    of_cut = jax.lax.cond(is_cut.any(), lambda: _one_allowed(scaled, keys, of_all, is_cut, sampling), lambda: of_all)
    return jnp.where(is_few, of_few, of_cut)


_BLOCK = 64
"""Tokens that share a number of a draw."""


def _one_of(scaled: Float[Array, "B V"], keys: Key[Array, "B"], attempt: int | Int[Array, ""]) -> Int[Array, "B"]:
    """A draw from softmax(scaled) in each row: first a block of tokens by its mass, then one of them.

    The highest of logits with noise of Gumbel's law is a draw from their softmax. A sum that is rounded otherwise, as
    for another number of rows, changes a draw only where two of them are all but equal.
    """
    V = scaled.shape[-1]
    blocks = jnp.pad(scaled, ((0, 0), (0, -V % _BLOCK)), constant_values=-jnp.inf).reshape(len(scaled), -1, _BLOCK)
    num_blocks = blocks.shape[1]
    noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, attempt), (num_blocks + _BLOCK,)))(keys)
    block = _highest(jnp.log(jnp.exp(blocks).sum(axis=-1)) + noise[:, :num_blocks])
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return jnp.minimum(block * _BLOCK + _highest(inside + noise[:, num_blocks:]), V - 1)


_FEW = 64
"""Tokens that `top_k` finds in little time."""


def _one_of_few(scaled: Float[Array, "B V"], keys: Key[Array, "B"], sampling: Sampling) -> Int[Array, "B"]:
    """A draw from the allowed tokens, where top_k is at most `_FEW`."""
    few = min(_FEW, scaled.shape[-1])
    values, ids = jax.lax.top_k(scaled, few)
    is_in = (_ids(few) < sampling.top_k[:, None]) & (values >= jnp.log(sampling.min_p)[:, None])
    weight = jnp.where(is_in, jnp.exp(values), 0)
    mass_before = jnp.cumsum(weight, axis=-1) - weight
    limit = jnp.where(sampling.top_p < 1, sampling.top_p * weight.sum(axis=-1), jnp.inf)[:, None]
    is_allowed = (_ids(few) == 0) | (is_in & (mass_before < limit))
    place = _one_of(jnp.where(is_allowed, values, -jnp.inf), keys, 0)
    return jnp.take_along_axis(ids, place[:, None], axis=-1)[:, 0]


def _one_allowed(
    scaled: Float[Array, "B V"],
    keys: Key[Array, "B"],
    first: Int[Array, "B"],
    is_cut: Bool[AnyArray, "B"],
    sampling: Sampling,
) -> Int[Array, "B"]:
    """A draw from the allowed tokens where `is_cut`, `first` being one from all.

    Allowed is a beginning of the tokens in order of likeliness (of equal ones, of ids). So nothing is sorted: a token
    is allowed if those before it are few and light enough; where it is not, the next is drawn from those before it.
    Each round costs a few sums over the vocabulary; the first is refused with the probability that the cuts take away.
    """
    ids = _ids(scaled.shape[-1])
    least = jnp.log(sampling.min_p)[:, None]
    weight = jnp.where(scaled >= least, jnp.exp(scaled), 0)
    at_most = jnp.where(sampling.top_k > 0, sampling.top_k, ids.size)
    limit = jnp.where(sampling.top_p < 1, sampling.top_p * _mass(scaled, weight, is_cut, sampling), jnp.inf)

    def likelier_than(token):
        own = jnp.take_along_axis(scaled, token[:, None], axis=-1)
        return (scaled > own) | ((scaled == own) & (ids < token[:, None])), own

    def is_refused(token):
        is_before, own = likelier_than(token)
        count = is_before.sum(axis=-1, dtype=jnp.int32)
        mass = jnp.where(is_before, weight, 0).sum(axis=-1)
        is_beyond = (count >= at_most) | (mass >= limit) | (own < least)[:, 0]
        return is_beyond & (count > 0)  # the likeliest token is always allowed

    def retry(now):
        token, is_open, attempt = now
        is_before, _ = likelier_than(token)
        token = jnp.where(is_open, _one_of(jnp.where(is_before, scaled, -jnp.inf), keys, attempt), token)
        return token, is_open & is_refused(token), attempt + 1

    start = first, is_cut & is_refused(first), jnp.int32(1)
    return jax.lax.while_loop(lambda now: now[1].any(), retry, start)[0]


def _mass(
    scaled: Float[Array, "B V"], weight: Float[Array, "B V"], is_cut: Bool[AnyArray, "B"], sampling: Sampling
) -> Float[Array, "B"]:
    """The weight of the top_k likeliest tokens of each row, of all where top_k is 0."""
    is_asked = is_cut & (sampling.top_k > 0) & (sampling.top_p < 1)
    of_all = weight.sum(axis=-1)
    of_many = jax.lax.cond(is_asked.any(), lambda: _mass_of_many(scaled, weight, sampling.top_k), lambda: of_all)
    return jnp.where(is_asked, of_many, of_all)


def _mass_of_many(
    scaled: Float[Array, "B V"], weight: Float[Array, "B V"], top_k: Int[AnyArray, "B"]
) -> Float[Array, "B"]:
    """The weight of the top_k likeliest tokens: finds the last one's logit bit by bit instead of sorting."""
    bits = jax.lax.bitcast_convert_type(scaled, jnp.int32)
    order = jax.lax.bitcast_convert_type(bits ^ ((bits >> 31) & 0x7FFFFFFF) ^ -(2**31), jnp.uint32)  # that of floats

    def try_bit(step, last):
        higher = last | (jnp.uint32(1) << (31 - step).astype(jnp.uint32))
        is_enough = (order >= higher[:, None]).sum(axis=-1, dtype=jnp.int32) >= top_k
        return jnp.where(is_enough, higher, last)

    last = jax.lax.fori_loop(0, 32, try_bit, jnp.zeros(len(scaled), jnp.uint32))[:, None]
    above = order > last
    equal_weight = jnp.where(order == last, weight, 0).max(axis=-1)
    rest = top_k - above.sum(axis=-1, dtype=jnp.int32)
    return jnp.where(above, weight, 0).sum(axis=-1) + rest.astype(jnp.float32) * equal_weight
