"""Gradients of a whole batch from a pipeline, and the step around them: one program for any number of micro-batches."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config.run import RunConfig
from dsv3_jax.data.batch import Batch
from dsv3_jax.model.functions import Functions
from dsv3_jax.model.params import ParamSpec, abstract_params
from dsv3_jax.parallel.axes import AXES, PIPE, ROWS, TENSOR
from dsv3_jax.parallel.mesh import size_of
from dsv3_jax.parallel.pipeline.runtime import run
from dsv3_jax.parallel.pipeline.schedule import placement_for
from dsv3_jax.parallel.pipeline.ticks import Sizes, sizes_for, table
from dsv3_jax.training.batches import batch_specs, place
from dsv3_jax.training.chunks import Chunks, Gained, Learned, Weights
from dsv3_jax.training.layout import layout_of
from dsv3_jax.training.optimizer import router_biases
from dsv3_jax.training.sharded import (
    dtype_of_use,
    local_config,
    on_mesh,
    stored_specs,
    summed,
    used_axes,
)
from dsv3_jax.training.slots import weights_of
from dsv3_jax.training.stages import Stage
from dsv3_jax.training.state import TrainState, state_shardings
from dsv3_jax.training.step import Rates, StepReport, Sums, Terms, apply_gradients, denominators_of
from dsv3_jax.typing import Array, Int, Params
from dsv3_kernels.varying import varying_axes, varying_over


class Placed(NamedTuple):
    """A whole batch on the mesh, and how its micro-batches run."""

    batches: Batch
    """Stacked, filled up to the largest number of micro-batches."""
    rows: Int[Array, "ticks P columns"]
    """Of a table of ticks."""
    bounds: Int[Array, "4"]
    """Of its steady run."""
    num_micro_batches: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class PipelineStep:
    """A step as `step.Step` is one; `program` is all of it, with jit's `.lower`."""

    program: Any
    place: Callable[[Batch], Placed]

    def __call__(self, state: TrainState, batches: Batch, rates: Rates) -> tuple[TrainState, StepReport]:
        """The state after one step, and its report; `state` is consumed."""
        return self.program(state, self.place(batches), rates)

    def compile(self, state: TrainState, batches: Batch, rates: Rates) -> None:
        """Compiles what a call with any number of micro-batches needs, and consumes nothing."""
        self.program.lower(state, self.place(batches), rates).compile()


def make_pipeline_step(cfg: RunConfig, mesh: Mesh, functions: Functions) -> PipelineStep:
    """The compiled step of `cfg` on a mesh with a pipeline; it consumes the state it is given."""
    sizes = sizes_for(cfg.parallel.schedule, mesh.shape[PIPE], micro_batches_of(cfg))
    gradients = pipeline_gradients(cfg, mesh, functions, sizes)
    update = jax.named_scope("optimizer")(functools.partial(apply_gradients, cfg=cfg))

    def program(state: TrainState, placed: Placed, rates: Rates) -> tuple[TrainState, StepReport]:
        return update(state, gradients(state, placed, rates), rates)

    compiled = jax.jit(program, donate_argnums=0, out_shardings=(state_shardings(cfg, mesh), None))
    return PipelineStep(compiled, functools.partial(place_all, cfg=cfg, mesh=mesh, sizes=sizes))


def micro_batches_of(cfg: RunConfig) -> range:
    """The numbers of micro-batches that the steps of a run may have."""
    batch = cfg.train.batch
    return range(batch.start // batch.micro, batch.full // batch.micro + 1)


def place_all(batches: Batch, *, cfg: RunConfig, mesh: Mesh, sizes: Sizes) -> Placed:
    """This process's rows of stacked micro-batches on the mesh, with the table of their number."""
    num, most = batches.tokens.shape[0], micro_batches_of(cfg)[-1]
    full = jax.tree.map(lambda leaf: np.pad(leaf, [(0, most - num)] + [(0, 0)] * (leaf.ndim - 1)), batches)
    rows, bounds = table(cfg.parallel.schedule, mesh.shape[PIPE], num, sizes)
    whole, by_rank = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(None, PIPE))
    on_ranks = jax.make_array_from_callback(rows.shape, by_rank, lambda index: rows[index])
    bounds = jax.make_array_from_callback(bounds.shape, whole, lambda index: bounds[index])
    num = jax.make_array_from_callback((), whole, lambda _: np.int32(num))
    return Placed(place(full, mesh, used_axes(mesh, ROWS)), on_ranks, bounds, num)


def pipeline_gradients(
    cfg: RunConfig, mesh: Mesh, functions: Functions, sizes: Sizes
) -> Callable[[TrainState, Placed, Rates], Sums]:
    """Loss, terms and gradients of a whole batch; gradients lie as the state is stored."""
    specs = abstract_params(cfg.model)["params"]
    rows = used_axes(mesh, ROWS)
    placement = placement_for(cfg.parallel.schedule, mesh.shape[PIPE])
    layout = layout_of(cfg.model, placement, seq_len=cfg.train.seq_len)
    stage = Stage(
        local_config(cfg, mesh), layout, on_mesh(functions, cfg, mesh), functions, (PIPE, *rows), used_axes(mesh, AXES)
    )
    bring = functools.partial(
        weights_of, specs=specs, mesh=mesh, layout=layout, rows=stage.rows, everywhere=stage.everywhere
    )

    def of_a_device(params: Params, router_state: Params, placed: Placed, labels: Array, mtp_weight: Array) -> Sums:
        weights = bring(_in_dtype_of_use(params, specs, functions))
        batches, num_rows = varying_over(placed.batches, stage.rows), size_of(mesh, rows)
        balance_share = 1 / (placed.num_micro_batches.astype(jnp.float32) * num_rows)
        biases = jnp.pad(router_biases(router_state), ((0, 1), (0, 0))) if router_state else None
        alpha = cfg.train.auxiliary.balance_weight / mesh.shape[TENSOR]
        chunks = Chunks(stage, weights, biases, batches, labels, mtp_weight, alpha * balance_share)
        x = jnp.zeros((*batches.tokens.shape[1:], cfg.model.model_dim), functions.compute_dtype)
        learned, gained = run(
            placed.rows[:, 0],
            placed.bounds,
            forward=chunks.forward,
            backward=chunks.backward,
            forward_sums=_nothing_learned(stage),
            backward_sums=_nothing_gained(stage, weights),
            x=varying_over(x, stage.rows),
            sizes=sizes,
            placement=placement,
        )
        slots, ends = gained.gradients
        by_place = [jax.tree.map(lambda leaf, at=at: leaf[at], slots) for at in range(len(placement.flows))]
        _, home = jax.vjp(bring, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))
        (gradients,) = home(Weights(tuple(by_place), ends))
        losses, learned = summed(gained.losses, stage.rows), summed(learned, stage.everywhere)
        load, balance, dropped = (each[:-1] for each in learned)
        load, dropped = (count // mesh.shape[TENSOR] for count in (load, dropped))
        terms = Terms(losses[0], losses[1:], balance * balance_share / mesh.shape[TENSOR], load, dropped)
        loss = terms.main + cfg.train.auxiliary.balance_weight * terms.balance.sum()
        loss += mtp_weight * terms.mtp.mean() if cfg.model.mtp_depth else 0.0
        return Sums(loss, terms, gradients)

    stored = stored_specs(specs, mesh)
    whole: Any = PartitionSpec()
    by_rank: Any = PartitionSpec(None, PIPE)

    def gradients(state: TrainState, placed: Placed, rates: Rates) -> Sums:
        of_placed = Placed(batch_specs(placed.batches, rows), by_rank, whole, whole)
        manual = jax.shard_map(
            of_a_device,
            mesh=mesh,
            in_specs=(stored, whole, of_placed, whole, whole),
            out_specs=Sums(whole, whole, stored),
            check_vma=True,
        )
        labels = denominators_of(placed.batches).labels
        return manual(state.params, state.router_state, placed, labels, rates.mtp_weight)

    return gradients


def _in_dtype_of_use(params: Params, specs: Params, functions: Functions) -> Params:
    def cast(path: Any, spec: ParamSpec, leaf: Array) -> Array:
        return leaf.astype(dtype_of_use(path, spec, functions))

    return jax.tree_util.tree_map_with_path(cast, specs, params, is_leaf=lambda leaf: isinstance(leaf, ParamSpec))


def _nothing_learned(stage: Stage) -> Learned:
    l, E = stage.layout.num_routers + 1, stage.cfg.model.moe.num_experts
    nothing = Learned(jnp.zeros((l, E), jnp.int32), jnp.zeros(l, jnp.float32), jnp.zeros(l, jnp.int32))
    return varying_over(nothing, stage.everywhere)


def _nothing_gained(stage: Stage, weights: Weights) -> Gained:
    """Float32 zeros; a leading axis of places for the slots."""

    def zeros(*leaves: Array) -> Array:
        return varying_over(jnp.zeros((len(leaves), *leaves[0].shape), jnp.float32), varying_axes(leaves[0]))

    slots = jax.tree.map(zeros, *weights.slots)
    ends = jax.tree.map(lambda leaf: varying_over(jnp.zeros(leaf.shape, jnp.float32), varying_axes(leaf)), weights.ends)
    losses = varying_over(jnp.zeros(1 + stage.depth, jnp.float32), stage.rows)
    return Gained(losses, Weights(slots, ends))
