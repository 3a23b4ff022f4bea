"""Cross-entropy of the next token in chunks, so that the logits of a whole batch never exist."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.typing import Array, Float, Int


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
    in the same pass as the loss (the logits are computed once) and the weights count as constants.
    """
    return _chunked_loss(chunk_size, hidden, unembed, labels, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_loss(chunk_size, hidden, unembed, labels, weights):
    total = jnp.zeros((), jnp.float32)
    for start in range(0, hidden.shape[1], chunk_size):
        part = slice(start, min(start + chunk_size, hidden.shape[1]))
        total = total + next_token_loss_reference(hidden[:, part], unembed, labels[:, part], weights[:, part])
    return total


def _forward(chunk_size, hidden, unembed, labels, weights):
    total = jnp.zeros((), jnp.float32)
    d_unembed = jnp.zeros(unembed.shape, jnp.float32)
    d_hidden = []
    for start in range(0, hidden.shape[1], chunk_size):
        part = slice(start, min(start + chunk_size, hidden.shape[1]))
        loss, (d_h, d_u) = jax.value_and_grad(next_token_loss_reference, argnums=(0, 1))(
            hidden[:, part], unembed, labels[:, part], weights[:, part]
        )
        total = total + loss
        d_unembed = d_unembed + d_u.astype(jnp.float32)
        d_hidden.append(d_h)
        total, d_unembed = lax.optimization_barrier((total, d_unembed))
    return total, (jnp.concatenate(d_hidden, axis=1), d_unembed.astype(unembed.dtype))


def _backward(chunk_size, residuals, d_total):
    d_hidden, d_unembed = residuals
    return d_hidden * d_total.astype(d_hidden.dtype), d_unembed * d_total.astype(d_unembed.dtype), None, None


_chunked_loss.defvjp(_forward, _backward)
