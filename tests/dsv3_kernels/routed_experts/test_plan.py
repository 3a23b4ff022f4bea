"""Plans of rows: nothing dropped but what is no choice, nothing mixed, whatever the layout."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_kernels import BlockPlan, gather_rows, plan_blocks, plan_few, row_weights, sum_rows
from dsv3_kernels.routed_experts.plan import FEW_TOKENS, block_size_for, num_blocks
from tests.fresh import fresh_rng

pytestmark = pytest.mark.usefixtures("compile_quickly")

RNG = fresh_rng()


def random_ids(N: int, K: int, E: int, *, step: int = 1) -> np.ndarray:
    """Distinct experts of each token, each a multiple of `step`."""
    return np.argsort(RNG.random((N, E)), axis=1)[:, :K] * step


def with_others(ids: np.ndarray, E: int) -> np.ndarray:
    """About half of the ids made to mean no expert."""
    return np.where(RNG.random(ids.shape) < 0.5, RNG.choice([-7, -1, E, E + 3], ids.shape), ids)


def case(ids: np.ndarray, E: int, **how) -> tuple:
    """The ids, the number of experts, and how to plan: `plan_few` by default."""
    return ids.astype(np.int32), E, partial(plan_blocks, **how) if how else plan_few


CASES = {
    "1025-of-5": case(random_ids(1025, 2, 5), 5, block_size=64),
    "one-expert": case(random_ids(97, 1, 1), 1, block_size=16),
    "64-of-96": case(random_ids(64, 8, 96), 96, block_size=8),
    "all-to-one": case(np.full((1025, 1), 2), 4, block_size=64),
    "every-other-empty": case(random_ids(97, 2, 3, step=2), 6, block_size=16),
    "none-mine": case(np.full((5, 3), -1), 7, block_size=8),
    "bounded": case(with_others(random_ids(97, 4, 16), 16), 16, block_size=16, max_pairs=97 * 4 - 50),
    "few: one token": case(random_ids(1, 8, 16), 16),
    "few: of many experts": case(random_ids(3, 6, 256), 256),
    "few: not mine": case(with_others(random_ids(FEW_TOKENS, 3, 5), 5), 5),
}
each_case = pytest.mark.parametrize("name", CASES)


@functools.cache
def planned(name: str) -> BlockPlan:
    """The plan of a case, compiled once for all tests."""
    ids, E, plan = CASES[name]
    return jax.tree.map(np.asarray, jax.jit(partial(plan, num_experts=E))(ids))


@each_case
def test_every_choice_gets_its_own_row_in_a_block_of_its_expert(name):
    (ids, E, _), plan = CASES[name], planned(name)
    (N, K), M, expert_of_pair = ids.shape, plan.token_of.size, ids.ravel()
    is_choice = (expert_of_pair >= 0) & (expert_of_pair < E)
    slots, pairs = plan.slot_of.ravel(), np.flatnonzero(is_choice)
    assert (slots[~is_choice] == M).all()
    slots = slots[is_choice]
    assert len(set(slots.tolist())) == len(pairs)
    np.testing.assert_array_equal(plan.block_expert[slots // (M // plan.block_expert.size)], expert_of_pair[pairs])
    np.testing.assert_array_equal(plan.pair_of[slots], pairs)
    np.testing.assert_array_equal(plan.token_of[slots], pairs // K)
    padding = np.setdiff1d(np.arange(M), slots)
    assert (plan.token_of[padding] == N).all()
    assert (plan.pair_of[padding] == N * K).all()


@each_case
def test_blocks_of_one_expert_are_neighbours_and_tokens_stay_in_order(name):
    (ids, E, _), plan = CASES[name], planned(name)
    used = plan.block_expert[plan.block_expert >= 0]
    assert set(used.tolist()) == set(ids[(ids >= 0) & (ids < E)].tolist())
    runs = used[np.diff(used, prepend=-1) != 0]
    assert len(set(runs.tolist())) == len(runs)
    if name != "few: one token":  # whose experts stay in its own order
        assert (np.diff(used) >= 0).all()
        assert (plan.block_expert[len(used) :] == -1).all()
    for expert in set(used.tolist()):
        pairs = plan.pair_of.reshape(plan.block_expert.size, -1)[plan.block_expert == expert]
        assert (np.diff(pairs[pairs < ids.size]) > 0).all()


@each_case
def test_rows_and_tokens_equal_plain_indexing_with_gradients(name, rng):
    """Each way is the other's transpose, and the sum of weighted rows is the token times the sum of its weights."""
    (ids, E, _), plan = CASES[name], planned(name)
    (N, K), M = ids.shape, plan.token_of.size

    def array(*shape):
        return rng.standard_normal(shape, np.float32)

    def indexed(x, at):
        return np.concatenate([x, np.zeros_like(x[:1])])[at]

    x, weights, rows = arguments = array(N, 12), array(N, K), array(M, 12)
    d_rows, d_weight, d_sum = cotangents = array(M, 12), array(M), array(N, 12)

    @jax.jit
    def ours(plan, arguments, cotangents):
        def run(x, weights, rows):
            return gather_rows(x, plan), row_weights(weights, plan), sum_rows(rows, plan)

        out, backward = jax.vjp(run, *arguments)
        return out, backward(cotangents), sum_rows(out[0] * out[1][:, None], plan)

    out, gradients, weighted = ours(plan, arguments, cotangents)
    np.testing.assert_array_equal(out[0], indexed(x, plan.token_of))
    np.testing.assert_array_equal(out[1], indexed(weights.ravel(), plan.pair_of))
    np.testing.assert_allclose(out[2], indexed(rows, plan.slot_of).sum(axis=1), atol=1e-5)
    np.testing.assert_allclose(gradients[0], indexed(d_rows, plan.slot_of).sum(axis=1), atol=1e-5)
    np.testing.assert_array_equal(gradients[1], indexed(d_weight, plan.slot_of))
    np.testing.assert_array_equal(gradients[2], indexed(d_sum, plan.token_of))
    weight_N = np.where((ids >= 0) & (ids < E), weights, 0).sum(axis=1)
    np.testing.assert_allclose(weighted, x * weight_N[:, None], atol=1e-4)


def test_backward_passes_have_no_scatter():
    plan = jax.tree.map(jnp.asarray, planned("bounded"))

    def loss(x, weights):
        return sum_rows(gather_rows(x, plan) * row_weights(weights, plan)[:, None], plan).sum()

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(jnp.ones((97, 8)), jnp.ones((97, 4))))
    assert "gather" in text
    assert "scatter" not in text


def test_rows_are_bounded_and_what_does_not_fit_gets_none():
    ids, E, bound = random_ids(200, 3, 9).astype(np.int32), 9, 100
    plan = jax.jit(lambda ids: plan_blocks(ids, E, block_size=8, max_pairs=bound))(ids)
    plan = jax.tree.map(np.asarray, plan)
    M, slots = plan.token_of.size, plan.slot_of.ravel()
    assert M == num_blocks(bound, E, 8) * 8 < ids.size
    with_row = slots[slots < M]
    assert len(set(with_row.tolist())) == len(with_row) == (plan.token_of < 200).sum() >= bound
    np.testing.assert_array_equal(plan.pair_of[with_row], np.flatnonzero(slots < M))


def test_layouts_follow_the_sizes():
    assert block_size_for(8192, 16) == 64
    assert block_size_for(8192, 64) == 32
    assert block_size_for(4, 16) == 8

    def rows_and_blocks(plan, tokens, num_experts, **how):
        ids = jax.ShapeDtypeStruct((tokens, 4), jnp.int32)
        shapes = jax.eval_shape(partial(plan, num_experts=num_experts, **how), ids)
        return shapes.token_of.size, shapes.block_expert.size

    assert rows_and_blocks(plan_few, 8, 16) == (16 * 8, 16)
    assert rows_and_blocks(plan_few, 8, 256) == (32 * 8, 32)
    assert rows_and_blocks(plan_few, FEW_TOKENS + 1, 16) == rows_and_blocks(plan_blocks, FEW_TOKENS + 1, 16)
    assert rows_and_blocks(plan_blocks, 9, 16, max_pairs=10**9) == rows_and_blocks(plan_blocks, 9, 16)
