"""The experts' feed-forward on rows, in every layout and implementation, against every token through its experts."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_kernels import expert_ffn, expert_ffn_reference, gather_rows, plan_blocks, plan_few, row_weights, sum_rows
from dsv3_kernels.routed_experts import loops

pytestmark = pytest.mark.usefixtures("compile_quickly")

D, F, E, K = 24, 20, 5, 2

BLOCKS = {
    "one": [3],
    "unused": [-1, -1],
    "empty-experts": [0, 0, 0, 4, 4, -1],
    "all-to-one": [2] * 23 + [-1] * 3,
    "ragged": [0] * 1 + [1] * 7 + [2] * 13 + [4] * 2 + [-1] * 5,
    "holes": [0, -1, 1, 1, -1, -1, 3, 3, 3, -1, 4],
}


@pytest.mark.parametrize(
    ("blocks", "block_size"),
    [*[(name, 8) for name in BLOCKS], ("ragged", 1), ("ragged", loops.CHUNK_ROWS // 4), ("holes", loops.CHUNK_ROWS)],
)
def test_chunks_cover_each_used_block_once(blocks, block_size):
    """Each row of the result is its expert plus one; chunks never hold rows of two experts."""
    block_expert = jnp.asarray(BLOCKS[blocks], jnp.int32)

    def step(start, size, expert, visits):
        return visits.at[start + jnp.arange(size)].add(expert + 1)

    visits = jnp.zeros(len(BLOCKS[blocks]) * block_size, jnp.int32)
    visits = loops.for_each_chunk(block_expert, block_size, step, visits, max_rows=visits.size)
    np.testing.assert_array_equal(visits, np.repeat(BLOCKS[blocks], block_size) + 1)


def inputs(N, load="random", dtype=jnp.float32):
    """Tokens, weights of E experts, weights and ids of K choices, and a gradient of the result."""
    rng = np.random.default_rng()

    def array(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    ids = np.argsort(rng.random((N, E)), axis=1)[:, :K]
    if load == "all to two":
        ids[:] = [4, 1]
    if load == "not mine":
        ids = np.where(rng.random(ids.shape) < 0.4, rng.choice([-1, E], ids.shape), ids)
    weights = jnp.asarray(rng.random((N, K)), jnp.float32)
    return array(N, D), array(E, D, 2, F), array(E, F, D), weights, jnp.asarray(ids, jnp.int32), array(N, D)


def paper(x, gate_up, down, weights, ids):
    """Every token through each of its experts (eq. 12); ids outside 0..E-1 add nothing."""
    expert, rows = jnp.clip(ids, 0, E - 1).reshape(-1), jnp.repeat(x, K, axis=0)
    gate = jnp.einsum("md,mdf->mf", rows, gate_up[expert, :, 0])
    up = jnp.einsum("md,mdf->mf", rows, gate_up[expert, :, 1])
    out = jnp.einsum("mf,mfd->md", jax.nn.silu(gate) * up, down[expert])
    weights = jnp.where((ids >= 0) & (ids < E), weights, 0)
    return (out.reshape(*ids.shape, D) * weights[:, :, None]).sum(axis=1)


def routed(x, gate_up, down, weights, ids, *, planned, ffn=expert_ffn):
    """The three steps: rows, their feed-forward, their sum."""
    plan = planned(ids, E)
    out = ffn(gather_rows(x, plan), gate_up, down, row_weights(weights, plan), plan.block_expert)
    return sum_rows(out, plan)


@functools.cache
def with_gradients(function, **how):
    @jax.jit
    def run(x, gate_up, down, weights, ids, d_out):
        arguments = x, gate_up, down, weights
        out, backward = jax.vjp(lambda *arguments: function(*arguments, ids, **how), *arguments)
        return out, *backward(d_out)

    return run


low, tall = partial(plan_blocks, block_size=16), partial(plan_blocks, block_size=64)
in_reference = partial(expert_ffn, implementation="reference")


@pytest.mark.parametrize(
    ("ffn", "planned", "N", "load"),
    [
        pytest.param(expert_ffn, low, 97, "random", id="chunks"),
        pytest.param(expert_ffn, tall, 1025, "all to two", id="chunks: all to two"),
        pytest.param(expert_ffn, low, 97, "not mine", id="chunks: not mine"),
        pytest.param(expert_ffn, plan_few, 1, "random", id="few: one token"),
        pytest.param(partial(expert_ffn, max_rows=7), plan_few, 7, "not mine", id="few: two blocks at a time"),
        pytest.param(in_reference, low, 97, "not mine", id="grouped: low blocks"),
        pytest.param(in_reference, tall, 97, "random", id="grouped: tall blocks"),
        pytest.param(partial(in_reference, max_rows=7), plan_few, 7, "random", id="grouped: few"),
        pytest.param(expert_ffn_reference, low, 97, "not mine", id="reference"),
    ],
)
def test_routed_experts_equal_every_token_through_its_experts_with_gradients(ffn, planned, N, load):
    arguments = inputs(N, load)
    expected = with_gradients(paper)(*arguments)
    found = with_gradients(routed, planned=planned, ffn=ffn)(*arguments)
    for ours, plain in zip(found, expected, strict=True):
        scale = float(jnp.abs(plain).max())
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5 * scale + 1e-4)


def test_implementations_agree_in_bfloat16_with_gradients():
    arguments = inputs(97, dtype=jnp.bfloat16)
    theirs = with_gradients(routed, planned=low, ffn=expert_ffn_reference)(*arguments)
    for ffn, planned in ((expert_ffn, low), (in_reference, low), (expert_ffn, plan_few)):
        ours = with_gradients(routed, planned=planned, ffn=ffn)(*arguments)
        for one, other in zip(ours, theirs, strict=True):
            assert one.dtype == other.dtype
            one, other = one.astype(jnp.float32), other.astype(jnp.float32)
            assert jnp.linalg.norm(one - other) < 1e-2 * jnp.linalg.norm(other)
