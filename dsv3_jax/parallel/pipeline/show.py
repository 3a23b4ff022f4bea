"""Shows a schedule of a pipeline: as text, as a picture, as a trace that Perfetto opens.

    python -m dsv3_jax.parallel.pipeline.show dualpipe_v --stages 8 --micro-batches 20 --png F.png --trace F.json
    python -m dsv3_jax.parallel.pipeline.show zero_bubble --stages 4 --micro-batches 8 --phases
    python -m dsv3_jax.parallel.pipeline.show dualpipe --stages 8 --micro-batches 20 --costs F=2 B=4 W=1.5 FB=5

F is a forward, B a backward, I and W its two parts (gradient of the input, of the weights), FB a pair that overlaps.
Times are those of a simulation in which sending costs nothing, in the unit of --costs. A number of micro-batches that
the schedule does not allow is shown as the program would run it: greedily, on the same placement of stages.
"""

import argparse
import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dsv3_jax.config.check import UserError, check
from dsv3_jax.config.paths import shown, user_path
from dsv3_jax.interrupt import run_program
from dsv3_jax.parallel.pipeline.schedule import Chunk, Name, Planned, Task, chunks, label, phases, planned
from dsv3_jax.parallel.pipeline.simulate import Costs, Simulation, bubble_bound, simulate

COLORS = {
    ("F", 0): "#4c78b8", ("F", 1): "#a7c3e6",
    ("B", 0): "#4c9a5f", ("B", 1): "#a9d7b2",
    ("I", 0): "#c98a2b", ("I", 1): "#f0cf93",
    ("W", 0): "#8a6bb0", ("W", 1): "#cdbde2",
}  # fmt: skip
MEANING = {"F": "forward", "B": "backward", "I": "gradient of the input", "W": "gradient of the weights"}


def timeline(plan: Planned, simulated: Simulation, *, width: int) -> str:
    """Ranks as lines, time from left to right, as many blocks below each other as `width` columns need.

    Small letters are direction 1, dots idle time, F7b3 a pair.
    """
    texts = [[_short(task) for task in tasks] for tasks in plan.orders]
    # Columns of one unit of time: at least 3, and every text fits into its task.
    flat = [
        len(text) / (end - start)
        for own, starts, ends in zip(texts, simulated.start, simulated.end, strict=True)
        for text, start, end in zip(own, starts, ends, strict=True)
    ]
    column = max(3, math.ceil(max(flat)))
    lines = []
    for own, starts, ends in zip(texts, simulated.start, simulated.end, strict=True):
        line = ""
        for text, start, end in zip(own, starts, ends, strict=True):
            line = line.ljust(round(start * column), ".") + text
            line = line.ljust(round(end * column))
        lines.append(line.ljust(round(simulated.makespan * column), "."))
    margin = len(f"rank {len(lines) - 1} ")
    units = max(1, (width - margin) // column)
    blocks = []
    for first in range(0, math.ceil(simulated.makespan), units):
        part = slice(first * column, (first + units) * column)
        blocks.append(f"time {first}\n" + "\n".join(f"{f'rank {r}':{margin}}{x[part]}" for r, x in enumerate(lines)))
    return "\n\n".join(blocks)


def trace(plan: Planned, simulated: Simulation) -> dict[str, Any]:
    """The events of Chrome's trace format, which ui.perfetto.dev opens; one unit of time is one millisecond."""
    events: list[dict[str, Any]] = []
    for rank, tasks in enumerate(plan.orders):
        where = {"pid": 0, "tid": rank}
        stages = " and ".join(str(stage) for stage in plan.placement.stages[rank])
        name = {"name": f"rank {rank}: stage {stages}"}
        events += [
            {"ph": "M", "name": "thread_name", "args": name, **where},
            {"ph": "M", "name": "thread_sort_index", "args": {"sort_index": rank}, **where},
        ]
        for task, start, end in zip(tasks, simulated.start[rank], simulated.end[rank], strict=True):
            parts = [{**chunk._asdict(), "stage": plan.placement.stages[rank][chunk[1]]} for chunk in chunks(task)]
            time = {"ts": 1000 * start, "dur": 1000 * (end - start)}
            events.append({"ph": "X", "name": label(task), "cat": task[0], "args": {"parts": parts}, **time, **where})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def draw(path: Path, title: str, plan: Planned, simulated: Simulation) -> None:
    """Writes a PNG: a row a rank; a pair is its forward above its backward."""
    num_ranks = len(plan.orders)
    figure = Figure(figsize=(13, 1.3 + 0.36 * num_ranks), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    unit = 860 / simulated.makespan  # points
    for rank, chunk, start, length, bottom, height in _boxes(plan, simulated):
        panel.broken_barh(
            [(start, length)],
            (rank + bottom, height),
            facecolors=COLORS[chunk.kind, chunk.direction],
            edgecolors="white",
            linewidth=0.4,
        )
        size = 5.5 if height < 0.5 else 6.5
        if length * unit > 0.62 * size * len(str(chunk.mb)):
            middle = (start + length / 2, rank + bottom + height / 2)
            panel.text(*middle, str(chunk.mb), ha="center", va="center", fontsize=size)
    kinds = {chunk.kind for tasks in plan.orders for task in tasks for chunk in chunks(task)}
    known = [(kind, d) for kind, d in COLORS if kind in kinds and d < len(plan.placement.flows)]
    patches = [Patch(color=COLORS[key], label=f"{MEANING[key[0]]}, direction {key[1]}") for key in known]
    figure.legend(handles=patches, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    panel.set_title(title, fontsize=10)
    panel.set_xlim(0, simulated.makespan)
    panel.set_ylim(num_ranks, 0)
    panel.set_yticks([rank + 0.5 for rank in range(num_ranks)], [f"rank {rank}" for rank in range(num_ranks)])
    panel.set_facecolor("#f2f2f2")
    panel.spines[:].set_visible(False)
    figure.savefig(path, dpi=90, format="png")


def _boxes(plan: Planned, simulated: Simulation) -> Iterator[tuple[int, Chunk, float, float, float, float]]:
    """(rank, chunk, start, length, bottom, height) of what is drawn."""
    for rank, tasks in enumerate(plan.orders):
        for task, start, end in zip(tasks, simulated.start[rank], simulated.end[rank], strict=True):
            parts = chunks(task)
            for i, chunk in enumerate(parts):
                yield rank, chunk, start, end - start, 0.05 + 0.9 * i / len(parts), 0.9 / len(parts)


def summary(title: str, plan: Planned, simulated: Simulation, *, bound: float | None) -> str:
    """What the simulation says, a line a rank."""
    formula = "" if bound is None else f"; by the report's formula at most {bound:g}"
    lines = [title, f"makespan {simulated.makespan:g}, of it idle (bubble) {max(simulated.bubble):g}{formula}"]
    lines.append(f"\n{'rank':>4}  {'stages':>8}  {'tasks':>5}  {'bubble':>7}  {'idle':>6}  chunks held at most")
    for rank, tasks in enumerate(plan.orders):
        stages = ", ".join(str(stage) for stage in plan.placement.stages[rank])
        bubble, live = simulated.bubble[rank], simulated.peak_live[rank]
        share = bubble / simulated.makespan
        lines.append(f"{rank:>4}  {stages:>8}  {len(tasks):>5}  {bubble:>7g}  {share:>6.1%}  {live}")
    return "\n".join(lines)


def phase_tables(name: Name, num_ranks: int, num_microbatches: int) -> str:
    """The tables of phases, of all ranks."""
    lines = []
    for rank in range(num_ranks):
        table = phases(name, rank=rank, num_ranks=num_ranks, num_microbatches=num_microbatches)
        lines += [f"rank {rank}", *(f"  {x.repeats:>3} x  {', '.join(x.tasks):36}  {x.purpose}" for x in table)]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for what the user can fix."""
    given = _parse(arguments)
    try:
        _show(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_jax.parallel.pipeline.show",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("schedule", choices=get_args(Name))
    parser.add_argument("--stages", type=int, default=8, help="dualpipe_v has two on each rank (default %(default)s)")
    parser.add_argument("--micro-batches", type=int, default=20, help="in one step (default %(default)s)")
    parser.add_argument("--costs", nargs="+", default=[], metavar="KIND=TIME", help="default: F=1 B=2 W=1 FB=3")
    parser.add_argument("--phases", action="store_true", help="print the tables of phases that make the schedule")
    parser.add_argument("--width", type=int, help="columns of the timeline (default: the terminal's)")
    parser.add_argument("--png", metavar="FILE", help="write a picture")
    parser.add_argument("--trace", metavar="FILE", help="write a trace for https://ui.perfetto.dev")
    return parser.parse_args(arguments)


def _show(given: argparse.Namespace) -> None:
    name, stages, M = given.schedule, given.stages, given.micro_batches
    width = given.width or shutil.get_terminal_size((120, 24)).columns
    check(width >= 20, f"--width {width} must be at least 20.")
    check(stages >= 1, f"--stages {stages} must be at least 1.")
    per_rank = 2 if name == "dualpipe_v" else 1
    check(stages % per_rank == 0, f"--stages {stages} must be even for dualpipe_v, two on each rank; use {stages + 1}.")
    costs = _costs(given.costs)
    plan = planned(name, stages // per_rank, M)
    simulated = simulate(plan.orders, costs, plan.placement)
    order = f"{name} (greedy: it does not allow {M} micro-batches)" if plan.is_greedy else name
    named = ", ".join(f"{kind} = {time:g}" for kind, time in dataclasses.asdict(costs).items())
    title = f"{order}: {stages} stages on {len(plan.orders)} ranks, {M} micro-batches; {named}"
    bound = None if plan.is_greedy else bubble_bound(name, stages, costs)
    print(f"{summary(title, plan, simulated, bound=bound)}\n")
    if given.phases:
        check(not plan.is_greedy, f"--phases: a greedy schedule has none; {M} micro-batches are too few for {name}.")
        print(f"{phase_tables(name, len(plan.orders), M)}\n")
    print(f"Small letters: direction 1. Dots: idle.\n\n{timeline(plan, simulated, width=width)}")
    if given.png:
        _write(given.png, lambda path: draw(path, title, plan, simulated))
    if given.trace:
        _write(given.trace, lambda path: path.write_text(json.dumps(trace(plan, simulated)), encoding="utf-8"))


def _costs(given: Sequence[str]) -> Costs:
    """The costs from KIND=TIME."""
    found: dict[str, float] = {}
    for text in given:
        kind, _, time = text.partition("=")
        try:
            found[kind] = float(time)
        except ValueError:
            found[kind] = math.nan
        is_known = kind in {field.name for field in dataclasses.fields(Costs)} and math.isfinite(found[kind])
        check(is_known, f"--costs {shown(text)} is not a cost; write F, B, W or FB, = and a number, such as FB=2.5.")
    return Costs(**found)


def _write(given: str, write: Callable[[Path], object]) -> None:
    path = user_path(given)
    try:
        write(path)
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be written ({error}); name a file in a folder that exists.") from error
    print(f"\nwritten {shown(path)}")


def _short(task: Task) -> str:
    """F7, or f7 in direction 1; F7b3 for a pair."""
    return "".join(f"{kind.lower() if direction else kind}{mb}" for kind, direction, mb in chunks(task))


if __name__ == "__main__":
    run_program(main)
