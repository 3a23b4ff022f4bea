"""The experts' feed-forward, in chunks and in grouped products, against every token through its experts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.moe import grouped, loops
from dsv3_jax.model.moe.dispatch import no_gradient, plan_blocks
from dsv3_jax.model.moe.experts import routed_ffn

D, F, E = 24, 20, 5

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
    visits = loops.for_each_chunk(block_expert, block_size, step, visits, num_tokens=visits.size)
    np.testing.assert_array_equal(visits, np.repeat(BLOCKS[blocks], block_size) + 1)


def routed_inputs(name, dtype=jnp.float32):
    rng = np.random.default_rng()

    def array(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    N = {"one token": 1, "ragged": 97}.get(name, 1025)
    ids = np.argsort(rng.random((N, E)), axis=1)[:, :2]
    if name == "all to two":
        ids[:] = [4, 1]
    params = {"gate_up": array(E, D, 2, F), "down": array(E, F, D)}
    weights = jnp.asarray(rng.random((N, 2)), jnp.float32)
    return array(N, D), params, weights, jnp.asarray(ids, jnp.int32)


def paper(x, params, weights, ids):
    """Every token through each of its experts (eq. 12)."""
    expert = ids.reshape(-1)
    rows = jnp.repeat(x, 2, axis=0)
    gate = jnp.einsum("md,mdf->mf", rows, params["gate_up"][expert, :, 0])
    up = jnp.einsum("md,mdf->mf", rows, params["gate_up"][expert, :, 1])
    out = jnp.einsum("mf,mfd->md", jax.nn.silu(gate) * up, params["down"][expert])
    return (out.reshape(*ids.shape, D) * weights[:, :, None]).sum(axis=1)


def composed(implementation):
    """`routed_ffn` as a GPU runs it, of other implementations of the products."""

    @jax.custom_vjp
    def routed(x, params, weights, plan):
        return forward(x, params, weights, plan)[0]

    def forward(x, params, weights, plan):
        gate_up = params["gate_up"].reshape(E, D, 2 * F)
        arguments = (x, gate_up, params["down"], weights, plan)
        out, hidden = grouped.forward(*arguments, keeps_hidden=True, implementation=implementation)
        return out, (*arguments, hidden)

    def backward(residuals, d_out):
        x, gate_up, down, weights, plan, hidden = residuals
        d_x, d_gate_up, d_down, d_weights = grouped.backward(
            x, gate_up, down, weights, plan, hidden, d_out, implementation=implementation
        )
        d_params = {"gate_up": d_gate_up.reshape(E, D, 2, F), "down": d_down}
        return d_x, d_params, d_weights, no_gradient(plan)

    routed.defvjp(forward, backward)
    return routed


IMPLEMENTATIONS = {"chunks": routed_ffn, "xla": composed("xla"), "reference": composed("reference")}


@pytest.mark.parametrize(
    ("routed", "load"),
    [
        *[("chunks", load) for load in ("one token", "ragged", "many", "all to two")],
        *[("xla", load) for load in ("one token", "all to two")],
        ("reference", "ragged"),
    ],
)
def test_routed_experts_equal_every_token_through_its_experts_with_gradients(routed, load):
    routed = IMPLEMENTATIONS[routed]
    x, params, weights, ids = routed_inputs(load)
    d_out = jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
    plan = plan_blocks(ids, E, block_size=16)

    @jax.jit
    def run(x, params, weights):
        out, backward = jax.vjp(lambda *args: routed(*args, plan), x, params, weights)
        return out, backward(d_out)

    expected, backward = jax.vjp(lambda x, params, weights: paper(x, params, weights, ids), x, params, weights)
    out, gradients = run(x, params, weights)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(routed(x, params, weights, plan), out, rtol=1e-5, atol=1e-4)
    for ours, plain in zip(jax.tree.leaves(gradients), jax.tree.leaves(backward(d_out))):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5 * float(jnp.abs(plain).max()) + 1e-4)


@pytest.mark.parametrize("block_size", [16, 64])
def test_implementations_agree_in_bfloat16_with_gradients(block_size):
    x, params, weights, ids = routed_inputs("ragged", jnp.bfloat16)
    plan = plan_blocks(ids, E, block_size=block_size)

    def run(routed):
        out, backward = jax.vjp(lambda *args: routed(*args, plan), x, params, weights)
        return jax.tree.leaves((out, backward(jnp.cos(x.astype(jnp.float32)).astype(x.dtype))))

    chunks, *others = (jax.jit(partial(run, routed))() for routed in IMPLEMENTATIONS.values())
    for other in others:
        for ours, theirs in zip(chunks, other, strict=True):
            assert ours.dtype == theirs.dtype
            ours, theirs = ours.astype(jnp.float32), theirs.astype(jnp.float32)
            assert jnp.linalg.norm(ours - theirs) < 1e-2 * jnp.linalg.norm(theirs)


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
