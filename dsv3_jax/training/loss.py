"""Cross-entropy of the next token in chunks, so that the logits of a whole batch never exist."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.typing import Array, Float, Int
from dsv3_kernels.varying import varying_alike, varying_as


def next_token_loss_reference(
    hidden: Float[Array, "B T D"],
    unembed: Float[Array, "D V"],
    labels: Int[Array, "B T"],
    weights: Float[Array, "B T"],
) -> Float[Array, ""]:
    """Σ weights · -log softmax(hidden · unembed)[label] with all logits at once: plain twin of `next_token_loss`."""
    logits = jnp.einsum("btd,dv->btv", hidden, unembed.astype(hidden.dtype), preferred_element_type=jnp.float32)
    label = jnp.where(weights != 0, labels, 0)
    at_label = jnp.take_along_axis(logits, label[:, :, None], axis=-1)[:, :, 0]
    return (weights * (jax.nn.logsumexp(logits, axis=-1) - at_label)).sum()


def next_token_loss(
    hidden: Float[Array, "B T D"],
    unembed: Float[Array, "D V"],
    labels: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    chunk_size: int,
) -> Float[Array, ""]:
    """Σ weights · -log softmax(hidden · unembed)[label] in float32, `chunk_size` positions of every row at a time.

    A label is read only where its weight is not zero. Differentiated, the gradients of hidden and unembed are made
    in the same pass as the loss, so the logits are computed once; the weights count as constants.
    """
    return _chunked_loss(min(chunk_size, hidden.shape[1]), *varying_alike(hidden, unembed, labels, weights))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_loss(chunk_size, hidden, unembed, labels, weights):
    head = unembed.astype(hidden.dtype)

    def add_chunk(total, chunk):
        hidden_BcD, labels_Bc, weights_Bc = chunk
        return total + next_token_loss_reference(hidden_BcD, head, labels_Bc, weights_Bc), None

    zero = varying_as(jnp.float32(0), hidden)
    return lax.scan(add_chunk, zero, _chunks(chunk_size, hidden, labels, weights))[0]


def _forward(chunk_size, hidden, unembed, labels, weights):
    head = unembed.astype(hidden.dtype)

    def add_chunk(sums, chunk):
        total, d_head = sums
        hidden_BcD, labels_Bc, weights_Bc = chunk
        loss, d_logits = _loss_and_gradient(
            jnp.einsum("bcd,dv->bcv", hidden_BcD, head, preferred_element_type=jnp.float32), labels_Bc, weights_Bc
        )
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = jnp.einsum("bcv,dv->bcd", d_logits, head, preferred_element_type=jnp.float32)
        d_head += jnp.einsum("bcd,bcv->dv", hidden_BcD, d_logits, preferred_element_type=jnp.float32)
        return (total + loss, d_head), d_hidden.astype(hidden.dtype)

    zeros = varying_as((jnp.float32(0), jnp.zeros(unembed.shape, jnp.float32)), hidden)
    (total, d_unembed), d_hidden = lax.scan(add_chunk, zeros, _chunks(chunk_size, hidden, labels, weights))
    B, T, D = hidden.shape
    d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(B, -1, D)[:, :T]
    return total, (d_hidden, d_unembed.astype(unembed.dtype))


def _backward(chunk_size, residuals, d_total):
    d_hidden, d_unembed = residuals
    return d_hidden * d_total.astype(d_hidden.dtype), d_unembed * d_total.astype(d_unembed.dtype), None, None


_chunked_loss.defvjp(_forward, _backward)


def _loss_and_gradient(
    logits: Float[Array, "B c V"], labels: Int[Array, "B c"], weights: Float[Array, "B c"]
) -> tuple[Float[Array, ""], Float[Array, "B c V"]]:
    """The loss of a chunk and its derivative weights · (softmax - one-hot)."""
    label = jnp.where(weights != 0, labels, 0)[:, :, None]
    largest = logits.max(axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - largest)
    normaliser = exponentials.sum(axis=-1, keepdims=True)
    at_label = jnp.take_along_axis(logits, label, axis=-1)
    loss = (weights[:, :, None] * (jnp.log(normaliser) + largest - at_label)).sum()
    is_label = lax.broadcasted_iota(label.dtype, logits.shape, 2) == label
    d_logits = exponentials * (weights[:, :, None] / normaliser) - jnp.where(is_label, weights[:, :, None], 0.0)
    return loss, d_logits


def _chunks(chunk_size: int, *arrays: Array) -> list[Array]:
    """Each [B, T, ...] as [T / chunk_size, B, chunk_size, ...], padded with zeros: rows stay whole on their device."""

    def split(x: Array) -> Array:
        padding = -x.shape[1] % chunk_size
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk_size, *x.shape[2:]), 1, 0)

    return [split(x) for x in arrays]
