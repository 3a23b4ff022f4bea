"""When the tasks of a schedule run: starts, idle time and live chunks of each rank, from what each task costs.

Sending takes no time. A task starts once its rank is free and what it needs is there; nothing else is assumed, so task
lists that cannot run to the end are found here, on a laptop.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from dsv3_jax.config.check import check
from dsv3_jax.parallel.pipeline.placement import Placement
from dsv3_jax.parallel.pipeline.schedule import Chunk, Orders, Task, chunks, label


class DeadlockError(ValueError):
    """Task lists of which one waits for what never comes."""


@dataclass(frozen=True)
class Costs:
    """Time of each kind of task, in any unit."""

    F: float = 1.0
    B: float = 2.0
    """A whole backward."""
    W: float = 1.0
    """Its weight gradients; the rest, I, is B - W."""
    FB: float = 3.0
    """A pair, which overlaps: F + B if nothing is gained."""

    def __post_init__(self) -> None:
        named = f"F={self.F}, B={self.B}, W={self.W}, FB={self.FB}"
        check(min(self.F, self.B, self.W, self.FB) > 0, f"costs {named} must all be above 0.")
        check(self.W < self.B, f"costs {named}: W is a part of B; give a W below {self.B}.")

    def of(self, kind: str) -> float:
        """Of a task's first entry."""
        return {"F": self.F, "B": self.B, "I": self.B - self.W, "W": self.W, "FB": self.FB}[kind]


@dataclass(frozen=True)
class Simulation:
    """The times of one step."""

    start: list[list[float]]
    """[rank][task]."""
    end: list[list[float]]
    makespan: float
    bubble: list[float]
    """Idle time of each rank within the makespan."""
    peak_live: list[int]
    """Most chunks that each rank holds at once; see `peak_live`."""


def simulate(orders: Orders, costs: Costs, placement: Placement) -> Simulation:
    """Runs task lists as early as their needs allow.

    Raises:
        DeadlockError: names the rank and the task that can never run, or the chunk whose gradient no task takes.
    """
    start, end = _times(orders, placement, costs.of)
    makespan = max(times[-1] if times else 0.0 for times in end)
    busy = [sum(costs.of(task[0]) for task in tasks) for tasks in orders]
    return Simulation(start, end, makespan, [makespan - own for own in busy], [peak_live(tasks) for tasks in orders])


def bubble_bound(name: str, num_stages: int, costs: Costs) -> float:
    """Idle time of a rank by the report's table 2, for these stages.

    Exact where W = F and FB = F + B; otherwise middle ranks have it and the others less.
    """
    if name in ("dualpipe", "dualpipe_v"):
        return (num_stages / 2 - 1) * (costs.FB + costs.B - 3 * costs.W)
    spared = 2 * costs.W if name == "zero_bubble" else 0.0
    return (num_stages - 1) * (costs.F + costs.B - spared)


def peak_live(tasks: list[Task]) -> int:
    """Most chunks that a rank holds at once: each from its F to its B or W. In a pair F comes first."""
    live = peak = 0
    for task in tasks:
        for kind, _, _ in chunks(task):
            live += {"F": 1, "I": 0}.get(kind, -1)
            peak = max(peak, live)
    return peak


def ticks(orders: Orders, placement: Placement) -> list[list[Task | None]]:
    """Task lists in lockstep: [tick][rank], each rank one task a tick or none, as early as its needs allow.

    Any task takes one tick, and what it sends can be used from the next tick on, on the rank that sent it too. Give
    `joined(orders)` for a program that does not split its backward.
    """
    start, _ = _times(orders, placement, lambda kind: 1.0)
    num_ticks = 1 + int(max(times[-1] if times else -1.0 for times in start))
    table: list[list[Task | None]] = [[None] * len(orders) for _ in range(num_ticks)]
    for rank, (tasks, times) in enumerate(zip(orders, start, strict=True)):
        for task, time in zip(tasks, times, strict=True):
            table[int(time)][rank] = task
    return table


class _Event(NamedTuple):
    """Something that is there once a task has ended."""

    what: str
    """F: the chunk's output. B: the gradient of its input. I: what a W needs."""
    flow: int
    stage: int
    mb: int


def _times(
    orders: Orders, placement: Placement, cost: Callable[[str], float]
) -> tuple[list[list[float]], list[list[float]]]:
    """Start and end of each task."""
    done: dict[_Event, float] = {}
    start: list[list[float]] = [[] for _ in orders]
    end: list[list[float]] = [[] for _ in orders]
    is_moving = True
    while is_moving:
        is_moving = False
        for rank, tasks in enumerate(orders):
            for task in tasks[len(end[rank]) :]:
                needs = [need for chunk in chunks(task) for need in _needs(chunk, rank, placement)]
                if not done.keys() >= set(needs):
                    break
                start[rank].append(max([done[need] for need in needs] + end[rank][-1:], default=0.0))
                end[rank].append(start[rank][-1] + cost(task[0]))
                made = [event for chunk in chunks(task) for event in _made(chunk, rank, placement)]
                done.update(dict.fromkeys(made, end[rank][-1]))
                is_moving = True
    _check_all_ran(orders, [len(times) for times in end], set(done), placement)
    return start, end


def _needs(chunk: Chunk, rank: int, placement: Placement) -> list[_Event]:
    """What must be there before a part of a task starts on a rank."""
    kind, direction, mb = chunk
    flow, stage = placement.flows[direction], placement.stages[rank][direction]
    if kind == "F":
        return [_Event("F", flow, stage - 1, mb)] if stage else []
    if kind == "W":
        return [_Event("I", flow, stage, mb)]
    behind = [_Event("B", flow, stage + 1, mb)] if stage < placement.num_stages - 1 else []
    return [_Event("F", flow, stage, mb), *behind]


def _made(chunk: Chunk, rank: int, placement: Placement) -> list[_Event]:
    kind, direction, mb = chunk
    made = {"F": "F", "B": "B", "I": "BI", "W": ""}[kind]
    return [_Event(what, placement.flows[direction], placement.stages[rank][direction], mb) for what in made]


def _check_all_ran(orders: Orders, num_run: list[int], done: set[_Event], placement: Placement) -> None:
    """Raises `DeadlockError` for a task that was not run, or a chunk that was left without its gradient."""
    stuck = [rank for rank, tasks in enumerate(orders) if num_run[rank] < len(tasks)]
    reasons = {rank: _reason(rank, num_run[rank], orders, done, placement) for rank in stuck}
    for rank in sorted(stuck, key=lambda rank: "no list" not in reasons[rank]):
        task = label(orders[rank][num_run[rank]])
        raise DeadlockError(
            f"rank {rank} can never run its task {num_run[rank]}, {task}: {reasons[rank]}; "
            "give each rank every task that others wait for, after what it needs itself."
        )
    for rank, tasks in enumerate(orders):
        parts = [chunk for task in tasks for chunk in chunks(task)]
        whole = {chunk[1:] for chunk in parts if chunk.kind in "BW"}
        for chunk in parts:
            if chunk.kind == "F" and chunk[1:] not in whole:
                raise DeadlockError(
                    f"rank {rank} runs {label(chunk)} and ends without the gradient of its weights; "
                    f"each F must be followed by a B or by an I and a W: add it to the list."
                )


def _reason(rank: int, index: int, orders: Orders, done: set[_Event], placement: Placement) -> str:
    """Why a task cannot run."""
    missing = next(
        need for chunk in chunks(orders[rank][index]) for need in _needs(chunk, rank, placement) if need not in done
    )
    other, direction = placement.home(missing.flow, missing.stage)
    wanted = f"{missing.what}{direction}.{missing.mb} of rank {other}"
    is_listed = any(missing in _made(chunk, other, placement) for task in orders[other] for chunk in chunks(task))
    return f"it needs {wanted}, {'which waits itself' if is_listed else 'which is in no list'}"
