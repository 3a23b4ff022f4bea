"""Blocked attention against its plain twin."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.attention import attend_blocked, attend_flash, attend_full

SIZES = [(1, 128), (97, 32), (97, None), (160, 32), (1025, 512)]


def inputs(T, dtype=jnp.float32, B=2, H=3, J=12, W=8):
    rng = np.random.default_rng(T)

    def array(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    return array(B, T, H, J), array(B, T, H, J), array(B, T, H, W), array(B, T, H, W)


def segments(T, kind, B=2):
    if kind == "one document":
        return None
    rng = np.random.default_rng(T)
    ids = np.sort(rng.integers(1, 5, (B, T)), axis=1)
    ids[0, : T // 3] = 0  # left padding
    return jnp.asarray(ids, jnp.int32)


@pytest.mark.parametrize("kind", ["one document", "packed"])
@pytest.mark.parametrize(("T", "block_size"), SIZES)
def test_blocks_change_neither_values_nor_gradients(T, block_size, kind):
    q, k, v, d_out = inputs(T)
    ids = segments(T, kind)

    def run(attend):
        out, backward = jax.vjp(lambda q, k, v: attend(q, k, v, ids, scale=0.3), q, k, v)
        return out, *backward(d_out)

    for ours, plain in zip(run(partial(attend_blocked, block_size=block_size)), run(attend_full)):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["one document", "packed"])
@pytest.mark.parametrize("T", [1, 97, 300])
def test_the_kernels_function_changes_neither_values_nor_gradients(T, kind):
    q, k, v, d_out = inputs(T)
    ids = segments(T, kind)

    @partial(jax.jit, static_argnums=0)
    def run(attend, q, k, v):
        out, backward = jax.vjp(lambda q, k, v: attend(q, k, v, ids, scale=0.3), q, k, v)
        return out, *backward(d_out)

    for ours, plain in zip(run(attend_flash, q, k, v), run(attend_full, q, k, v)):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("attend", [attend_full, attend_blocked])
def test_a_token_sees_its_own_document_up_to_itself(attend):
    T = 160
    q, k, v, _ = inputs(T)
    ids = segments(T, "packed")
    out = attend(q, k, v, ids, scale=0.3)
    for t in (0, 1, T // 3, 100, T - 1):
        seen = np.asarray(ids[0] == ids[0, t]) & (np.arange(T) <= t)
        alone = attend_full(q[:1, t : t + 1].repeat(seen.sum(), axis=1), k[:1, seen], v[:1, seen], None, scale=0.3)
        np.testing.assert_allclose(out[0, t], alone[0, -1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attend", [attend_full, attend_blocked, attend_flash])
def test_large_scores_stay_finite(attend):
    q, k, v, d_out = inputs(97)
    out, backward = jax.vjp(lambda q: attend(q, k, v, segments(97, "packed"), scale=1.0), q * 1e4)
    assert np.isfinite(out).all()
    assert np.isfinite(backward(d_out)[0]).all()


def test_bfloat16_keeps_its_dtype_and_softmax_its_precision():
    q, k, v, _ = inputs(160)
    narrow = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    out = attend_blocked(*narrow, None, scale=0.3)
    assert out.dtype == jnp.bfloat16
    wide = attend_full(*[x.astype(jnp.float32) for x in narrow], None, scale=0.3)
    np.testing.assert_allclose(out.astype(jnp.float32), wide, atol=2e-2)


def test_no_whole_matrix_of_scores_exists():
    q, k, v, _ = inputs(1024)

    def loss(q, k, v):
        return attend_blocked(q, k, v, None, scale=0.3).sum()

    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v).as_text()
    assert "1024x1024" not in text
