"""What a rank of a pipeline has of a model: how often each part is in use, and how many chunks wait in its memory.

All ranks run one program, so each has room for what any of them needs: embedding, head and MTP's own parts, and slots
of layers, as many in each stage as the fullest has.
"""

import functools
from typing import NamedTuple

import jax

from dsv3_jax.config.check import ConfigError
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.run import RunConfig
from dsv3_jax.model.params import ParamSpec, abstract_params

STACKS = ("dense_layers", "moe_layers", "mtp")


class Rank(NamedTuple):
    """Every rank alike."""

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
    if num_ranks == 1:
        return _whole_model(cfg)
    raise ConfigError(f"parallel.pipe={num_ranks}: pipelines are not counted yet; use parallel.pipe=1.")


def _whole_model(cfg: RunConfig) -> Rank:
    """All layers at once, or one at a time, in use; all of them save."""
    model = cfg.model
    dense, moe, depth = model.num_dense_layers, model.num_moe_layers, model.mtp_depth
    chunk = {"layer": dense + moe + depth, "moe": moe + depth, "mlp": dense, "mtp": depth}
    if cfg.parallel.gather == "step":
        return Rank(chunk, chunk, chunks=1, waiting=0, ends=1, how=f"{dense + moe} layers, {depth} MTP modules")
    one = {"layer": 1, "moe": int(moe + depth > 0), "mlp": int(moe + depth == 0), "mtp": int(depth > 0)}
    return Rank(one, chunk, chunks=1, waiting=0, ends=1, how="a layer, and what lies before and after the layers")


def in_use(cfg: RunConfig, rank: Rank) -> list[tuple[str, ParamSpec, int]]:
    """Each parameter with how often a rank has it in use; `spec` without the axis of layers."""
    found: dict[str, tuple[str, ParamSpec, int]] = {}
    for path, spec in leaves(cfg.model, "params"):
        stack, _, rest = path.partition("/")
        if stack in STACKS:
            part, inner = part_of(stack, rest), rest.removeprefix("block/")
            one = ParamSpec(spec.shape[1:], spec.dtype, spec.axes[1:])
            found.setdefault(f"{part}: {inner}", (inner, one, rank.parts[part]))
        else:
            found[path] = path, spec, 1
    return list(found.values())


def part_of(stack: str, rest: str) -> str:
    """The part, as in `Rank.parts`, that a parameter of a stack belongs to."""
    inner = rest.removeprefix("block/")
    if stack == "mtp" and inner == rest:
        return "mtp"
    return {"moe": "moe", "mlp": "mlp"}.get(inner.partition("/")[0], "layer")


@functools.cache
def leaves(model: ModelConfig, tree: str) -> tuple[tuple[str, ParamSpec], ...]:
    """Paths joined by slashes, and shapes, of "params" or "router_state"."""
    specs = abstract_params(model)[tree]
    flat, _ = jax.tree_util.tree_flatten_with_path(specs, is_leaf=lambda node: isinstance(node, ParamSpec))
    return tuple(("/".join(key.key for key in path), spec) for path, spec in flat)
