"""Dispatch into blocks: nothing dropped, nothing mixed, every gradient exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.moe.dispatch import block_size_for, combine_rows, gather_rows, num_blocks, plan_blocks

CASES = [(1, 4, 16, 8), (97, 4, 16, 32), (1025, 2, 5, 64), (300, 1, 1, 16), (64, 8, 256, 8)]


def random_ids(seed: int, N: int, K: int, E: int) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(np.argsort(rng.random((N, E)), axis=1)[:, :K], jnp.int32)


LOADS = [
    *[pytest.param(random_ids(0, N, K, E), E, size, id=f"random-{N}-{E}") for N, K, E, size in CASES],
    pytest.param(jnp.full((1025, 1), 2, jnp.int32), 4, 64, id="all-to-one"),
    pytest.param(random_ids(1, 97, 2, 3) * 2, 6, 16, id="every-other-empty"),
]


@pytest.mark.parametrize(("ids", "E", "block_size"), LOADS)
def test_every_pair_gets_its_own_row_in_a_block_of_its_expert(ids, E, block_size):
    plan = jax.tree.map(np.asarray, plan_blocks(ids, E, block_size=block_size))
    N, K = ids.shape
    slots = plan.slot_of.reshape(-1)
    assert len(set(slots.tolist())) == N * K
    assert plan.block_expert.shape[0] == num_blocks(N * K, E, block_size)
    assert plan.token_of.shape[0] == plan.block_expert.shape[0] * block_size
    np.testing.assert_array_equal(plan.block_expert[slots // block_size], np.asarray(ids).reshape(-1))
    np.testing.assert_array_equal(plan.pair_of[slots], np.arange(N * K))
    np.testing.assert_array_equal(plan.token_of[slots], np.arange(N * K) // K)
    padding = np.setdiff1d(np.arange(plan.token_of.shape[0]), slots)
    assert (plan.token_of[padding] == N).all()
    assert (plan.pair_of[padding] == N * K).all()
    np.testing.assert_array_equal(plan.load, np.bincount(np.asarray(ids).reshape(-1), minlength=E))


@pytest.mark.parametrize(("ids", "E", "block_size"), LOADS)
def test_blocks_of_one_expert_are_neighbours_and_tokens_keep_their_order(ids, E, block_size):
    plan = jax.tree.map(np.asarray, plan_blocks(ids, E, block_size=block_size))
    used = plan.block_expert[plan.block_expert >= 0]
    assert (np.diff(used) >= 0).all()
    assert (plan.block_expert[len(used) :] == -1).all()
    for expert in range(E):
        rows = np.repeat(plan.block_expert == expert, block_size)
        pairs = plan.pair_of[rows]
        pairs = pairs[pairs < ids.size]
        assert (np.diff(pairs) > 0).all()


@pytest.mark.parametrize(("ids", "E", "block_size"), LOADS)
def test_combining_gathered_rows_is_a_weighted_copy(ids, E, block_size):
    N, K = ids.shape
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((N, 12)), jnp.float32)
    weights = jnp.asarray(rng.random((N, K)), jnp.float32)
    plan = plan_blocks(ids, E, block_size=block_size)
    rows = gather_rows(x, plan)
    np.testing.assert_array_equal(np.asarray(rows)[np.asarray(plan.token_of) == N], 0)
    np.testing.assert_allclose(combine_rows(rows, weights, plan), x * weights.sum(axis=1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize(("ids", "E", "block_size"), LOADS)
def test_gradients_equal_those_of_plain_indexing(ids, E, block_size):
    N, K = ids.shape
    rng = np.random.default_rng(3)
    plan = plan_blocks(ids, E, block_size=block_size)
    M = plan.token_of.shape[0]

    def array(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    x, rows, weights, d_rows, d_out = array(N, 12), array(M, 12), array(N, K), array(M, 12), array(N, 12)

    def plain_gather(x):
        return jnp.concatenate([x, jnp.zeros((1, 12), x.dtype)])[plan.token_of]

    def plain_combine(rows, weights):
        return (rows[plan.slot_of] * weights[:, :, None]).sum(axis=1)

    expected, d_x = jax.vjp(plain_gather, x)
    got, d_x_got = jax.vjp(lambda x: gather_rows(x, plan), x)
    np.testing.assert_array_equal(got, expected)
    on_used_rows = jnp.where((plan.token_of < N)[:, None], d_rows, 0)
    np.testing.assert_allclose(d_x_got(d_rows)[0], d_x(on_used_rows)[0], atol=1e-5)

    expected, backward = jax.vjp(plain_combine, rows, weights)
    got, backward_got = jax.vjp(lambda r, w: combine_rows(r, w, plan), rows, weights)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    for ours, plain in zip(backward_got(d_out), backward(d_out)):
        np.testing.assert_allclose(ours, plain, atol=1e-5)


def test_backward_of_dispatch_has_no_scatter():
    plan = plan_blocks(random_ids(0, 64, 4, 8), 8, block_size=16)

    def loss(x, weights):
        return combine_rows(gather_rows(x, plan), weights, plan).sum()

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(jnp.ones((64, 8)), jnp.ones((64, 4))))
    assert "gather" in text
    assert "scatter" not in text


def test_block_size_follows_the_rows_of_an_average_expert():
    assert block_size_for(8192, 16) == 64
    assert block_size_for(8192, 64) == 32
    assert block_size_for(4, 16) == 8
