"""Schedules of a pipeline as data: for each rank the list of its tasks, in order.

Tasks of a rank are tuples; `direction` is 0 or 1 (see `Placement`), `mb` a micro-batch:

    ("F", direction, mb)            forward of a chunk (a micro-batch in one stage)
    ("B", direction, mb)            its whole backward
    ("I", direction, mb)            its part that gives the gradient of the chunk's input, which another rank needs
    ("W", direction, mb)            the rest: the gradient of the weights, which nobody waits for
    ("FB", dirF, mbF, dirB, mbB)    an F and a B in one, so that one computes while the other communicates

Each schedule is a table of phases: so many times these tasks. `phases` gives the table to print it, `dualpipe` and the
others unroll it. Nothing here says when a task runs: see `simulate.py`.
"""

import collections
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

from dsv3_jax.config.check import check
from dsv3_jax.parallel.pipeline.placement import Placement

Task: TypeAlias = tuple[str, int, int] | tuple[str, int, int, int, int]
Orders: TypeAlias = list[list[Task]]
"""One list a rank."""
Name = Literal["dualpipe_v", "dualpipe", "one_f_one_b", "zero_bubble", "gpipe"]


class Chunk(NamedTuple):
    """One part of a task: what it does (F, B, I or W) with which chunk of the rank."""

    kind: str
    direction: int
    mb: int


def chunks(task: Task) -> list[Chunk]:
    """The one or two parts of a task."""
    if len(task) == 5:
        _, f_direction, f_mb, b_direction, b_mb = task
        return [Chunk("F", f_direction, f_mb), Chunk("B", b_direction, b_mb)]
    return [Chunk(*task)]


def label(task: Task) -> str:
    """A task as it is written: F0.3, or F0.9&B1.6 for a pair."""
    return "&".join(f"{kind}{direction}.{mb}" for kind, direction, mb in chunks(task))


class Phase(NamedTuple):
    """So many times these tasks.

    Tasks are "F own", "B other", "I own", … and "F own & B other" for a pair; each takes the next micro-batch of its
    direction. "W" takes the chunk whose I is the oldest. "own" is the direction in whose first half the rank lies.
    """

    purpose: str
    repeats: int
    tasks: tuple[str, ...]


def dualpipe(num_stages: int, num_microbatches: int) -> Orders:
    """DualPipe: micro-batches enter at both ends, half of them each; num_stages ranks, each with two stages.

    Raises:
        ConfigError: num_stages or num_microbatches is odd, or there are fewer micro-batches than 2 num_stages.
    """
    placement = Placement.bidirectional(num_stages)
    least = 2 * num_stages
    check(
        num_microbatches >= least and num_microbatches % 2 == 0,
        f"num_microbatches={num_microbatches} must be even and at least 2 x {num_stages} ranks for DualPipe; "
        f"use {max(least, num_microbatches + 1)} or `greedy`.",
    )
    return _unrolled("dualpipe", placement, num_microbatches)


def dualpipe_v(num_stages: int, num_microbatches: int) -> Orders:
    """DualPipeV: DualPipe's first half folded into a V; num_stages / 2 ranks, each with two stages.

    Raises:
        ConfigError: num_stages is odd, or there are fewer micro-batches than stages.
    """
    check(
        num_stages >= 2 and num_stages % 2 == 0,
        f"num_stages={num_stages} must be even for DualPipeV, two on each rank; use {max(2, num_stages + 1)}.",
    )
    check(
        num_microbatches >= num_stages,
        f"num_microbatches={num_microbatches} must be at least 2 x {num_stages // 2} ranks for DualPipeV; "
        f"use {num_stages} or `greedy`.",
    )
    return _unrolled("dualpipe_v", Placement.v(num_stages // 2), num_microbatches)


def one_f_one_b(num_stages: int, num_microbatches: int) -> Orders:
    """1F1B: a rank alternates F and B as soon as the first B arrives; one stage a rank."""
    return _unrolled("one_f_one_b", Placement.linear(num_stages), num_microbatches)


def zero_bubble(num_stages: int, num_microbatches: int) -> Orders:
    """ZB1P: 1F1B with weight gradients put off into the wait at the end, at the same number of live chunks."""
    return _unrolled("zero_bubble", Placement.linear(num_stages), num_microbatches)


def gpipe(num_stages: int, num_microbatches: int) -> Orders:
    """GPipe: all F, then all B; one stage a rank, and as many live chunks as micro-batches."""
    return _unrolled("gpipe", Placement.linear(num_stages), num_microbatches)


def placement_for(name: Name, num_ranks: int) -> Placement:
    """Where the stages of a schedule lie on so many ranks."""
    if name == "dualpipe_v":
        return Placement.v(num_ranks)
    return Placement.bidirectional(num_ranks) if name == "dualpipe" else Placement.linear(num_ranks)


class Planned(NamedTuple):
    """What a pipeline of some depth runs for some number of micro-batches."""

    placement: Placement
    orders: Orders
    is_greedy: bool
    """The schedule of this name does not allow this number, so `greedy` runs on the same placement."""


def planned(name: Name, num_ranks: int, num_microbatches: int) -> Planned:
    """The schedule `name` on so many ranks, or `greedy` where it does not allow the number of micro-batches."""
    placement = placement_for(name, num_ranks)
    is_short = name in ("dualpipe", "dualpipe_v") and num_microbatches < 2 * num_ranks
    if is_short or (name == "dualpipe" and num_microbatches % 2):
        return Planned(placement, greedy(placement, num_microbatches), is_greedy=True)
    return Planned(placement, _unrolled(name, placement, num_microbatches), is_greedy=False)


def phases(name: Name, *, rank: int, num_ranks: int, num_microbatches: int) -> list[Phase]:
    """The table of phases of one rank; phases of no repeats are left out."""
    if name == "dualpipe":
        table = _dualpipe_phases(min(rank, num_ranks - 1 - rank), num_ranks // 2, num_microbatches // 2)
    elif name == "dualpipe_v":
        table = _dualpipe_phases(rank, num_ranks, num_microbatches)
    else:
        table = _linear_phases(name, rank, num_ranks, num_microbatches)
    return [phase for phase in table if phase.repeats]


def _dualpipe_phases(h: int, H: int, m: int) -> list[Phase]:
    """h: ranks between this one and the nearer end. H: ranks of one half. m: micro-batches of one direction."""
    to_middle = H - h - 1
    is_middle, is_odd = to_middle == 0, h % 2
    whole = (h + 1) // 2
    steady = ("F own & B other", "F other & B own")
    return [
        Phase("fill with the own direction", 2 * to_middle, ("F own",)),
        Phase("fill with both", h + 1, ("F own", "F other")),
        Phase("the first gradients are back, and passed on at once", to_middle, ("I other", "W", "F other")),
        Phase("the middle rank has nothing to overlap yet", int(is_middle), ("F own", "B other", steady[1])),
        Phase("steady run", m - 2 * H + h + 1 - is_middle, steady),
        Phase("the own direction has no forward left", to_middle, ("B other", "F other & B own")),
        Phase("drain", whole, ("B other", "B own")),
        Phase("drain, weight gradients are put off from half way on", 1 - is_odd, ("B other", "I own")),
        Phase("drain, weight gradients are put off", h + 1 - whole - (1 - is_odd), ("I other", "I own")),
        Phase("weight gradients fill the wait for the last gradients", to_middle, ("W", "I own")),
        Phase("weight gradients that are left", h + 1, ("W",)),
    ]


def _linear_phases(name: Name, rank: int, P: int, M: int) -> list[Phase]:
    if name == "gpipe":
        return [Phase("all forward", M, ("F own",)), Phase("all backward", M, ("B own",))]
    ahead = min(P - 1 - rank, M)
    if name == "one_f_one_b":
        return [
            Phase("fill", ahead, ("F own",)),
            Phase("one F, one B", M - ahead, ("F own", "B own")),
            Phase("drain", ahead, ("B own",)),
        ]
    late = min(rank, M - ahead)
    return [
        Phase("fill", ahead, ("F own",)),
        Phase("weight gradients are put off, as long as 1F1B's memory allows", late, ("F own", "I own")),
        Phase("steady run", M - ahead - late, ("F own", "I own", "W")),
        Phase("weight gradients fill the wait for gradients", ahead, ("I own", "W")),
        Phase("weight gradients that are left", late, ("W",)),
    ]


def _unrolled(name: Name, placement: Placement, num_microbatches: int) -> Orders:
    check(num_microbatches >= 1, f"num_microbatches={num_microbatches} must be at least 1.")
    P = placement.num_ranks
    tables = [phases(name, rank=rank, num_ranks=P, num_microbatches=num_microbatches) for rank in range(P)]
    is_mirrored = max(placement.flows) > 0
    return [_tasks(table, own=int(is_mirrored and rank >= P // 2)) for rank, table in enumerate(tables)]


def _tasks(table: Sequence[Phase], *, own: int) -> list[Task]:
    """The tasks of one rank: each takes the next micro-batch of its direction."""
    direction_of = {"own": own, "other": 1 - own}
    following: collections.Counter[tuple[str, int]] = collections.Counter()
    put_off: collections.deque[tuple[int, int]] = collections.deque()

    def chunk(text: str) -> Chunk:
        kind, _, side = text.partition(" ")
        if kind == "W":
            return Chunk("W", *put_off.popleft())
        direction = direction_of[side]
        count = ("F" if kind == "F" else "B", direction)
        mb = following[count]
        following[count] += 1
        if kind == "I":
            put_off.append((direction, mb))
        return Chunk(kind, direction, mb)

    texts = [text for phase in table for _ in range(phase.repeats) for text in phase.tasks]
    return [_task([chunk(part) for part in text.split(" & ")]) for text in texts]


def _task(parts: Sequence[Chunk]) -> Task:
    """One chunk, or an F and a B as a pair."""
    (kind, direction, mb), *pair = parts
    return ("FB", direction, mb, pair[0].direction, pair[0].mb) if pair else (kind, direction, mb)


def greedy(placement: Placement, num_microbatches: int) -> Orders:
    """A schedule for any number of micro-batches on any placement: each rank takes what is ready, deepest stage first.

    Made tick by tick: in each, a rank runs an F, a B, or both as a pair. It holds at most `num_stages` chunks (and one
    more for a second stage), as DualPipe does. One place is reserved for each deeper stage of the rank, so the last
    stage can always run, hence the one before it, and so on: it never waits for ever.
    """
    check(num_microbatches >= 1, f"num_microbatches={num_microbatches} must be at least 1.")
    ranks, directions = range(placement.num_ranks), range(len(placement.flows))
    last, room = placement.num_stages - 1, placement.num_stages + len(directions) - 1
    counts = [placement.count(flow, num_microbatches) for flow in placement.flows]
    home = {(placement.flows[d], placement.stages[rank][d]): (rank, d) for rank in ranks for d in directions}
    ran = {(kind, rank, direction): 0 for kind in "FB" for rank in ranks for direction in directions}

    def able(kind: str, rank: int, direction: int) -> bool:
        """Whether a rank's next F or B in this direction can run."""
        flow, stage, mb = placement.flows[direction], placement.stages[rank][direction], ran[kind, rank, direction]
        if kind == "B":
            return mb < ran["F", rank, direction] and (stage == last or mb < ran["B", *home[flow, stage + 1]])
        live = sum(ran["F", rank, d] - ran["B", rank, d] for d in directions)
        reserved = sum(other > stage for other in placement.stages[rank])
        has_input = stage == 0 or mb < ran["F", *home[flow, stage - 1]]
        return mb < counts[direction] and has_input and live + reserved < room

    def deepest(kind: str, rank: int) -> Chunk | None:
        """The F or B to run, if any can."""
        by_depth = sorted(directions, key=lambda d: -placement.stages[rank][d])
        return next((Chunk(kind, d, ran[kind, rank, d]) for d in by_depth if able(kind, rank, d)), None)

    orders: Orders = [[] for _ in ranks]
    while any(ran["B", rank, d] < counts[d] for rank in ranks for d in directions):
        tick = [[chunk for kind in "FB" if (chunk := deepest(kind, rank))] for rank in ranks]
        for rank, both in enumerate(tick):
            if both:
                orders[rank].append(_task(both))
            for kind, direction, _ in both:
                ran[kind, rank, direction] += 1
    return orders


def joined(orders: Orders) -> Orders:
    """The same orders with each backward in one: I becomes B, W is left out."""
    return [[("B", task[1], task[2]) if task[0] == "I" else task for task in rank if task[0] != "W"] for rank in orders]
