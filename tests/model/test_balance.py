"""The rule that moves router biases, and the sequence-wise balance loss by the report's formula."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.model.moe.router import affinity, expert_load, sequence_balance_loss
from dsv3_jax.training.optimizer import update_bias


@pytest.mark.parametrize("shape", [(1, 6), (3, 8), (7,), (2, 3, 5)])
def test_bias_moves_against_the_load(shape) -> None:
    rng = np.random.default_rng(sum(shape))
    bias, load = rng.normal(0, 1, shape).astype(np.float32), rng.integers(0, 9, shape)
    load[..., -1] = load[..., :-1].mean(-1)  # often exactly at the mean
    moved = np.asarray(update_bias(jnp.asarray(bias), jnp.asarray(load), 0.125)) - bias
    expected = 0.125 * np.sign(load.mean(-1, keepdims=True) - load)
    np.testing.assert_allclose(moved, expected, atol=1e-6)
    assert (moved[load > load.mean(-1, keepdims=True)] < 0).all()
    assert (moved[load < load.mean(-1, keepdims=True)] > 0).all()


def test_balanced_load_and_speed_zero_leave_the_bias_alone() -> None:
    bias = jnp.asarray(np.random.default_rng(0).normal(0, 1, (2, 6)), jnp.float32)
    np.testing.assert_array_equal(update_bias(bias, jnp.full((2, 6), 4096, jnp.int32), 0.001), bias)
    np.testing.assert_array_equal(update_bias(bias, jnp.arange(12).reshape(2, 6), 0.0), bias)
    assert update_bias(bias, jnp.arange(12).reshape(2, 6), 0.001).dtype == jnp.float32


def test_an_expert_at_the_mean_of_a_huge_batch_stays() -> None:
    """15360 sequences of 4096 tokens, 8 choices each, over 256 experts: exact in float32 sums."""
    load = jnp.full(256, 15360 * 4096 * 8 // 256, jnp.int32)
    np.testing.assert_array_equal(update_bias(jnp.zeros(256), load, 0.001), 0)


@pytest.mark.parametrize("num_shards", [2, 8])
def test_update_on_many_devices_equals_one(num_shards: int) -> None:
    rng = np.random.default_rng(num_shards)
    N, E = 8 * 13, 10
    ids = jnp.asarray(np.minimum(rng.geometric(0.3, (N, 3)) - 1, E - 1), jnp.int32)
    valid = jnp.asarray(rng.random(N) < 0.8)
    bias = jnp.asarray(rng.normal(0, 1, E), jnp.float32)

    def step(bias, ids, valid):
        return update_bias(bias, expert_load(ids, valid, num_experts=E), 0.01)

    expected = jax.jit(step)(bias, ids, valid)
    shards = zip(np.split(np.asarray(ids), num_shards), np.split(np.asarray(valid), num_shards))
    summed = sum(np.asarray(expert_load(jnp.asarray(i), jnp.asarray(v), num_experts=E)) for i, v in shards)
    np.testing.assert_array_equal(update_bias(bias, jnp.asarray(summed), 0.01), expected)

    mesh = jax.make_mesh((num_shards,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:num_shards])
    split = NamedSharding(mesh, P("data"))
    whole = NamedSharding(mesh, P())
    placed = jax.device_put(bias, whole), jax.device_put(ids, split), jax.device_put(valid, split)
    np.testing.assert_array_equal(jax.jit(step, out_shardings=whole)(*placed), expected)

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P(), check_vma=True)
    def step_by_hand(bias, ids, valid):
        load = jax.lax.psum(expert_load(ids, valid, num_experts=E), "data")
        return update_bias(bias, load, 0.01)

    np.testing.assert_array_equal(jax.jit(step_by_hand)(*placed), expected)


def formula(logits: np.ndarray, valid: np.ndarray, top_k: int, score: str) -> float:
    """Eq. 17-20, one sequence, token and expert at a time, in float64."""
    B, T, E = logits.shape
    total = 0.0
    for b in range(B):
        rows = [t for t in range(T) if valid[b, t]]
        if not rows:
            continue
        s = logits[b].astype(np.float64)
        s = 1 / (1 + np.exp(-s)) if score == "sigmoid" else np.exp(s) / np.exp(s).sum(-1, keepdims=True)
        for i in range(E):
            f = sum(i in np.argsort(-s[t], kind="stable")[:top_k] for t in rows) * E / (top_k * len(rows))
            P = sum(s[t, i] / s[t].sum() for t in rows) / len(rows)
            total += f * P
    return total / B


loss_jit = jax.jit(sequence_balance_loss, static_argnames=("top_k", "score"))


@pytest.mark.parametrize(("B", "T", "E", "K", "score"), [(3, 7, 6, 2, "sigmoid"), (2, 11, 5, 3, "softmax")])
def test_balance_loss_equals_the_formula(B: int, T: int, E: int, K: int, score) -> None:
    for seed in range(4):
        rng = np.random.default_rng(seed)
        logits = rng.normal(rng.normal(0, 1, E), 1.5, (B, T, E)).astype(np.float32)
        valid = rng.random((B, T)) < 0.7
        np.testing.assert_allclose(
            loss_jit(logits, valid, top_k=K, score=score), formula(logits, valid, K, score), rtol=1e-5
        )
        everything = np.ones((B, T), bool)
        unmasked = sequence_balance_loss(jnp.asarray(logits), None, top_k=K, score=score)
        np.testing.assert_allclose(unmasked, formula(logits, everything, K, score), rtol=1e-5)


def test_padding_and_the_order_of_tokens_do_not_matter() -> None:
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 1, (2, 9, 6)).astype(np.float32)
    padded = np.concatenate([logits, np.full((2, 4, 6), 1e3, np.float32)], axis=1)
    valid = np.arange(13)[None, :] < np.array([[9], [9]])
    alone = sequence_balance_loss(jnp.asarray(logits), None, top_k=2, score="sigmoid")
    np.testing.assert_allclose(loss_jit(padded, valid, top_k=2, score="sigmoid"), alone, rtol=1e-6)
    np.testing.assert_allclose(loss_jit(padded[:, ::-1], valid[:, ::-1], top_k=2, score="sigmoid"), alone, rtol=1e-6)


def test_balance_is_judged_in_each_sequence_not_over_the_batch() -> None:
    """Two sequences that each overload one expert balance out over the batch, but not in the loss."""
    skew = np.where(np.arange(4) == 0, 4.0, -4.0)
    logits = np.stack([np.tile(np.roll(skew, b), (6, 1)) for b in range(4)]).astype(np.float32)
    balanced = np.stack([np.stack([np.roll(skew, t) for t in range(8)]) for _ in range(4)]).astype(np.float32)
    assert float(sequence_balance_loss(jnp.asarray(logits), None, top_k=1, score="sigmoid")) > 3.0
    np.testing.assert_allclose(sequence_balance_loss(jnp.asarray(balanced), None, top_k=1, score="sigmoid"), 1.0, 1e-5)


def test_only_the_mean_affinity_carries_a_gradient() -> None:
    rng = np.random.default_rng(6)
    logits = rng.normal(0, 1, (2, 5, 6)).astype(np.float32)
    valid = rng.random((2, 5)) < 0.8
    actual = jax.jit(jax.grad(partial(sequence_balance_loss, top_k=2, score="sigmoid")))(logits, valid)

    chosen = np.argsort(-logits, axis=-1, kind="stable")[..., :2]
    is_chosen = (np.arange(6) == chosen[..., None]).any(2) & valid[..., None]
    f = jnp.asarray(is_chosen.sum(1) * 3 / valid.sum(1, keepdims=True), jnp.float32)  # a constant

    def with_fixed_f(logits):
        s = affinity(logits, score="sigmoid")
        share = s / s.sum(-1, keepdims=True) * valid[..., None].astype(np.float32)
        return (f * share.sum(1) / valid.sum(1, keepdims=True).astype(np.float32)).sum(-1).mean()

    np.testing.assert_allclose(actual, jax.grad(with_fixed_f)(logits), rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(np.asarray(actual)[~valid], 0)


def test_load_counts_valid_tokens_only() -> None:
    ids = jnp.asarray([[0, 2], [2, 1], [3, 2]], jnp.int32)
    np.testing.assert_array_equal(expert_load(ids, None, num_experts=5), [1, 1, 3, 1, 0])
    np.testing.assert_array_equal(expert_load(ids, jnp.asarray([True, False, True]), num_experts=5), [1, 0, 2, 1, 0])
    np.testing.assert_array_equal(expert_load(ids, jnp.zeros(3, bool), num_experts=5), 0)
