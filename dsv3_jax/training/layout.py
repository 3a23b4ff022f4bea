"""Which layers each stage of a pipeline has, in slots that look alike on every rank.

A stage is a fixed number of slots, and a slot is attention and a feed-forward: dense, of experts, or idle. MTP modules
take the last slots of the last stage: they read what the layers before them give, and their layer is one like others.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from dsv3_jax.config.check import check
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.parallel.pipeline.placement import Placement
from dsv3_jax.parallel.pipeline.ticks import stages_by_place
from dsv3_jax.planning.flops import forward_flops_by_part
from dsv3_jax.typing import Int

IDLE, MOE, DENSE = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Layout:
    """Tables over stages. The row after the last stage is that of an idle rank."""

    placement: Placement
    num_slots: int
    num_dense_slots: int
    """So many slots from the first are dense on some rank."""
    kind: Int[np.ndarray, "stages_plus_1 slots"]
    layer: Int[np.ndarray, "stages slots"]
    """Of dense layers, MoE layers and MTP modules one after another; 0 where a slot is idle."""
    router: Int[np.ndarray, "stages_plus_1 slots"]
    """Of MoE layers and MTP modules one after another; one after the last where a slot has none."""
    num_routers: int

    @property
    def num_stages(self) -> int:
        return self.placement.num_stages

    def of_ranks(self, of_stages: Int[np.ndarray, "stages slots"]) -> Int[np.ndarray, "P places slots"]:
        """A table over stages as one over ranks and their places."""
        return of_stages[stages_by_place(self.placement)]


def layout_of(cfg: ModelConfig, placement: Placement, *, seq_len: int) -> Layout:
    """Spreads layers so that no stage costs more than need be, in as few slots as hold them.

    Raises:
        ConfigError: there are more stages than layers.
    """
    num_stages, D, depth = placement.num_stages, cfg.num_dense_layers, cfg.mtp_depth
    counts = spread(cfg, num_stages, seq_len=seq_len)
    shape = num_stages + 1, max(*counts[:-1], counts[-1] + depth)
    kind, layer = np.full(shape, IDLE, np.int32), np.zeros(shape, np.int32)
    router = np.full(shape, cfg.num_moe_layers + depth, np.int32)
    first = 0
    for stage, count in enumerate(counts):
        here = np.arange(first, first + count)
        kind[stage, :count] = np.where(here < D, DENSE, MOE)
        layer[stage, :count] = here
        router[stage, :count] = np.where(here < D, router[-1, 0], here - D)
        first += count
    if depth:
        kind[num_stages - 1, -depth:] = MOE
        layer[num_stages - 1, -depth:] = cfg.num_layers + np.arange(depth)
        router[num_stages - 1, -depth:] = cfg.num_moe_layers + np.arange(depth)
    num_dense_slots = int((kind == DENSE).sum(axis=1).max())
    return Layout(placement, shape[1], num_dense_slots, kind, layer[:-1], router, cfg.num_moe_layers + depth)


def spread(cfg: ModelConfig, num_stages: int, *, seq_len: int) -> list[int]:
    """Layers of each stage, in as few slots as hold all, as few of them for dense layers, such that the costliest
    stage costs least.

    Each stage has one at least, but for the last where it has MTP modules; the head is there, too.
    """
    L, depth = cfg.num_layers, cfg.mtp_depth
    check(
        num_stages <= L + (depth > 0),
        f"{num_stages} stages of the pipeline are more than num_layers={L} and MTP have for them; use a lower "
        "parallel.pipe, or schedule='one_f_one_b', which has half the stages of 'dualpipe_v'.",
    )
    num_slots = max(-(-(L + depth) // num_stages), depth)
    found = (_spread(cfg, num_stages, num_slots, dense, seq_len) for dense in range(cfg.num_dense_layers + 1))
    return next(counts for counts in found if counts is not None)


def _spread(cfg: ModelConfig, num_stages: int, num_slots: int, dense_slots: int, seq_len: int) -> list[int] | None:
    """`spread` in so many slots of a stage, of which so many take dense layers; None where these are too few."""
    L, depth = cfg.num_layers, cfg.mtp_depth
    costs, last = _costs(cfg, seq_len)
    total = np.concatenate([[0.0], np.cumsum(costs)])
    # best[n]: (cost of the costliest stage, sum of squares, counts) of the stages so far, with n layers in them.
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for stage in range(num_stages):
        is_last = stage == num_stages - 1
        room = num_slots - depth * is_last
        found: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for before, (worst, squares, counts) in best.items():
            dense_left = max(cfg.num_dense_layers - before, 0)
            most = room if dense_left <= dense_slots else dense_slots
            for count in range(0 if is_last and depth else 1, min(most, L - before) + 1):
                cost = float(total[before + count] - total[before]) + last * is_last
                option = max(worst, cost), squares + cost**2, (*counts, count)
                found[before + count] = min(option, found.get(before + count, option))
        best = found
    return list(best[L][2]) if L in best else None


def _costs(cfg: ModelConfig, seq_len: int) -> tuple[Sequence[float], float]:
    """Operations of each layer, and of what the last stage has beside layers. Looking up embeddings costs none."""
    parts = forward_flops_by_part(cfg, seq_len)
    attention = (parts["mla_projections"] + parts["attention"]) / cfg.num_layers
    dense = attention + parts["dense_ffn"] / max(cfg.num_dense_layers, 1)
    moe = attention + (parts["experts"] + parts["router"]) / max(cfg.num_moe_layers, 1)
    return [dense] * cfg.num_dense_layers + [moe] * cfg.num_moe_layers, parts["head"] + parts["mtp"]
