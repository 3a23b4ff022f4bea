"""States of a small run on one device, and what one step from each of them gives: there, and on a mesh.

One start, not two trajectories: routing is chaotic, and a near-tie that is moved by 1e-7 parts two runs in two steps.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from dsv3_jax.config.run import RunConfig
from dsv3_jax.data.batch import Batch, make_batch
from dsv3_jax.model.functions import Functions, functions_for
from dsv3_jax.model.params import abstract_params
from dsv3_jax.model.parts import unembed
from dsv3_jax.model.transformer import hidden_states
from dsv3_jax.parallel.axes import PIPE, ROWS
from dsv3_jax.training.batches import batch_specs, place
from dsv3_jax.training.mesh_step import step_on
from dsv3_jax.training.sharded import gathered_tree, local_config, on_mesh, stored_specs, used_axes
from dsv3_jax.training.state import TrainState, init_state, state_shardings
from dsv3_jax.training.step import Rates, StepReport, make_step
from dsv3_jax.typing import Array, Float, Int, Params

RATES = Rates(np.float32(3e-3), np.float32(0.3), np.float32(0.01))
STEPS_BETWEEN = 4


class Start(NamedTuple):
    """A state and the batch that comes next, as NumPy arrays; the batch is one micro-batch, not stacked."""

    state: TrainState
    batch: Batch


class Outcome(NamedTuple):
    """What one step gave, as NumPy arrays."""

    loss: float
    gradients: Params
    """After clipping: what moved the first moments, whose β is known."""
    moments: tuple[Params, Params]
    loads: Int[Any, "l E"]
    biases: Any
    dropped: int
    ids: tuple[Int[Any, "l N K"], ...]
    """Experts of each token in each layer."""
    row_losses: Float[Any, "B"]
    """Of the main model, a mean over a row's labels: many of them, so that chance decides less than in their mean."""


class Reference(NamedTuple):
    """Starts of one run and what one device makes of them."""

    starts: list[Start]
    outcomes: list[Outcome]


@functools.lru_cache(maxsize=8)
def reference(cfg: RunConfig, num_states: int) -> Reference:
    """Of a run of `cfg` on one device, in one micro-batch a step."""
    step, probe = make_step(cfg), jax.jit(functools.partial(_probe, cfg, functions=functions_for(cfg.precision)))
    state, rng = init_state(cfg), np.random.default_rng(cfg.seed)
    starts, outcomes = [], []
    for index in range(num_states):
        host = jax.tree.map(np.array, state)
        batch = draw_batch(cfg, rng)
        while cfg.precision == "float32" and not _is_stable(probe, host, batch, rng):
            batch = draw_batch(cfg, rng)
        starts.append(Start(host, batch))
        probed = probe(host.variables, batch)
        after, report = step(state, _stacked(batch), RATES)
        outcomes.append(_outcome(cfg, host, after, report, probed))
        for _ in range(STEPS_BETWEEN if index < num_states - 1 else 0):
            after, _ = step(after, _stacked(draw_batch(cfg, rng)), RATES)
        state = after
    return Reference(starts, outcomes)


def outcomes_on(cfg: RunConfig, mesh: Mesh, starts: Sequence[Start]) -> Iterator[Outcome]:
    """What one step of `cfg` on `mesh` makes of each start, in micro-batches of `cfg.train.batch.micro` rows."""
    step, shardings = step_on(cfg, mesh, functions_for(cfg.precision)), state_shardings(cfg, mesh)
    probe = probe_on(cfg, mesh)
    for start in starts:
        state = jax.tree.map(jax.device_put, start.state, shardings)
        probed = probe(state.variables, start.batch)
        after, report = step(state, _stacked(start.batch, cfg.train.batch.micro), RATES)
        yield _outcome(cfg, start.state, after, report, probed)


def probe_on(cfg: RunConfig, mesh: Mesh) -> Callable[[Any, Batch], Any]:
    """A forward pass on `mesh` that returns the experts of each token and the loss of each row."""
    specs, rows = abstract_params(cfg.model)["params"], used_axes(mesh, (PIPE, *ROWS))
    functions = functions_for(cfg.precision)
    local, around = local_config(cfg, mesh), on_mesh(functions, cfg, mesh)

    def of_a_device(params, router_state, batch):
        used = gathered_tree(params, specs, mesh=mesh, rows=rows, functions=functions)
        return _probe(local, {"params": used, "router_state": router_state}, batch, functions=around)

    @jax.jit
    def run(variables, batch):
        in_specs = stored_specs(specs, mesh), PartitionSpec(), batch_specs(batch, rows)
        out_specs = PartitionSpec(None, rows or None), PartitionSpec(rows or None)
        manual = jax.shard_map(of_a_device, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=True)
        return manual(variables["params"], variables["router_state"], batch)

    return lambda variables, batch: run(variables, place(batch, mesh, rows))


def draw_batch(cfg: RunConfig, rng: np.random.Generator) -> Batch:
    """A step's rows: two documents each, and where documents are masked some padding.

    A row repeats a few tokens: something that only attention can learn, so that no gradient of it dies away.
    """
    rows, length = cfg.train.batch.full, cfg.train.seq_len + 1
    periods, place = rng.integers(2, 6, (rows, 1)), np.arange(length)[None, :]
    tokens = np.take_along_axis(rng.integers(2, cfg.model.vocab_size, (rows, 6)), place % periods, axis=1)
    ends = np.sort(rng.integers(2, length, (rows, 2)), axis=1)
    segments = np.where(place < ends[:, :1], 1, np.where(place < ends[:, 1:], 2, 0))
    return make_batch(tokens, segments, mtp_depth=cfg.model.mtp_depth, document_mask=cfg.data.document_mask)


def _probe(cfg: RunConfig, variables: Any, batch: Batch, *, functions: Functions) -> tuple[tuple[Array, ...], Array]:
    states = hidden_states(cfg.model, variables, batch.tokens, batch.positions, batch.segment_ids, functions=functions)
    ids = tuple(routing.ids for routing in (states.routing, states.mtp_routing) if routing is not None)
    logits = unembed(variables["params"]["unembed"], states.hidden, functions=functions)
    at_label = jnp.take_along_axis(logits, batch.labels[0][:, :, None], axis=-1)[:, :, 0]
    losses = batch.weights[0] * (jax.nn.logsumexp(logits, axis=-1) - at_label)
    return ids, losses.sum(axis=1) / jnp.maximum(batch.weights[0].sum(axis=1), 1)


def _is_stable(probe: Callable[..., Any], state: TrainState, batch: Batch, rng: np.random.Generator) -> bool:
    """Whether weights that are off by a millionth choose the same experts: no near-tie decides."""

    def moved(leaf: np.ndarray) -> np.ndarray:
        return (leaf * (1 + 1e-6 * rng.uniform(-1, 1, leaf.shape))).astype(leaf.dtype)

    off = {**state.variables, "params": jax.tree.map(moved, state.params)}
    found, expected = probe(off, batch)[0], probe(state.variables, batch)[0]
    return all(bool((a == b).all()) for a, b in zip(found, expected, strict=True))


def _outcome(cfg: RunConfig, before: TrainState, after: TrainState, report: StepReport, probed: Any) -> Outcome:
    first, second = (jax.tree.map(np.asarray, optax.tree.get(after.opt_state, name)) for name in ("mu", "nu"))
    beta, old = cfg.train.optimizer.beta1, optax.tree.get(before.opt_state, "mu")

    def gradient(new: np.ndarray, old: np.ndarray) -> np.ndarray:
        return (np.asarray(new, np.float64) - beta * np.asarray(old, np.float64)) / (1 - beta)

    loads, dropped = np.asarray(report.terms.load), int(np.asarray(report.terms.dropped).sum())
    routing = loads, jax.tree.map(np.asarray, after.router_state), dropped
    gradients = jax.tree.map(gradient, first, old)
    return Outcome(float(report.loss), gradients, (first, second), *routing, *jax.tree.map(np.asarray, probed))


def _stacked(batch: Batch, micro: int | None = None) -> Batch:
    """`batch` as micro-batches of `micro` rows, in order."""

    def split(leaf: np.ndarray, axis: int) -> np.ndarray:
        size = leaf.shape[axis]
        return np.stack(np.split(leaf, size // (micro or size), axis=axis))

    axes = (0, 1, 1, 0, 0, 0)
    return Batch(*(None if leaf is None else split(leaf, axis) for leaf, axis in zip(batch, axes, strict=True)))
