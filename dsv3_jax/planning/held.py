"""What the most loaded device of a mesh holds during a training step, by class, counted from shapes."""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dsv3_jax.config.run import RunConfig
from dsv3_jax.model.functions import functions_for
from dsv3_jax.model.layers import PAPER, RECEIVED
from dsv3_jax.model.params import ParamSpec
from dsv3_jax.parallel.axes import ROWS
from dsv3_jax.parallel.mesh import size_of
from dsv3_jax.parallel.sharding import Stored, store
from dsv3_jax.planning.memory import traced
from dsv3_jax.planning.ranks import Rank, in_use, leaves, rank_of
from dsv3_jax.planning.saved import INPUT, Work, rows_of, saved_by_layer, work_of

MASTERS, MOMENTS, USED, GRADIENTS = "stored masters", "moments", "weights in use", "gradients"
SAVED, WAITING, HEAD = "stored activations", "waiting between stages", "head and loss"
EXCHANGE, LAYER, BATCH = "exchange buffers", "a layer at work", "batch and router biases"
STAGE = "a stage at work"

Leaves = Sequence[tuple[str, ParamSpec]]


class Sizes(NamedTuple):
    """A mesh without devices: all that `store` asks of one."""

    shape: dict[str, int]


class Line(NamedTuple):
    """One class."""

    name: str
    size: int
    """Bytes."""
    how: str
    """What it is made of, and what was assumed."""


class Copies(NamedTuple):
    """A parameter that several devices store alike."""

    path: str
    elements: int
    """Beyond one of each, on all devices together."""


class Held(NamedTuple):
    """What the most loaded device holds."""

    lines: tuple[Line, ...]
    parameters: int
    """Of the model, router biases too."""

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(line.size for line in self.lines)

    def of(self, name: str) -> int:
        """Bytes of a class."""
        return sum(line.size for line in self.lines if line.name == name)


def held(cfg: RunConfig, shape: dict[str, int]) -> Held:
    """Counts a step of `cfg` on a mesh of this shape, with as many micro-batches as a full batch has."""
    mesh, rank = Sizes(shape), rank_of(cfg, shape["pipe"])
    params, biases = leaves(cfg.model, "params"), leaves(cfg.model, "router_state")
    lines = [*_stored(cfg, params, mesh), *_weights(cfg, rank, mesh), *_activations(cfg, rank, mesh)]
    lines.append(_batch(cfg, biases, mesh))
    parameters = sum(math.prod(spec.shape) for _, spec in [*params, *biases])
    return Held(tuple(line for line in lines if line.size), parameters)


def copies(cfg: RunConfig, shape: dict[str, int]) -> Iterator[Copies]:
    """Parameters that several devices store alike: no dimension lets itself be split any further."""
    mesh, devices = Sizes(shape), math.prod(shape.values())
    for path, spec in leaves(cfg.model, "params"):
        times = devices * _local(spec.shape, _stored_as(spec, mesh).spec, mesh) // math.prod(spec.shape)
        if times > 1:
            yield Copies(path, (times - 1) * math.prod(spec.shape))
    for path, spec in leaves(cfg.model, "router_state"):
        yield Copies(path, (devices - 1) * math.prod(spec.shape))


def _stored(cfg: RunConfig, params: Leaves, mesh: Sizes) -> Iterator[Line]:
    stored = sum(_local(spec.shape, _stored_as(spec, mesh).spec, mesh) for _, spec in params)
    param, moment = jnp.dtype(functions_for(cfg.precision).param_dtype), jnp.dtype(cfg.moment_dtype)
    yield Line(MASTERS, stored * param.itemsize, f"{stored:,} parameters in {param}, split over what would have copies")
    yield Line(MOMENTS, 2 * stored * moment.itemsize + 4, f"two of each in {moment}, split alike; AdamW's count")


def _weights(cfg: RunConfig, rank: Rank, mesh: Sizes) -> Iterator[Line]:
    """In use, and their gradients."""
    wide = jnp.dtype(functions_for(cfg.precision).compute_dtype).itemsize
    elements = size = of_stages = 0
    for used in in_use(cfg, rank):
        local = used.count * _local(used.spec.shape, _stored_as(used.spec, mesh).used, mesh)
        width = 4 if len(used.spec.shape) == 1 or "router" in used.path else wide
        elements, size = elements + local, size + local * width
        of_stages += local * width * used.in_stages
    yield Line(USED, size, f"{elements:,} parameters: {rank.how}")
    if mesh.shape["pipe"] > 1:
        yield Line(GRADIENTS, 4 * elements, "float32 of all weights in use, summed over micro-batches")
        how = "its weights, chosen of two, and gradients before they are added" if rank.places > 1 else "its gradients"
        yield Line(STAGE, of_stages // rank.places * min(rank.places, 2), how)
        return
    stored = sum(_local(spec.shape, _stored_as(spec, mesh).spec, mesh) for _, spec in leaves(cfg.model, "params"))
    sums = 1 + (cfg.train.batch.full > cfg.train.batch.micro)
    how = f"of the weights in use, and {sums} float32 of each stored parameter"
    yield Line(GRADIENTS, size + 4 * sums * stored, how)


def _activations(cfg: RunConfig, rank: Rank, mesh: Sizes) -> Iterator[Line]:
    """What waits for the backward pass, and what one chunk works with; all of it but the first two is an estimate."""
    work, model = work_of(cfg, mesh), cfg.model
    wide = jnp.dtype(functions_for(cfg.precision).compute_dtype).itemsize
    state = work.tokens * model.model_dim * wide
    chunk, how = _chunk(cfg, rank, work)
    yield Line(SAVED, rank.chunks * chunk, f"{rank.chunks} chunks of {chunk:,} bytes: {how}")
    passing = rank.waiting + rank.ends * (1 + model.mtp_depth)
    yield Line(WAITING, passing * state, f"{passing} states of {state:,} bytes between stages and before the head")
    if work.hops:
        buffers = 4 * work.received * model.model_dim * wide
        yield Line(EXCHANGE, buffers, f"{work.received:,} tokens arrive; what is sent and received, both ways")
    yield Line(LAYER, *_layer_at_work(cfg, work, wide))
    chunk_tokens = work.tokens // cfg.train.seq_len * min(cfg.train.loss_chunk_size, cfg.train.seq_len)
    logits = chunk_tokens * model.vocab_size * (4 + 4 + wide)
    head = 4 * model.model_dim * model.vocab_size
    how = f"logits of {chunk_tokens} tokens, three times; float32 gradient of the head, {head:,}"
    yield Line(HEAD, logits + head, how)


def _chunk(cfg: RunConfig, rank: Rank, work: Work) -> tuple[int, str]:
    """Bytes that one chunk saves, and of what."""
    of_moe, of_dense = (_saved(cfg, work, is_moe=is_moe) for is_moe in (True, False))
    both = set(of_moe) & set(of_dense) - {"ffn_gate_up"}
    attention = sum(of_dense[name] for name in both)
    sizes = {"layer": attention, "moe": sum(of_moe.values()) - attention, "mlp": sum(of_dense.values()) - attention}
    sizes["mtp"] = of_dense.get("mla_added", 0)  # as large as "mtp_joined", and saved when that is
    if rank.chunks > 1 and "experts_plan" in of_moe:  # whose a block of rows is never differs, so no chunk stores it
        sizes["moe"] -= 4 * sum(hop.peers for hop in work.hops)
    parts = {name: rank.chunk[name] * size for name, size in sizes.items() if rank.chunk[name] * size}
    whether_last = int(rank.chunks > 1 and rank.chunk["mtp"] > 0)
    how = " + ".join(f"{size:,} of {rank.chunk[name]} {name}" for name, size in parts.items())
    return sum(parts.values()) + whether_last, how


def _saved(cfg: RunConfig, work: Work, *, is_moe: bool) -> dict[str, int]:
    """What a layer saves, by name, as `train.remat` says; "none" is read off a trace, of the experts of one device."""
    if cfg.train.remat == "none":
        shape = {"rows": work.tokens // cfg.train.seq_len, "seq_len": cfg.train.seq_len}
        layer = traced(cfg.model, functions_for(cfg.precision), **shape, is_moe=is_moe, remat="none")
        return {f"everything, {is_moe=}": sum(tensor.size * count for tensor, count in layer.held.items())}
    sizes = saved_by_layer(cfg.model, cfg.precision, work, is_moe=is_moe)
    names = {"received": RECEIVED, "full": (), "offload": ()}.get(cfg.train.remat, PAPER)
    return {name: size for name, size in sizes.items() if name == INPUT or name in names}


def _layer_at_work(cfg: RunConfig, work: Work, wide: int) -> tuple[int, str]:
    """The larger of attention and feed-forward, both passes; without "paper" what that would save is made here."""
    model, mla = cfg.model, cfg.model.mla
    rows, _ = rows_of(work, is_fp8=cfg.precision == "fp8_dsv3")
    of_head, of_row = 2 * (mla.qk_head_dim + mla.v_head_dim), model.model_dim + 3 * model.moe.expert_dim // work.sharers
    attention = 2 * work.tokens * mla.num_heads // work.sharers * of_head * wide
    dense = work.tokens * 2 * (model.model_dim + 3 * model.ffn_dim // work.sharers) * wide
    size, how = (
        max(attention, 2 * rows * of_row * wide, dense),
        f"{rows:,} rows of experts, or attention, and gradients",
    )
    if cfg.train.remat not in ("received", "full"):
        return size, how
    return size + sum(
        saved_by_layer(model, cfg.precision, work, is_moe=True).values()
    ), f"{how}; what it computes again"


def _batch(cfg: RunConfig, biases: Leaves, mesh: Sizes) -> Line:
    """Of a full batch, all micro-batches, on every rank of the pipeline."""
    tokens = cfg.train.batch.full // size_of(mesh, ROWS) * cfg.train.seq_len
    depths, masks = cfg.model.mtp_depth + 1, 2 * cfg.data.document_mask
    size = tokens * 4 * (1 + 2 * depths + masks) + 4 * sum(math.prod(spec.shape) for _, spec in biases)
    return Line(BATCH, size, f"{tokens:,} tokens, their labels and weights at {depths} depths")


def _stored_as(spec: ParamSpec, mesh: Sizes) -> Stored:
    """`store`, which a search of plans asks the same of again and again."""
    return _cached_store(spec.shape, spec.axes, tuple(mesh.shape.items()))


@functools.cache
def _cached_store(shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: tuple[tuple[str, int], ...]) -> Stored:
    return store(ParamSpec(shape, jnp.dtype(jnp.float32), axes), Sizes(dict(mesh)))


def _local(shape: tuple[int, ...], spec: PartitionSpec, mesh: Sizes) -> int:
    """Elements of one device's part of an array."""
    parts = 1
    for axes in spec:
        parts *= size_of(mesh, (axes,) if isinstance(axes, str) else axes or ())
    return math.prod(shape) // parts
