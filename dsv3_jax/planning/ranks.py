"""What a rank of a pipeline has of a model: how often each part is in use, and how many chunks wait in its memory.

All ranks run one program, so each has room for what any of them needs: embedding, head and MTP's own parts, and slots
of layers, as many in each stage as the fullest has.
"""

import functools
from typing import NamedTuple

import jax

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.run import RunConfig
from dsv3_jax.model.params import ParamSpec, abstract_params
from dsv3_jax.parallel.pipeline.schedule import placement_for
from dsv3_jax.parallel.pipeline.ticks import sizes_for
from dsv3_jax.training.layout import layout_of

STACKS = ("dense_layers", "moe_layers", "mtp")


class Used(NamedTuple):
    """A parameter as a rank has it in use."""

    path: str
    """Of a layer's, from the layer on."""
    spec: ParamSpec
    """Without the axis of layers."""
    count: int
    in_stages: bool
    """It is one of a stage's; others are there once for all stages of the rank."""


class Rank(NamedTuple):
    """Every rank alike."""

    places: int
    """Stages of the rank."""

    parts: dict[str, int]
    """How often each is in use: "layer", attention and norms; "moe", "mlp", the feed-forwards; "mtp"."""
    chunk: dict[str, int]
    """The same of one chunk, a micro-batch in one stage: what is saved of it."""
    chunks: int
    """That wait for their backward pass, the slot that holds nothing included."""
    waiting: int
    """Activations and gradients that have arrived, [B, T, D] each, the slots that hold nothing included."""
    ends: int
    """Chunks of the last stage of which the head's input waits."""
    how: str


def rank_of(cfg: RunConfig, num_ranks: int) -> Rank:
    """Of a pipeline of so many ranks; one rank is the whole model, and a micro-batch its only chunk."""
    model, parallel = cfg.model, cfg.parallel
    if num_ranks == 1:
        return _whole_model(cfg)
    placement = placement_for(parallel.schedule, num_ranks)
    layout = layout_of(model, placement, seq_len=cfg.train.seq_len)
    places = len(placement.stages[0])
    slots, dense = layout.num_slots, layout.num_dense_slots
    chunk = {"layer": slots, "moe": slots * (layout.num_routers > 0), "mlp": dense, "mtp": model.mtp_depth}
    parts = {name: places * count for name, count in chunk.items()} | {"mtp norm": model.mtp_depth}
    sizes = _sizes(parallel.schedule, num_ranks, _counts(cfg, num_ranks))
    how = f"{places} stages of {slots} slots for layers, {dense} of them for dense ones too"
    return Rank(places, parts, chunk, sizes.stored, sizes.arrived + sizes.gradients, sizes.ends, how)


def _whole_model(cfg: RunConfig) -> Rank:
    """All layers at once, or one at a time, in use; all of them save."""
    model = cfg.model
    dense, moe, depth = model.num_dense_layers, model.num_moe_layers, model.mtp_depth
    chunk = {"layer": dense + moe + depth, "moe": moe + depth, "mlp": dense, "mtp": depth}
    if cfg.parallel.gather == "step":
        return Rank(
            1,
            chunk | {"mtp norm": depth},
            chunk,
            chunks=1,
            waiting=0,
            ends=1,
            how=f"{dense + moe} layers, {depth} MTP modules",
        )
    one = {"layer": 1, "moe": int(moe + depth > 0), "mlp": int(moe + depth == 0), "mtp": int(depth > 0)}
    one["mtp norm"] = one["mtp"]
    return Rank(1, one, chunk, chunks=1, waiting=0, ends=1, how="a layer, and what lies before and after the layers")


def _counts(cfg: RunConfig, num_ranks: int) -> frozenset[int]:
    """Numbers of micro-batches that tell what any of the run's needs: beyond twice the ranks only ticks are added."""
    batch = cfg.train.batch
    fewest, most = (-(-sequences // batch.micro) for sequences in (batch.start, batch.full))
    return frozenset(min(most, max(fewest, 2 * num_ranks + more)) for more in (-fewest, -1, 0, 1))


_sizes = functools.cache(sizes_for)


def in_use(cfg: RunConfig, rank: Rank) -> list[Used]:
    """Each parameter with how often a rank has it in use."""
    found: dict[str, Used] = {}
    for path, spec in leaves(cfg.model, "params"):
        stack, _, rest = path.partition("/")
        if stack in STACKS:
            part, inner = part_of(stack, rest), rest.removeprefix("block/")
            one = ParamSpec(spec.shape[1:], spec.dtype, spec.axes[1:])
            found.setdefault(f"{part}: {inner}", Used(inner, one, rank.parts[part], part != "mtp norm"))
        else:
            found[path] = Used(path, spec, 1, in_stages=False)
    return list(found.values())


def part_of(stack: str, rest: str) -> str:
    """The part, as in `Rank.parts`, that a parameter of a stack belongs to."""
    inner = rest.removeprefix("block/")
    if stack == "mtp" and inner == rest:
        return "mtp norm" if rest.startswith("norm/") else "mtp"
    return {"moe": "moe", "mlp": "mlp"}.get(inner.partition("/")[0], "layer")


@functools.cache
def leaves(model: ModelConfig, tree: str) -> tuple[tuple[str, ParamSpec], ...]:
    """Paths joined by slashes, and shapes, of "params" or "router_state"."""
    specs = abstract_params(model)[tree]
    flat, _ = jax.tree_util.tree_flatten_with_path(specs, is_leaf=lambda node: isinstance(node, ParamSpec))
    return tuple(("/".join(key.key for key in path), spec) for path, spec in flat)
