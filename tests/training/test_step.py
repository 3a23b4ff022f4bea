import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import dsv3_jax as ds
from dsv3_jax.config.run import RunConfig
from dsv3_jax.config.train import OptimizerConfig
from dsv3_jax.data.batch import Batch, make_batch, stack
from dsv3_jax.training.optimizer import decay_mask, make_optimizer
from dsv3_jax.training.state import TrainState, abstract_state
from dsv3_jax.training.step import Rates, Sums, Terms, batch_loss, denominators_of, make_step
from tests.small import make_variables

step_of = functools.cache(make_step)
"""Compiled once for each configuration and loss."""

RATES = Rates(np.float32(1e-2), np.float32(0.3), np.float32(0.01))


def rows(cfg: RunConfig, seed: int, num: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, cfg.model.vocab_size, (num, cfg.train.seq_len + 1))


def batch_of(cfg: RunConfig, tokens: np.ndarray, segments: np.ndarray | None = None) -> Batch:
    positions = None if segments is None else _positions(segments)
    return make_batch(tokens, segments, positions, mtp_depth=cfg.model.mtp_depth)


def with_depth(cfg: RunConfig, mtp_depth: int) -> RunConfig:
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, mtp_depth=mtp_depth))


def _positions(segments: np.ndarray) -> np.ndarray:
    out = np.zeros_like(segments)
    for b, row in enumerate(segments):
        for t in range(1, len(row)):
            out[b, t] = out[b, t - 1] + 1 if row[t] == row[t - 1] else 0
    return out


def packed(cfg: RunConfig, seed: int, num: int = 4) -> np.ndarray:
    """Rows of two documents and some padding, cut at different places."""
    rng = np.random.default_rng(seed)
    T = cfg.train.seq_len + 1
    segments = np.zeros((num, T), np.int32)
    for b in range(num):
        first, second = sorted(rng.integers(2, T + 1, 2))
        segments[b, :first], segments[b, first:second] = 1, 2
    return segments


def simple_loss(params, router_state, batch, denominators, mtp_weight, *, cfg, functions=None):
    """A loss without a model: what does not depend on one compiles in no time."""
    num_layers = cfg.model.num_moe_layers + cfg.model.mtp_depth
    load = jnp.arange(num_layers * cfg.model.moe.num_experts).reshape(num_layers, -1)
    squares = sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(params)) / denominators.micro_batches
    return squares, Terms(squares, jnp.zeros(cfg.model.mtp_depth), jnp.zeros(num_layers), load, load[:, 0])


def fresh_state(cfg: RunConfig) -> TrainState:
    """What `init_state` makes, with other random numbers and without its compilation."""
    shapes = abstract_state(cfg)
    params = make_variables(cfg.model, dtype=shapes.params["embed"]["w"].dtype)["params"]
    zeros = jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), shapes)
    return zeros._replace(params=params)


def test_loss_equals_the_formula_over_full_logits(small):
    """L_main + λ/D Σ L_k + α Σ L_balance at D = 2, with packing, against log-softmax of `forward`."""
    small = with_depth(small, 2)
    tokens, segments = rows(small, 2), packed(small, 2)
    batch = jax.tree.map(jnp.asarray, batch_of(small, tokens, segments))
    variables = make_variables(small.model)
    denominators = denominators_of(jax.tree.map(jnp.asarray, stack([batch])))
    loss, terms = jax.jit(functools.partial(batch_loss, cfg=small))(
        *(variables["params"], variables["router_state"], batch, denominators), jnp.float32(0.3)
    )
    out = jax.jit(ds.forward, static_argnums=0)(
        small.model, variables, batch.tokens, batch.positions, batch.segment_ids
    )
    means = []
    for k, logits in enumerate((out.logits, *out.mtp_logits)):
        log_p = np.asarray(jax.nn.log_softmax(logits, axis=-1), np.float64)
        total, count = 0.0, 0
        for b in range(4):
            for t in range(small.train.seq_len - k):
                if segments[b, t] and segments[b, t] == segments[b, t + 1 + k]:
                    total -= log_p[b, t, tokens[b, t + 1 + k]]
                    count += 1
        means.append(total / count)
    assert float(terms.main) == pytest.approx(means[0], rel=1e-5)
    np.testing.assert_allclose(terms.mtp, means[1:], rtol=1e-5)
    assert abs(means[1] - means[2]) > 0.01
    expected = means[0] + 0.3 / 2 * (means[1] + means[2]) + 1e-4 * float(terms.balance.sum())
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_accumulation_equals_one_big_batch_when_label_counts_differ(small):
    tokens, segments = rows(small, 3, 6), packed(small, 3, 6)
    one = [batch_of(small, tokens, segments)]
    three = [batch_of(small, tokens[i : i + 2], segments[i : i + 2]) for i in (0, 2, 4)]
    assert len({int((batch.weights[0] != 0).sum()) for batch in three}) > 1
    step = step_of(small)
    big, big_report = step(fresh_state(small), stack(one), RATES)
    summed, report = step(fresh_state(small), stack(three), RATES)
    assert float(report.loss) == pytest.approx(float(big_report.loss), rel=1e-5)
    assert float(report.grad_norm) == pytest.approx(float(big_report.grad_norm), rel=1e-4)
    np.testing.assert_array_equal(report.terms.load, big_report.terms.load)
    # Adam's first step divides a gradient by its own size, so tiny gradients amplify rounding: compare the moments.
    for ours, theirs in zip(jax.tree.leaves(summed.opt_state), jax.tree.leaves(big.opt_state), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)
    for ours, theirs in zip(jax.tree.leaves(summed.router_state), jax.tree.leaves(big.router_state), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_biases_of_all_routers_move_against_the_load_of_the_whole_batch(small):
    whole = np.ones((2, small.train.seq_len + 1), np.int32)
    batches = [batch_of(small, rows(small, seed, 2), whole) for seed in (4, 5)]
    state, report = step_of(small)(fresh_state(small), stack(batches), RATES)
    load = np.asarray(report.terms.load, np.float32)
    expected = 0.01 * np.sign(load.mean(axis=1, keepdims=True) - load)
    main = state.router_state["moe_layers"]["moe"]["router"]["bias"]
    mtp = state.router_state["mtp"]["block"]["moe"]["router"]["bias"]
    np.testing.assert_allclose(np.concatenate([main, mtp]), expected, atol=1e-7)
    K, T = small.model.moe.top_k, small.train.seq_len
    np.testing.assert_array_equal(load.sum(axis=1), [4 * T * K, 4 * (T - 1) * K])


def test_only_matrices_decay(small):
    mask = decay_mask(small.model)
    flat = {jax.tree_util.keystr(path): value for path, value in jax.tree_util.tree_leaves_with_path(mask)}
    for path, decays in flat.items():
        is_norm = "scale" in path or "q_norm" in path or "kv_norm" in path
        assert decays != is_norm, path
    params = make_variables(small.model)["params"]
    still = jax.tree.map(jnp.zeros_like, params)
    optimizer: Any = make_optimizer(OptimizerConfig(weight_decay=0.1), small.model)
    direction, _ = jax.jit(optimizer.update)(still, jax.jit(optimizer.init)(params), params)
    assert float(direction["final_norm"]["scale"].sum()) == 0.0
    np.testing.assert_allclose(direction["embed"]["w"], 0.1 * params["embed"]["w"], rtol=1e-6)


def test_the_optimizer_is_adamw_by_the_formula(small):
    """Two steps in float64 by hand, with clipping."""
    optimizer: Any = make_optimizer(OptimizerConfig(clip_norm=0.5), small.model)
    params = make_variables(small.model)["params"]
    state, update = jax.jit(optimizer.init)(params), jax.jit(optimizer.update)
    first: Any = jax.tree.map(lambda p: jnp.full_like(p, 0.3), params)
    second: Any = jax.tree.map(lambda p: jnp.full_like(p, -0.1), params)
    moment = velocity = 0.0
    for count, grads in enumerate((first, second), 1):
        direction, state = update(grads, state, params)
        clipped = float(grads["final_norm"]["scale"][0])
        clipped *= min(1.0, 0.5 / float(optax.tree.norm(grads)))
        moment = 0.9 * moment + 0.1 * clipped
        velocity = 0.95 * velocity + 0.05 * clipped**2
        expected = (moment / (1 - 0.9**count)) / (np.sqrt(velocity / (1 - 0.95**count)) + 1e-8)
        np.testing.assert_allclose(direction["final_norm"]["scale"], expected, rtol=2e-5)
        np.testing.assert_allclose(direction["embed"]["w"], expected + 0.1 * params["embed"]["w"], rtol=2e-5, atol=2e-6)


def test_moments_are_kept_in_the_configured_dtype(small):
    train = dataclasses.replace(small.train, optimizer=OptimizerConfig(moment_dtype="bfloat16"))
    cfg = dataclasses.replace(small, train=train)
    state = fresh_state(cfg)
    batch = batch_of(cfg, rows(cfg, 6))
    before = [leaf.dtype for leaf in jax.tree.leaves(state.opt_state)]
    state, report = make_step(cfg, simple_loss)(state, stack([batch]), RATES)
    after = [leaf.dtype for leaf in jax.tree.leaves(state.opt_state)]
    assert before == after
    assert set(map(str, after)) == {"int32", "bfloat16"}
    assert bool(report.is_finite)


@pytest.mark.parametrize("num_micro", [1, 2])
def test_states_lie_where_they_should_and_sums_reach_over_all_devices(small, num_micro: int):
    """Parameters and moments halved over two devices where they can be, as are the rows of the batch."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def halved(leaf, axis: int = 0) -> NamedSharding:
        can = leaf.ndim > axis and leaf.shape[axis] % 2 == 0
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data") if can else PartitionSpec())

    batches = stack([batch_of(small, rows(small, seed), packed(small, seed)) for seed in range(num_micro)])
    shardings = jax.tree.map(halved, abstract_state(small))
    state = jax.device_put(fresh_state(small), shardings)
    placed = jax.tree.map(lambda leaf: jax.device_put(leaf, halved(leaf, axis=leaf.ndim - 2)), batches)
    expected, alone = step_of(small, label_loss)(fresh_state(small), batches, RATES)
    after, report = make_step(small, label_loss, shardings=shardings)(state, placed, RATES)
    for leaf, sharding in zip(jax.tree.leaves(after), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert float(report.loss) == pytest.approx(float(alone.loss), rel=1e-6)
    for ours, theirs in zip(jax.tree.leaves(after), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def label_loss(params, router_state, batch, denominators, mtp_weight, **how):
    """`simple_loss` times the share of all labels that this micro-batch has."""
    loss, terms = simple_loss(params, router_state, batch, denominators, mtp_weight, **how)
    return loss * (batch.weights[0] * batch.labels[0].astype(jnp.float32)).sum() / denominators.labels[0], terms


def test_gradients_can_come_from_elsewhere_than_autodiff(small):
    def ones(state, batch, denominators, rates):
        _, terms = simple_loss(state.params, state.router_state, batch, denominators, rates.mtp_weight, cfg=small)
        return Sums(jnp.float32(2), terms, jax.tree.map(jnp.ones_like, state.params))

    step, batch = make_step(small, gradients=ones), batch_of(small, rows(small, 10))
    for num_micro in (1, 3):
        _, report = step(fresh_state(small), stack([batch] * num_micro), RATES)
        assert float(report.loss) == 2 * num_micro
        size = sum(leaf.size for leaf in jax.tree.leaves(fresh_state(small).params))
        assert float(report.grad_norm) == pytest.approx(num_micro * size**0.5, rel=1e-5)


@pytest.mark.parametrize("precision", ["mixed", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_every_precision_learns(small, precision: str):
    model = dataclasses.replace(small.model, num_layers=1, num_dense_layers=0, mtp_depth=0)
    cfg = dataclasses.replace(small, model=model, precision=precision)
    step, state, batch = make_step(cfg), fresh_state(cfg), stack([batch_of(cfg, rows(cfg, 7))])
    losses = []
    for _ in range(8):
        state, report = step(state, batch, RATES)
        losses.append(float(report.loss))
    assert losses[-1] < 0.8 * losses[0]


def nan_loss(params, *arguments, **how):
    loss, terms = simple_loss(params, *arguments, **how)
    return loss * jnp.float32(float("nan")), terms


def nan_gradient(params, *arguments, **how):
    """A finite loss: the derivative of a root at 0 is infinite, and 0 times that is NaN."""
    loss, terms = simple_loss(params, *arguments, **how)
    return loss + jnp.sqrt(jnp.float32(0) * params["final_norm"]["scale"].sum()), terms


@pytest.mark.parametrize("num_micro", [1, 2])
@pytest.mark.parametrize(("loss", "is_loss_finite"), [(nan_loss, False), (nan_gradient, True)])
def test_a_step_that_is_not_finite_changes_nothing(small, loss, is_loss_finite: bool, num_micro: int):
    state = fresh_state(small)
    before = jax.tree.map(np.array, state)
    after, report = make_step(small, loss)(state, stack([batch_of(small, rows(small, 8))] * num_micro), RATES)
    assert bool(jnp.isfinite(report.loss)) == is_loss_finite
    assert not bool(report.is_finite)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_model_without_experts_or_mtp_trains(small):
    cfg = dataclasses.replace(small, model=dataclasses.replace(small.model, mtp_depth=0, num_dense_layers=2))
    state, report = make_step(cfg)(fresh_state(cfg), stack([batch_of(cfg, rows(cfg, 9))]), RATES)
    assert state.router_state == {}
    assert bool(report.is_finite)
    assert report.terms.load.shape[0] == 0


@pytest.mark.slow
def test_a_model_without_bias_and_with_two_mtp_modules_trains(small):
    moe = dataclasses.replace(small.model.moe, has_bias=False, num_groups=1, groups_per_token=1)
    model = dataclasses.replace(small.model, num_dense_layers=0, num_layers=1, moe=moe, mtp_depth=2)
    cfg = dataclasses.replace(small, model=model)
    _, report = make_step(cfg)(fresh_state(cfg), stack([batch_of(cfg, rows(cfg, 9))]), RATES)
    assert bool(report.is_finite)
    assert report.terms.mtp.shape == (2,)
    assert report.terms.load.shape[0] == 3
