"""The chunked loss against its plain twin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.training.loss import next_token_loss, next_token_loss_reference

D, V = 24, 50


def inputs(B, T, dtype=jnp.float32):
    rng = np.random.default_rng(T)
    hidden = jnp.asarray(rng.standard_normal((B, T, D)), dtype)
    unembed = jnp.asarray(rng.standard_normal((D, V)), dtype)
    labels = jnp.asarray(rng.integers(-1, V, (B, T)), jnp.int32)
    weights = jnp.where(labels < 0, 0.0, jnp.asarray(rng.random((B, T)), jnp.float32))
    return hidden, unembed, labels, weights


@pytest.mark.parametrize(("T", "chunk_size"), [(1, 4), (97, 32), (97, 97), (97, 1000), (128, 32)])
def test_chunks_change_nothing(T, chunk_size):
    hidden, unembed, labels, weights = inputs(3, T)
    expected, gradients_expected = jax.value_and_grad(next_token_loss_reference, argnums=(0, 1))(
        hidden, unembed, labels, weights
    )

    def loss(hidden, unembed):
        return next_token_loss(hidden, unembed, labels, weights, chunk_size=chunk_size)

    np.testing.assert_allclose(loss(hidden, unembed), expected, rtol=1e-6)
    got, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, unembed)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    for ours, plain in zip(gradients, gradients_expected):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


def test_gradient_scales_with_what_follows():
    hidden, unembed, labels, weights = inputs(2, 33)

    def mean(loss, **sizes):
        return lambda h, u: jnp.square(loss(h, u, labels, weights, **sizes) / weights.sum())

    expected = jax.grad(mean(next_token_loss_reference), argnums=(0, 1))(hidden, unembed)
    got = jax.grad(mean(next_token_loss, chunk_size=8), argnums=(0, 1))(hidden, unembed)
    for ours, plain in zip(got, expected):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6)


def test_labels_without_weight_are_not_read():
    hidden, unembed, labels, weights = inputs(2, 33)
    elsewhere = jnp.where(weights == 0, 10**6, labels)

    def gradient(labels):
        return jax.value_and_grad(lambda h: next_token_loss(h, unembed, labels, weights, chunk_size=8))(hidden)

    for ours, same in zip(gradient(elsewhere), gradient(labels)):
        np.testing.assert_array_equal(ours, same)
    assert np.isfinite(gradient(elsewhere)[1]).all()


def test_large_logits_stay_finite():
    hidden, unembed, labels, weights = inputs(1, 16)
    value, gradient = jax.value_and_grad(lambda h: next_token_loss(h, unembed, labels, weights, chunk_size=4))(
        hidden * 1e4
    )
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_logits_of_all_positions_never_exist():
    hidden, unembed, labels, weights = inputs(2, 64)

    def loss(hidden, unembed):
        return next_token_loss(hidden, unembed, labels, weights, chunk_size=16)

    lowered = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(hidden, unembed)
    for text in (lowered.as_text(), lowered.compile().as_text()):
        sizes = [2 * 64 * V, 64 * V]
        for shape in (f"2x64x{V}x", f"64x2x{V}x", f"128x{V}x", f"{V}x128x", f"[2,64,{V}]", f"[64,2,{V}]", f"[128,{V}]"):
            assert shape not in text, (shape, sizes)


def test_bfloat16_inputs_give_a_float32_loss_of_float32_logits_and_their_own_gradients():
    hidden, unembed, labels, weights = inputs(2, 33)
    narrow = hidden.astype(jnp.bfloat16)
    head = unembed.astype(jnp.bfloat16).astype(jnp.float32)  # as the loss multiplies it
    expected = next_token_loss_reference(narrow.astype(jnp.float32), head, labels, weights)
    value, (d_hidden, d_unembed) = jax.value_and_grad(next_token_loss, argnums=(0, 1))(
        narrow, unembed, labels, weights, chunk_size=16
    )
    assert value.dtype == jnp.float32
    assert d_hidden.dtype == jnp.bfloat16
    assert d_unembed.dtype == jnp.float32
    # Logits in bfloat16 would err by 1e-3.
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(next_token_loss(narrow, unembed, labels, weights, chunk_size=16), expected, rtol=1e-5)
