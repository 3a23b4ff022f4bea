"""Schedules as tables of ticks: what every rank does at the same time as all others, and where it finds what it needs.

A tick is at most one forward and one backward of a chunk (a micro-batch in one stage) on every rank, then one exchange
with both neighbours. Places of whatever waits in a rank's memory are decided here, on the host: a program that reads
them from the table serves every schedule and every number of micro-batches.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from dsv3_jax.config.check import check
from dsv3_jax.parallel.pipeline.placement import Placement
from dsv3_jax.parallel.pipeline.schedule import Chunk, Name, Orders, chunks, joined, planned
from dsv3_jax.typing import Array, Int


class Tick(NamedTuple):
    """The columns of a table, for one rank in one tick.

    Slots are indices into the rank's buffers; the last slot of each holds nothing, and is named by who has nothing to
    read or write. An idle forward or backward has the stage `num_stages`.
    """

    f_stage: Int[Array, ""]
    f_place: Int[Array, ""]
    """Which of the rank's stages."""
    f_micro: Int[Array, ""]
    f_input: Int[Array, ""]
    """Slot of the activation that arrived."""
    f_stored: Int[Array, ""]
    """Slot for what the backward pass needs."""
    f_end: Int[Array, ""]
    """Slot for what the last stage's backward pass needs beyond it."""
    b_stage: Int[Array, ""]
    b_place: Int[Array, ""]
    b_micro: Int[Array, ""]
    b_gradient: Int[Array, ""]
    """Slot of the gradient that arrived."""
    b_stored: Int[Array, ""]
    b_end: Int[Array, ""]
    x_from_left: Int[Array, ""]
    """Slot for the activation that the rank before this one sends at the end of the tick."""
    x_from_right: Int[Array, ""]
    """The same of the rank after it; of the last rank: what it sends itself, at the turn of a V."""
    g_from_left: Int[Array, ""]
    g_from_right: Int[Array, ""]


class Sizes(NamedTuple):
    """Of a table and of the buffers that it names, the slot that holds nothing included."""

    ticks: int
    arrived: int
    """Activations that wait for their forward."""
    gradients: int
    """Gradients that wait for their backward."""
    stored: int
    """Chunks between their forward and their backward."""
    ends: int
    """Such chunks of the last stage."""


class Table(NamedTuple):
    """A schedule for one number of micro-batches."""

    rows: Int[np.ndarray, "ticks P columns"]
    """Columns as in `Tick`; rows beyond the schedule's own are idle."""
    bounds: Int[np.ndarray, "4"]
    """0, the steady run's first tick, its end, the end of all. In the steady run every rank has a forward and a
    backward in each tick: forward in place 0 and backward in place 1, then the reverse, an even number of times."""


def table(name: Name, num_ranks: int, num_micro_batches: int, sizes: Sizes) -> Table:
    """The schedule `name` (or `greedy` where there are too few micro-batches for it) in buffers of `sizes`."""
    found, rows = _laid_out(name, num_ranks, num_micro_batches)
    assert all(mine <= given for mine, given in zip(found, sizes, strict=True)), (found, sizes)
    num_stages = planned(name, num_ranks, num_micro_batches).placement.num_stages
    full = np.empty((sizes.ticks, num_ranks, len(Tick._fields)), np.int32)
    full[:] = _idle(num_stages, sizes)
    for column, field in enumerate(Tick._fields):
        limit = getattr(sizes, BUFFER_OF[field]) - 1 if field in BUFFER_OF else None
        here = rows[:, :, column]
        full[: found.ticks, :, column] = here if limit is None else np.where(here < 0, limit, here)
    first, end = _steady_run(full, num_stages)
    return Table(full, np.array([0, first, end, found.ticks], np.int32))


def stages_by_place(placement: Placement) -> Int[np.ndarray, "P places"]:
    """The stages of each rank in the order in which it has them: odd ranks the other way round.

    A micro-batch moves on by a rank in a tick, so in the steady run all ranks then work in the same place at once.
    """
    return np.array([own if rank % 2 == 0 else own[::-1] for rank, own in enumerate(placement.stages)])


def sizes_for(name: Name, num_ranks: int, micro_batches: Iterable[int]) -> Sizes:
    """What tables for any of these numbers of micro-batches need."""
    counts = sorted(set(micro_batches))
    check(bool(counts) and counts[0] > 0, f"micro_batches={counts} must be positive numbers of micro-batches.")
    # Beyond twice the ranks only the number of ticks grows; some schedules are others for odd numbers.
    largest = {max((count for count in counts if count % 2 == odd), default=counts[-1]) for odd in (0, 1)}
    telling = largest | {count for count in counts if count <= 2 * num_ranks + 1}
    found = [_laid_out(name, num_ranks, count)[0] for count in telling]
    return Sizes(*(max(column) for column in zip(*found, strict=True)))


BUFFER_OF = {
    "f_input": "arrived",
    "x_from_left": "arrived",
    "x_from_right": "arrived",
    "b_gradient": "gradients",
    "g_from_left": "gradients",
    "g_from_right": "gradients",
    "f_stored": "stored",
    "b_stored": "stored",
    "f_end": "ends",
    "b_end": "ends",
}
"""The buffer that a column is a slot of."""


def ticks_of(orders: Orders, placement: Placement) -> list[list[list[Chunk]]]:
    """[tick][rank] -> the F and the B to run: each task as soon as what it needs was made in an earlier tick.

    Backward passes are whole. Neighbouring tasks of a rank, an F and a B, share a tick if both can run and the rank
    then holds no more chunks than its order does.
    """
    lists = [[chunks(task) for task in rank] for rank in joined(orders)]
    room = max(_peak(rank) for rank in lists)
    last = placement.num_stages - 1
    done: dict[tuple[str, int, int, int], int] = {}
    following, live = [0] * placement.num_ranks, [0] * placement.num_ranks
    found: list[list[list[Chunk]]] = []

    def needs(rank: int, chunk: Chunk) -> list[tuple[str, int, int, int]]:
        kind, direction, mb = chunk
        flow, stage = placement.flows[direction], placement.stages[rank][direction]
        if kind == "F":
            return [("F", flow, stage - 1, mb)] * (stage > 0)
        return [("F", flow, stage, mb), *[("B", flow, stage + 1, mb)] * (stage < last)]

    def can_run(rank: int, task: list[Chunk]) -> bool:
        now = len(found)
        return all(done.get(need, now) < now for chunk in task for need in needs(rank, chunk))

    while any(following[rank] < len(tasks) for rank, tasks in enumerate(lists)):
        tick: list[list[Chunk]] = []
        for rank, tasks in enumerate(lists):
            here = tasks[following[rank] : following[rank] + 2]
            task = here[0] if here and can_run(rank, here[0]) else []
            following[rank] += bool(task)
            if task and len(here) == 2 and live[rank] < room and can_run(rank, here[1]):
                both = {chunk.kind for chunk in task + here[1]}
                if len(both) == len(task + here[1]):
                    task = task + here[1]
                    following[rank] += 1
            tick.append(sorted(task, key=lambda chunk: chunk.kind == "B"))
        for rank, task in enumerate(tick):
            for kind, direction, mb in task:
                live[rank] += 1 if kind == "F" else -1
                done[kind, placement.flows[direction], placement.stages[rank][direction], mb] = len(found)
        check(any(tick), f"the orders of a pipeline of {placement.num_ranks} ranks wait for each other for ever.")
        found.append(tick)
    return found


def _peak(tasks: list[list[Chunk]]) -> int:
    """Most chunks that a rank holds between their F and their B."""
    live, most = 0, 0
    for task in tasks:
        for kind, _, _ in sorted(task, key=lambda chunk: chunk.kind == "B"):
            live += 1 if kind == "F" else -1
            most = max(most, live)
    return most


class _Slots:
    """Slots of one buffer of one rank: the lowest free one each time."""

    def __init__(self) -> None:
        self.taken: dict[tuple[int, int], int] = {}
        self.size = 0

    def take(self, key: tuple[int, int]) -> int:
        free = next(slot for slot in range(len(self.taken) + 1) if slot not in self.taken.values())
        self.taken[key] = free
        self.size = max(self.size, free + 1)
        return free


def _laid_out(name: Name, num_ranks: int, num_micro_batches: int) -> tuple[Sizes, np.ndarray]:
    """Rows of a table whose slots that hold nothing are -1, and the sizes that they need."""
    placement, orders, _ = planned(name, num_ranks, num_micro_batches)
    ticks, last = ticks_of(orders, placement), placement.num_stages - 1
    columns = {field: index for index, field in enumerate(Tick._fields)}
    rows = np.full((len(ticks), num_ranks, len(columns)), -1, np.int32)
    rows[:, :, [columns["f_stage"], columns["b_stage"]]] = placement.num_stages
    for field in ("f_place", "f_micro", "b_place", "b_micro"):
        rows[:, :, columns[field]] = 0
    buffers = {name: [_Slots() for _ in range(num_ranks)] for name in ("arrived", "gradients", "stored", "ends")}
    before = [sum(placement.count(f, num_micro_batches) for f in range(flow)) for flow in placement.flows]

    for now, tick in enumerate(ticks):
        sent: list[tuple[int, str, int, int, int]] = []
        for rank, task in enumerate(tick):
            freed = []
            for kind, direction, mb in task:
                stage, key, side = placement.stages[rank][direction], (direction, mb), kind.lower()
                row = rows[now, rank]
                place = direction if rank % 2 == 0 else len(placement.flows) - 1 - direction
                values = {"stage": stage, "place": place, "micro": before[direction] + mb}
                waits, has_input = ("arrived", stage > 0) if kind == "F" else ("gradients", stage < last)
                if has_input:
                    values["input" if kind == "F" else "gradient"] = buffers[waits][rank].taken.pop(key)
                for buffer in ("stored", *["ends"] * (stage == last)):
                    slots = buffers[buffer][rank]
                    values[buffer.removesuffix("s")] = slots.take(key) if kind == "F" else slots.taken[key]
                    freed += [(slots, key)] * (kind == "B")
                for field, value in values.items():
                    row[columns[f"{side}_{field}"]] = value
                goes_to = stage + 1 if kind == "F" else stage - 1
                if 0 <= goes_to <= last:
                    sent.append((rank, kind, *placement.home(placement.flows[direction], goes_to), mb))
            for slots, key in freed:
                del slots.taken[key]
        for rank, kind, other, direction, mb in sent:
            buffer, letter = ("arrived", "x") if kind == "F" else ("gradients", "g")
            side = "left" if rank < other else "right"
            slot = buffers[buffer][other].take((direction, mb))
            rows[now, other, columns[f"{letter}_from_{side}"]] = slot
    most = {name: 1 + max(slots.size for slots in buffer) for name, buffer in buffers.items()}
    return Sizes(len(ticks), **most), rows


def _steady_run(rows: Int[np.ndarray, "ticks P columns"], num_stages: int) -> tuple[int, int]:
    """First tick and end of the longest run in which all ranks do the same; (0, 0) if there is none."""
    f_stage, b_stage, f_place, b_place = (
        rows[:, :, Tick._fields.index(field)] for field in ("f_stage", "b_stage", "f_place", "b_place")
    )
    is_full = ((f_stage < num_stages) & (b_stage < num_stages) & (f_place != b_place)).all(axis=1)
    is_like = [is_full & (f_place == place).all(axis=1) for place in (0, 1)]
    best = 0, 0
    for first in range(len(rows)):
        end = first
        while end + 2 <= len(rows) and is_like[0][end] and is_like[1][end + 1]:
            end += 2
        best = max(best, (first, end), key=lambda run: run[1] - run[0])
    return best


def _idle(num_stages: int, sizes: Sizes) -> list[int]:
    """The row of a rank with nothing to do."""
    return [
        getattr(sizes, BUFFER_OF[field]) - 1 if field in BUFFER_OF else num_stages * field.endswith("stage")
        for field in Tick._fields
    ]
