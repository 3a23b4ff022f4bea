"""Routed experts in FP8 against float32, and the rows' feed-forward against the matmuls it is made of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.precision.fp8_experts import BLOCK_ROWS, expert_ffn
from dsv3_jax.precision.wire import gather, gather_payload, to_payload, unpack
from dsv3_kernels import cast_blocks, grouped_fp8_gemm, plan_blocks, row_weights, swiglu_cast
from tests.precision.fp8_routed import routed


def case(N: int, D: int, F: int, E: int, K: int, *, unused: int = 0):
    """Tokens, experts' weights, weights of choices, and choices (never of the last `unused` experts)."""
    rng = np.random.default_rng(N)
    x = jnp.asarray(rng.normal(size=(N, D)), jnp.bfloat16)
    gate_up = jnp.asarray(rng.normal(size=(E, D, 2, F)) * D**-0.5, jnp.float32)
    down = jnp.asarray(rng.normal(size=(E, F, D)) * F**-0.5, jnp.float32)
    ids = jnp.asarray(np.stack([rng.permutation(E - unused)[:K] for _ in range(N)]), jnp.int32)
    weights = jnp.asarray(rng.uniform(0.1, 1.0, (N, K)), jnp.float32)
    return x, gate_up, down, weights, ids


def in_float32(x, gate_up, down, weights, ids):
    """Every token through every expert, of which its own are picked."""
    x = x.astype(jnp.float32)
    gate, up = jnp.moveaxis(jnp.einsum("nd,edxf->nexf", x, gate_up, precision="highest"), 2, 0)
    out = jnp.einsum("nef,efd->ned", jax.nn.silu(gate) * up, down, precision="highest")
    return (jnp.take_along_axis(out, ids[:, :, None], axis=1) * weights[:, :, None]).sum(axis=1)


def run(experts, x, gate_up, down, weights, ids, size=1.0):
    """The result and the gradients of its product with a fixed random tensor of `size`, as float32 by name."""
    d_out = jnp.asarray(np.random.default_rng(9).normal(size=x.shape), jnp.float32) * size
    out, *gradients = _run(experts, x, gate_up, down, weights, ids, d_out)
    names = ("out", "x", "gate_up", "down", "weights")
    return {name: np.asarray(array, np.float32) for name, array in zip(names, (out, *gradients), strict=True)}


@functools.partial(jax.jit, static_argnums=0)
def _run(experts, x, gate_up, down, weights, ids, d_out):
    out, pullback = jax.vjp(lambda *arrays: experts(*arrays, ids), x, gate_up, down, weights)
    return out, *pullback(d_out.astype(out.dtype))


@pytest.mark.parametrize(
    "case_of",
    [
        pytest.param({"N": 1, "D": 20, "F": 9, "E": 4, "K": 2}, id="one token", marks=pytest.mark.slow),
        pytest.param({"N": 97, "D": 160, "F": 96, "E": 8, "K": 3, "unused": 3}, id="empty experts"),
        pytest.param({"N": 300, "D": 256, "F": 128, "E": 3, "K": 1}, id="several blocks", marks=pytest.mark.slow),
    ],
)
def test_fp8_experts_are_near_float32_and_so_are_their_gradients(case_of):
    arguments = case(**case_of)
    exact, found = run(in_float32, *arguments), run(routed, *arguments)
    for name, truth in exact.items():
        error = np.linalg.norm(found[name] - truth) / np.linalg.norm(truth)
        # Each rounding errs by 2.7 %, and the gradient of gate_up has six of them in a row.
        assert error < 0.12, (name, error)
    unused = case_of.get("unused", 0)
    if unused:
        assert not found["down"][-unused:].any()
        assert not found["gate_up"][-unused:].any()


def test_rows_are_those_of_products_that_take_the_bytes_of_tokens_as_they_were_sent():
    """Bit for bit with weights that are powers of two; any other one rounds a row before its weight, not after."""
    x, gate_up, down, weights, ids = case(97, 160, 96, 8, 3, unused=3)
    weights = jnp.exp2(jnp.round(jnp.log2(weights)))
    plan = plan_blocks(ids, 8, block_size=BLOCK_ROWS)

    @jax.jit
    def ours(x, gate_up, down, weights):
        return expert_ffn(gather_payload(x, plan), gate_up, down, row_weights(weights, plan), plan.block_expert)

    @jax.jit
    def of_bytes(x, gate_up, down, weights):
        gate_up, down = gate_up.astype(x.dtype), down.astype(x.dtype)  # what a mesh gathers, so what is quantised
        sent = unpack(gather(to_payload(x), plan.token_of))
        joined = cast_blocks(jnp.swapaxes(gate_up.reshape(8, 160, -1), 1, 2))
        hidden = swiglu_cast(grouped_fp8_gemm(sent, joined, plan.block_expert))
        rows = grouped_fp8_gemm(hidden, cast_blocks(jnp.swapaxes(down, 1, 2)), plan.block_expert)
        return rows * row_weights(weights, plan).astype(jnp.bfloat16)[:, None]

    rows = ours(x, gate_up, down, weights)
    np.testing.assert_array_equal(rows, of_bytes(x, gate_up, down, weights))
    assert not np.asarray(rows, np.float32)[np.asarray(plan.pair_of) == ids.size].any()


def test_a_bad_token_costs_its_own_row_and_the_gradients_of_its_experts():
    x, gate_up, down, weights, ids = case(97, 160, 96, 8, 3, unused=3)
    good = run(routed, x, gate_up, down, weights, ids)
    bad = run(routed, x.at[5, 3].set(jnp.nan), gate_up, down, weights, ids)
    assert np.isnan(bad["out"][5]).all()
    for name in ("out", "x", "weights"):
        np.testing.assert_array_equal(np.delete(bad[name], 5, axis=0), np.delete(good[name], 5, axis=0))
    own = np.asarray(ids[5])
    not_own = [expert for expert in range(8) if expert not in own]
    for name in ("gate_up", "down"):
        np.testing.assert_array_equal(bad[name][not_own], good[name][not_own])
        assert np.isnan(bad[name][own]).any()


def test_gradients_of_a_large_batch_are_as_exact_as_large_ones():
    """Loss gradients of single tokens are tiny; a floor under the scales must not swallow them."""
    arguments = case(97, 160, 96, 8, 3, unused=3)
    large, small = run(routed, *arguments), run(routed, *arguments, size=2.0**-30)
    for name in ("x", "gate_up", "down", "weights"):
        np.testing.assert_allclose(small[name] * 2.0**30, large[name], rtol=1e-5, atol=1e-7)


def test_the_control_differs_in_gradients_only():
    arguments = case(97, 160, 96, 8, 3, unused=3)
    recipe = run(routed, *arguments)
    control = run(functools.partial(routed, gradient_tile=(128, 128)), *arguments)
    np.testing.assert_array_equal(control["out"], recipe["out"])
    assert (control["x"] != recipe["x"]).any()
    assert (control["down"] != recipe["down"]).any()


def test_only_bytes_of_rows_are_saved():
    _, gate_up, down, _, _ = case(1, 20, 9, 4, 2)
    rows, block_expert = jnp.zeros((256, 20), jnp.bfloat16), jnp.array([3, -1], jnp.int32)
    weights = jnp.ones(256, jnp.float32)
    saved = jax.eval_shape(lambda *arrays: jax.vjp(expert_ffn, *arrays, block_expert)[1], rows, gate_up, down, weights)
    given = [gate_up.shape, down.shape, weights.shape, block_expert.shape]
    leaves = [(str(leaf.dtype), leaf.shape) for leaf in jax.tree.leaves(saved) if leaf.shape not in given]
    in_fp8 = [("uint8", (256, 20)), ("uint8", (256, 1)), ("uint8", (256, 18)), ("float32", (256, 1))]
    assert sorted(leaves) == sorted(in_fp8)
