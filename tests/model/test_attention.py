"""Attention against its plain twin."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.attention import attend, attend_reference


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
@pytest.mark.parametrize("T", [1, 97, 300])
def test_chunks_change_neither_values_nor_gradients(T, kind):
    q, k, v, d_out = inputs(T)
    ids = segments(T, kind)

    @partial(jax.jit, static_argnums=0)
    def run(attend, q, k, v):
        out, backward = jax.vjp(lambda q, k, v: attend(q, k, v, ids, scale=0.3), q, k, v)
        return out, *backward(d_out)

    for ours, plain in zip(run(attend, q, k, v), run(attend_reference, q, k, v)):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("attend", [attend_reference, attend])
def test_a_token_sees_its_own_document_up_to_itself(attend):
    T = 160
    q, k, v, _ = inputs(T)
    ids = segments(T, "packed")
    out = attend(q, k, v, ids, scale=0.3)
    for t in (0, 1, T // 3, 100, T - 1):
        seen = np.asarray(ids[0] == ids[0, t]) & (np.arange(T) <= t)
        alone = attend_reference(q[:1, t : t + 1].repeat(seen.sum(), axis=1), k[:1, seen], v[:1, seen], None, scale=0.3)
        np.testing.assert_allclose(out[0, t], alone[0, -1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attend", [attend_reference, attend])
def test_large_scores_stay_finite(attend):
    q, k, v, d_out = inputs(97)
    out, backward = jax.vjp(lambda q: attend(q, k, v, segments(97, "packed"), scale=1.0), q * 1e4)
    assert np.isfinite(out).all()
    assert np.isfinite(backward(d_out)[0]).all()


@pytest.mark.parametrize("attend", [attend_reference, attend])
def test_bfloat16_inputs_keep_their_dtype_and_have_float32_scores(attend):
    """Scores of ±40 in bfloat16 err by 0.1, a probability then by a tenth: forty times what is allowed."""
    q, k, v, _ = [x.astype(jnp.bfloat16) for x in inputs(160)]
    out = attend(q, k, v, None, scale=3.0)
    assert out.dtype == jnp.bfloat16
    wide = attend_reference(*[x.astype(jnp.float32) for x in (q, k, v)], None, scale=3.0)
    error = np.linalg.norm(out.astype(jnp.float32) - wide) / np.linalg.norm(wide)
    assert error < 4e-3


def mixed_inputs(T: int, S: int, num_key_heads: int, J: int = 12, W: int = 8) -> list[jax.Array]:
    """Queries, keys, values of two rows and three heads of queries, and a cotangent."""
    rng = np.random.default_rng(T)
    shapes = (2, T, 3, J), (2, S, num_key_heads, J), (2, S, num_key_heads, W), (2, T, 3, W)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("num_key_heads", [1, 3])
def test_queries_may_stand_anywhere_among_the_keys(num_key_heads: int) -> None:
    """One head of keys for all is the same as that head repeated; rows that no query sees hold anything."""
    q, k, v, _ = mixed_inputs(4, 11, num_key_heads)
    starts, ids = jnp.asarray([2, 6], jnp.int32), jnp.ones((2, 4), jnp.int32)
    rows = jnp.where(jnp.arange(11)[None, :] >= jnp.asarray([1, 3])[:, None], 1, 0).astype(jnp.int32)
    out = attend(q, k, v, ids, rows, scale=0.3, q_starts=starts)
    repeated = [jnp.repeat(x, 3 // num_key_heads, axis=2) for x in (k, v)]
    for b in range(2):
        for t in range(4):
            seen = slice((1, 3)[b], int(starts[b]) + t + 1)
            scores = np.einsum("hj,shj->hs", q[b, t], repeated[0][b, seen]) * 0.3
            p = np.exp(scores - scores.max(-1, keepdims=True))
            expected = np.einsum("hs,shw->hw", p / p.sum(-1, keepdims=True), repeated[1][b, seen])
            np.testing.assert_allclose(out[b, t], expected, atol=1e-5)
    if num_key_heads == 1:
        unseen = (rows == 0)[:, :, None, None] | (jnp.arange(11) > 9)[None, :, None, None]
        hollow = attend(q, k, jnp.where(unseen, jnp.nan, v), ids, rows, scale=0.3, q_starts=starts)
        np.testing.assert_array_equal(hollow, out)
