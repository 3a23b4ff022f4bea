"""What a mesh asks of the model, the batch and the precision that run on it.

Everything here needs the configuration alone, or two whole numbers; what needs devices is in `parallel.mesh`.
"""

import math

from dsv3_jax.config.check import check, divisors, one_of
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.parallel import ParallelConfig
from dsv3_jax.config.train import BatchConfig, TrainConfig

FP8_TILE = 128


def check_mesh(parallel: ParallelConfig, *, model: ModelConfig, train: TrainConfig, precision: str) -> None:
    """Refuses a mesh that does not fit what runs on it.

    Raises:
        ConfigError: names the axis, what it would split, and the sizes that fit.
    """
    _check_experts(parallel, model)
    _check_tensor(parallel, model, precision)
    _check_stages(parallel, model)
    _check_pipeline(parallel, train)
    check_rows(train.batch, data=max(parallel.data, 1), expert=parallel.expert)


def check_rows(batch: BatchConfig, *, data: int, expert: int) -> None:
    """Refuses micro-batches whose sequences cannot be shared equally by `data` x `expert` devices."""
    rows = data * expert
    fitting = [micro for micro in divisors(math.gcd(batch.start, batch.full)) if micro % rows == 0]
    choices = f"train.batch.micro may be {one_of(fitting, near=batch.micro)}, or " if fitting else ""
    check(
        batch.micro % rows == 0,
        f"train.batch.micro={batch.micro} sequences cannot be shared by data {data} x expert {expert} = {rows} "
        f"devices; {choices}data x expert may be {one_of(divisors(batch.micro), near=rows)}.",
    )


def check_streams(streams: int, processes: int) -> None:
    """Refuses streams of data that the processes of a run cannot share equally; those with the same rows count once."""
    check(
        streams % processes == 0,
        f"data.streams={streams} cannot be shared by {processes} processes that make rows of their own; they may be "
        f"{one_of(divisors(streams), near=processes)} (another number of streams is another order of the data).",
    )


def num_stages(parallel: ParallelConfig) -> int:
    """Stages that the layers are cut into: `dualpipe_v` gives two to each rank, one from either end."""
    return parallel.pipe * (2 if parallel.pipe > 1 and parallel.schedule == "dualpipe_v" else 1)


def schedule_note(parallel: ParallelConfig, batch: BatchConfig) -> str | None:
    """What a run logs once at its start when some of its steps have other micro-batches than its schedule takes.

    As `parallel.pipeline.schedule.planned` decides it for each step.
    """
    smallest, needed, is_ramp = batch.start // batch.micro, 2 * parallel.pipe, batch.start < batch.full
    is_short = parallel.schedule != "one_f_one_b" and smallest < needed
    is_odd = parallel.schedule == "dualpipe" and (is_ramp or smallest % 2 == 1)
    if parallel.pipe == 1 or not (is_short or is_odd):
        return None
    takes = f"at least 2 x pipe = {needed}" + (", an even number," if parallel.schedule == "dualpipe" else "")
    return (
        f"parallel.schedule: {parallel.schedule} takes {takes} micro-batches a step; steps of others, from {smallest}, "
        "run in the order of `greedy` on the same ranks."
    )


def _check_experts(parallel: ParallelConfig, model: ModelConfig) -> None:
    num_experts, peers = model.moe.num_experts, parallel.expert
    fitting = [size for size in divisors(num_experts) if size % parallel.expert_nodes == 0]
    check(
        peers == 1 or num_experts % peers == 0,
        f"model.moe.num_experts={num_experts} is not divisible by parallel.expert={peers}; expert may be "
        f"{one_of(fitting or [1], near=peers)}.",
    )


def _check_tensor(parallel: ParallelConfig, model: ModelConfig, precision: str) -> None:
    """Heads and widths are split evenly, under FP8 into whole tiles, so that each is scaled as on one device."""
    size, split = parallel.tensor, _split_by_tensor(model)
    unit = FP8_TILE if precision == "fp8_dsv3" else 1
    fitting = [t for t in divisors(model.mla.num_heads) if all(_is_split(one, t, unit) for one in split.values())]
    choices = f"tensor may be {one_of(sorted({1, *fitting}), near=size)}"
    heads = model.mla.num_heads
    check(heads % size == 0, f"model.mla.num_heads={heads} is not divisible by parallel.tensor={size}; {choices}.")
    for name, width in split.items():
        check(width % size == 0, f"{name}={width} is not divisible by parallel.tensor={size}; {choices}.")
        check(
            size == 1 or _is_split(width, size, unit),
            f"{name}={width} over parallel.tensor={size} leaves {width // size} on each device, which is no multiple "
            f"of {unit}, the tile of precision='fp8_dsv3'; {choices}.",
        )


def _is_split(width: int, size: int, unit: int) -> bool:
    return width % (size * unit) == 0


def _split_by_tensor(model: ModelConfig) -> dict[str, int]:
    """Widths of matrices that `tensor` splits, by the fields that make them."""
    heads, mla, moe = model.mla.num_heads, model.mla, model.moe
    widths = {
        "model.mla.num_heads x qk_head_dim": heads * mla.qk_head_dim,
        "model.mla.num_heads x (nope_head_dim + v_head_dim)": heads * (mla.nope_head_dim + mla.v_head_dim),
        "model.mla.num_heads x v_head_dim": heads * mla.v_head_dim,
    }
    if model.num_dense_layers:
        widths["model.ffn_dim"] = model.ffn_dim
    if model.num_moe_layers or model.mtp_depth:
        widths["model.moe.expert_dim"] = moe.expert_dim
    return widths


def _check_pipeline(parallel: ParallelConfig, train: TrainConfig) -> None:
    """What waits for its backward pass lies in one pool of each device, and a stage's weights are gathered once."""
    if parallel.pipe == 1:
        return
    what = {
        "none": "save weights as they are cast, once for each micro-batch under way",
        "offload": "put on the host what lies in one pool of the device",
    }
    check(
        train.remat not in what,
        f"train.remat={train.remat!r} with parallel.pipe={parallel.pipe} would {what.get(train.remat)}; use "
        "train.remat='paper', 'received' or 'full'.",
    )
    check(
        parallel.gather == "step",
        f"parallel.gather={parallel.gather!r} with parallel.pipe={parallel.pipe}: ranks of a pipeline have the weights "
        "of their stages for a whole step; use gather='step'.",
    )


def _check_stages(parallel: ParallelConfig, model: ModelConfig) -> None:
    stages, blocks = num_stages(parallel), model.num_layers + (model.mtp_depth > 0)
    a_rank = stages // parallel.pipe
    check(
        parallel.pipe == 1 or stages <= blocks,
        f"parallel.pipe={parallel.pipe} with schedule={parallel.schedule!r} has {stages} stages, but the model has "
        f"{blocks} blocks to give them (layers, and MTP as one); pipe may be 1 to {max(blocks // a_rank, 1)}.",
    )
