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
    grouped_matmul,
    grouped_matmul_reference,
    routed_ffn,
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
    "grouped": expert_ffn,
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


@pytest.mark.parametrize("feed_forward", FEED_FORWARDS)
@pytest.mark.parametrize("blocks", ["empty-experts", "ragged", "holes"])
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


def routed_inputs(name):
    rng = np.random.default_rng(3)
    N = {"one token": 1, "ragged": 97}.get(name, 1025)
    ids = np.argsort(rng.random((N, E)), axis=1)[:, :2]
    if name == "all to two":
        ids[:] = [4, 1]
    _, _, params, x = inputs([0] * N, 1)
    weights = jnp.asarray(rng.random((N, 2)), jnp.float32)
    return x, params, weights, jnp.asarray(ids, jnp.int32)


def paper(x, params, weights, ids):
    """Every token through each of its experts (eq. 12)."""
    each = ffn_of_each_row(jnp.repeat(x, 2, axis=0), params, ids.reshape(-1)).reshape(*ids.shape, D)
    return (each * weights[:, :, None]).sum(axis=1)


def plain_routed(x, params, weights, plan):
    return combine_rows(expert_ffn(gather_rows(x, plan), params, plan.block_expert), weights, plan)


@pytest.mark.parametrize("load", ["one token", "ragged", "many", "all to two"])
@pytest.mark.parametrize("routed", [routed_ffn, plain_routed])
def test_routed_experts_equal_every_token_through_its_experts_with_gradients(load, routed):
    x, params, weights, ids = routed_inputs(load)
    d_out = jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
    plan = plan_blocks(ids, E, block_size=16)

    @jax.jit
    def run(x, params, weights):
        out, backward = jax.vjp(lambda *args: routed(*args, plan), x, params, weights)
        return out, backward(d_out)

    expected, backward = jax.vjp(lambda *args: paper(*args, ids), x, params, weights)
    out, gradients = run(x, params, weights)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(routed(x, params, weights, plan), out, rtol=1e-5, atol=1e-4)
    for ours, plain in zip(jax.tree.leaves(gradients), jax.tree.leaves(backward(d_out))):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5 * float(jnp.abs(plain).max()) + 1e-4)


def test_weights_are_cast_to_the_dtype_of_the_tokens_and_gradients_back():
    x, params, weights, ids = routed_inputs("ragged")
    plan = plan_blocks(ids, E, block_size=16)

    def loss(x, params, weights):
        out = routed_ffn(x, params, weights, plan)
        return out.astype(jnp.float32).sum(), out

    narrow = x.astype(jnp.bfloat16)
    (_, out), (d_x, d_params, d_weights) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(
        narrow, params, weights
    )
    assert out.dtype == d_x.dtype == jnp.bfloat16
    assert d_params["gate_up"].dtype == d_params["down"].dtype == d_weights.dtype == jnp.float32
    wide = paper(narrow.astype(jnp.float32), params, weights, ids)
    assert jnp.linalg.norm(out.astype(jnp.float32) - wide) < 2e-2 * jnp.linalg.norm(wide)


def test_neither_weights_nor_tokens_are_copied_for_every_row():
    x, params, weights, ids = routed_inputs("many")
    plan = plan_blocks(ids, E, block_size=16)
    blocks, M = plan.block_expert.shape[0], plan.token_of.shape[0]
    text = jax.jit(lambda x: routed_ffn(x, params, weights, plan)).lower(x).as_text()
    assert f"tensor<{blocks}x{D}x" not in text
    assert f"tensor<{M}x{2 * F}x" not in text  # gate and up are kept for a backward pass only
