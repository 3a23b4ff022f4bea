"""Grouped matmul and the experts' feed-forward against their plain twins."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.moe.dispatch import combine_rows, gather_rows, plan_blocks
from dsv3_jax.model.moe.experts import (
    CHUNK_ROWS,
    expert_ffn,
    expert_ffn_fused,
    grouped_matmul,
    grouped_matmul_reference,
)

D, F, E = 24, 20, 5

BLOCKS = {
    "one": [3],
    "unused": [-1, -1],
    "empty-experts": [0, 0, 0, 4, 4, -1],
    "all-to-one": [2] * 23 + [-1] * 3,
    "ragged": [0] * 1 + [1] * 7 + [2] * 13 + [4] * 2 + [-1] * 5,
    "holes": [0, -1, 1, 1, -1, -1, 3, 3, 3, -1, 4],
}
FEED_FORWARDS = {
    "fused": expert_ffn_fused,
    "composed": expert_ffn,
    "reference": partial(expert_ffn, grouped_linear=grouped_matmul_reference),
}


def inputs(block_expert, block_size, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    rows = array(len(block_expert) * block_size, D)
    return rows, array(E, D, F), {"gate_up": array(E, D, 2, F), "down": array(E, F, D)}, array(*rows.shape)


def ffn_of_each_row(rows, params, row_expert):
    """One row at a time, as the paper writes it."""
    gate = jnp.einsum("md,mdf->mf", rows, params["gate_up"][row_expert, :, 0])
    up = jnp.einsum("md,mdf->mf", rows, params["gate_up"][row_expert, :, 1])
    out = jnp.einsum("mf,mfd->md", jax.nn.silu(gate) * up, params["down"][row_expert])
    return jnp.where((row_expert >= 0)[:, None], out, 0)


@pytest.mark.parametrize(
    ("blocks", "block_size"),
    [*[(name, 8) for name in BLOCKS], ("ragged", 1), ("ragged", CHUNK_ROWS // 4), ("holes", CHUNK_ROWS)],
)
def test_grouped_matmul_equals_its_twin_with_gradients(blocks, block_size):
    block_expert = jnp.asarray(BLOCKS[blocks], jnp.int32)
    with jax.enable_x64(True):
        rows, weights, _, _ = inputs(block_expert, block_size, jnp.float64)
        d_out = jnp.sin(jnp.arange(rows.shape[0] * F, dtype=jnp.float64)).reshape(rows.shape[0], F)
        out, backward = jax.vjp(lambda r, w: grouped_matmul(r, w, block_expert), rows, weights)
        expected, backward_expected = jax.vjp(lambda r, w: grouped_matmul_reference(r, w, block_expert), rows, weights)
        # Both accumulate in float32 whatever the inputs are.
        np.testing.assert_allclose(out, expected, atol=1e-4)
        for ours, twin in zip(backward(d_out), backward_expected(d_out)):
            np.testing.assert_allclose(ours, twin, atol=2e-6 * block_size * len(block_expert) + 1e-4)


@pytest.mark.parametrize(
    ("blocks", "feed_forward"),
    [*[(name, "fused") for name in BLOCKS], ("ragged", "composed"), ("ragged", "reference"), ("holes", "reference")],
)
def test_feed_forward_equals_the_formula_with_gradients(blocks, feed_forward):
    block_expert = jnp.asarray(BLOCKS[blocks], jnp.int32)
    rows, _, params, d_out = inputs(block_expert, 8)
    row_expert = jnp.repeat(block_expert, 8)
    apply = FEED_FORWARDS[feed_forward]
    out, backward = jax.vjp(lambda r, p: apply(r, p, block_expert), rows, params)
    expected, backward_expected = jax.vjp(lambda r, p: ffn_of_each_row(r, p, row_expert), rows, params)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=2e-4)
    for ours, plain in zip(jax.tree.leaves(backward(d_out)), jax.tree.leaves(backward_expected(d_out))):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("N", [1, 97, 1025])
def test_dispatched_experts_equal_every_token_through_its_experts(N):
    rng = np.random.default_rng(N)
    x = jnp.asarray(rng.standard_normal((N, D)), jnp.float32)
    ids = jnp.asarray(np.argsort(rng.random((N, E)), axis=1)[:, :2], jnp.int32)
    weights = jnp.asarray(rng.random((N, 2)), jnp.float32)
    _, _, params, _ = inputs([0], 1)
    plan = plan_blocks(ids, E, block_size=16)
    out = combine_rows(expert_ffn_fused(gather_rows(x, plan), params, plan.block_expert), weights, plan)
    each = ffn_of_each_row(jnp.repeat(x, 2, axis=0), params, ids.reshape(-1)).reshape(N, 2, D)
    np.testing.assert_allclose(out, (each * weights[:, :, None]).sum(axis=1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("feed_forward", ["fused", "composed"])
def test_weights_are_cast_to_the_dtype_of_the_rows_and_gradients_back(feed_forward):
    block_expert = jnp.asarray(BLOCKS["ragged"], jnp.int32)
    rows, _, params, d_out = inputs(block_expert, 8)
    narrow = rows.astype(jnp.bfloat16)
    apply = FEED_FORWARDS[feed_forward]
    out, backward = jax.vjp(lambda r, p: apply(r, p, block_expert), narrow, params)
    d_rows, d_params = backward(d_out.astype(jnp.bfloat16))
    assert out.dtype == d_rows.dtype == jnp.bfloat16
    assert d_params["gate_up"].dtype == d_params["down"].dtype == jnp.float32
    wide = ffn_of_each_row(rows, params, jnp.repeat(block_expert, 8))
    error = jnp.linalg.norm(out.astype(jnp.float32) - wide) / jnp.linalg.norm(wide)
    assert error < 2e-2


def test_backward_recomputes_nothing_that_grows_with_the_experts():
    """The loops read one expert at a time: no [E·block, …] copy of the weights appears."""
    block_expert = jnp.asarray(BLOCKS["ragged"], jnp.int32)
    rows, _, params, _ = inputs(block_expert, 8)
    lowered = jax.jit(jax.grad(lambda r: expert_ffn_fused(r, params, block_expert).sum())).lower(rows)
    assert f"tensor<{len(block_expert)}x{D}x" not in lowered.as_text()
