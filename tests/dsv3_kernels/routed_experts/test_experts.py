"""The experts' feed-forward on rows, in every layout and implementation, against every token through its experts."""

import functools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_kernels import expert_ffn, expert_ffn_reference, gather_rows, plan_blocks, plan_few, row_weights, sum_rows
from dsv3_kernels.routed_experts import loops
from tests.fresh import fresh_rng

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
    fold = jax.jit(partial(loops.for_each_chunk, block_size=block_size, step=step, max_rows=visits.size))
    visits = fold(block_expert, carry=visits)
    np.testing.assert_array_equal(visits, np.repeat(BLOCKS[blocks], block_size) + 1)


def inputs(N, load="random", dtype=jnp.float32):
    """Tokens, weights of E experts, weights and ids of K choices, and a gradient of the result."""
    rng = fresh_rng()

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


@pytest.mark.slow
def test_implementations_agree_in_bfloat16_with_gradients():
    arguments = inputs(97, dtype=jnp.bfloat16)
    theirs = with_gradients(routed, planned=low, ffn=expert_ffn_reference)(*arguments)
    for ffn, planned in ((expert_ffn, low), (in_reference, low), (expert_ffn, plan_few)):
        ours = with_gradients(routed, planned=planned, ffn=ffn)(*arguments)
        for one, other in zip(ours, theirs, strict=True):
            assert one.dtype == other.dtype
            one, other = one.astype(jnp.float32), other.astype(jnp.float32)
            assert jnp.linalg.norm(one - other) < 1e-2 * jnp.linalg.norm(other)


def test_two_devices_that_share_the_experts_equal_one_with_gradients():
    """Each has some of the experts and all tokens: choices of the other's experts are not its own."""
    x, gate_up, down, weights, ids, d_out = inputs(9)
    pad = jnp.zeros((1, D, 2, F)), jnp.zeros((1, F, D))  # six experts
    gate_up, down = (jnp.concatenate(pair) for pair in zip((gate_up, down), pad, strict=True))

    def one(x, gate_up, down, weights, ids, planned=low):
        plan = planned(ids, len(down))
        out = expert_ffn(gather_rows(x, plan), gate_up, down, row_weights(weights, plan), plan.block_expert)
        return sum_rows(out, plan)

    def of_a_device(x, gate_up, down, weights, ids):
        own = ids - 3 * jax.lax.axis_index("expert")
        return jax.lax.psum(one(x, gate_up, down, weights, own, partial(low, max_pairs=x.shape[0] * K)), "expert")

    mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    every, own = jax.P(), jax.P("expert")
    two = jax.shard_map(of_a_device, mesh=mesh, in_specs=(every, own, own, every, every), out_specs=every)
    arguments = x, gate_up, down, weights, ids, d_out
    for ours, plain in zip(with_gradients(two)(*arguments), with_gradients(one)(*arguments), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-3)


def test_only_the_chosen_experts_of_a_stack_are_read_and_none_is_copied_for_every_row():
    x, gate_up, down, weights, ids, _ = inputs(6)
    ids = ids % 3
    ids = ids.at[:, 1].set((ids[:, 0] + 1) % 3)
    expected = with_gradients(paper)(x, gate_up, down, weights, ids, x)[0]
    first, layers = 2 * E, 4
    unread = jnp.full((layers * E, 1, 1, 1), jnp.nan).at[first : first + 3].set(0)
    gate_up, down = jnp.tile(gate_up, (layers, 1, 1, 1)) + unread, jnp.tile(down, (layers, 1, 1)) + unread[..., 0]

    @partial(jax.jit, static_argnames="planned")
    def run(first, gate_up, down, *, planned):
        plan = planned(ids, E)
        experts = jnp.where(plan.block_expert < 0, -1, plan.block_expert + first)
        rows, weight = gather_rows(x, plan), row_weights(weights, plan)
        return sum_rows(expert_ffn(rows, gate_up, down, weight, experts, max_rows=len(x)), plan)

    for planned in (low, plan_few):
        np.testing.assert_allclose(run(first, gate_up, down, planned=planned), expected, rtol=1e-4, atol=1e-4)
        text = run.lower(first, gate_up, down, planned=planned).as_text()
        assert not re.search(rf"tensor<(?!1x)\d+x({D}x{2 * F}|{F}x{D})xf32>.*tensor<\d+x1xi32>.*gather", text)
        assert not re.search(rf"gather.*-> tensor<\d+x{D}x{2 * F}xf32>", text)


def test_a_batch_of_problems_is_vectorised():
    x, gate_up, down, weights, ids, _ = inputs(7)
    many = jnp.stack([x, x[::-1]])
    found = jax.jit(jax.vmap(lambda x: routed(x, gate_up, down, weights, ids, planned=plan_few)))(many)
    for one, ours in zip(many, found, strict=True):
        np.testing.assert_allclose(ours, paper(one, gate_up, down, weights, ids), rtol=1e-4, atol=1e-4)


def test_gate_and_up_are_saved_by_their_name_and_nothing_else_of_the_rows():
    *arguments, ids, _ = inputs(97)
    by_name = jax.checkpoint_policies.save_only_these_names("experts_gate_up")
    function = jax.checkpoint(lambda *arguments: routed(*arguments, ids, planned=low), policy=by_name)
    saved = jax.tree.leaves(jax.eval_shape(lambda *arguments: jax.vjp(function, *arguments)[1], *arguments))
    made = [leaf.shape for leaf in saved if leaf.shape not in [argument.shape for argument in (*arguments, ids)]]
    assert made == [(low(ids, E).token_of.size, 2 * F)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"gate_up": a["gate_up"].reshape(E, D, 2 * F)}, "stack gates before ups"),
        (lambda a: a | {"down": a["down"].astype(jnp.bfloat16)}, "cast them"),
        (lambda a: a | {"weights": a["weights"][1:]}, "row_weights"),
        (lambda a: a | {"block_expert": a["block_expert"][1:]}, "equal blocks of the M=32 rows"),
    ],
)
def test_what_does_not_fit_is_refused_with_how_to_fix_it(change, message):
    fitting = {
        "rows": jnp.ones((32, D)),
        "gate_up": jnp.ones((E, D, 2, F)),
        "down": jnp.ones((E, F, D)),
        "weights": jnp.ones(32),
        "block_expert": jnp.zeros(4, jnp.int32),
    }
    with pytest.raises(ValueError, match=message):
        expert_ffn(**change(fitting))
