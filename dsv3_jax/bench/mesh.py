"""What a mesh costs: CPU seconds of a training step on simulated devices, over those of one device at the same batch.

    python -m dsv3_jax.bench.mesh configs/bench_30m.py
    python -m dsv3_jax.bench.mesh configs/bench_30m.py --rounds 3 --meshes data=4 pipe=2

Simulated devices share the cores of this machine, so a mesh can only lose here: what is above 1 is work that one device
does not have (copies, gathers, padding, an exchange), or does better because its arrays are larger. A pipeline is
compared with one device that accumulates as many micro-batches. All programs take turns in one process.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.console
import rich.table

from dsv3_jax.bench.machine import describe
from dsv3_jax.bench.timing import median_ratio, summary, take_turns
from dsv3_jax.bench.train import random_batch
from dsv3_jax.config.arguments import add_config_arguments
from dsv3_jax.config.check import UserError, check
from dsv3_jax.config.load import load_config
from dsv3_jax.config.parallel import ParallelConfig
from dsv3_jax.config.run import RunConfig
from dsv3_jax.data.batch import Batch, stack
from dsv3_jax.interrupt import run_program
from dsv3_jax.model.functions import functions_for
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.training.host_memory import keep_freed_memory
from dsv3_jax.training.mesh_step import step_on
from dsv3_jax.training.state import init_state, state_shardings
from dsv3_jax.training.step import Rates

NUM_DEVICES = 4
NUM_MICRO_BATCHES = 8
"""Of a step of a pipeline, one row each."""


class Case(NamedTuple):
    """A mesh, and the ratio it should not exceed."""

    parallel: ParallelConfig
    goal: float


CASES = {
    "data=4": Case(ParallelConfig(data=4), 1.4),
    "expert=4": Case(ParallelConfig(data=1, expert=4), 1.25),
    "data=2,expert=2,capacity=1.25": Case(ParallelConfig(data=2, expert=2, capacity=1.25), 1.25),
    "pipe=2": Case(ParallelConfig(pipe=2, data=1), 1.6),
}

Program = Callable[[], float]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code (0, or 2 for a user error)."""
    given = _parse(arguments)
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    keep_freed_memory()
    try:
        check(given.rounds > 0, f"--rounds {given.rounds} must be at least 1.")
        unknown = sorted(set(given.meshes) - set(CASES))
        check(not unknown, f"--meshes {' '.join(unknown)}: unknown; use some of {' '.join(CASES)}.")
        result = measure(load_config(given.config, given.set), rounds=given.rounds, names=given.meshes or list(CASES))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps(result))
    else:
        _print_table(result)
    return 0


def measure(cfg: RunConfig, *, rounds: int, names: Sequence[str]) -> dict[str, Any]:
    """What `--json` prints. Ratios are medians over rounds of CPU seconds by CPU seconds.

    Raises:
        UserError: a mesh that does not fit the model.
    """
    programs: dict[str, Program] = {}
    for name in names:
        own, baseline = _for_mesh(cfg, CASES[name].parallel)
        programs.setdefault(baseline, training_program(_for_one_device(own)))
        programs[name] = training_program(own)
    first = take_turns(programs, rounds=1)
    take_turns(programs, rounds=1)
    seconds = take_turns(programs, rounds=rounds)
    rows: dict[str, dict[str, Any]] = {name: {"first_s": first[name][0], **summary(seconds[name])} for name in programs}
    for name in names:
        baseline = _for_mesh(cfg, CASES[name].parallel)[1]
        ratio = median_ratio(seconds[name], seconds[baseline])
        rows[name] |= {"baseline": baseline, "ratio": ratio, "goal": CASES[name].goal}
    machine = describe(functions_for(cfg.precision).compute_dtype)
    return {"config": cfg.name, "precision": cfg.precision, "rounds": rounds, "programs": rows, **machine}


def training_program(cfg: RunConfig) -> Program:
    """One training step on the same random tokens each time; returns its CPU seconds."""
    functions, shape = functions_for(cfg.precision), cfg.parallel
    num = shape.pipe * shape.data * shape.expert * shape.tensor
    mesh = make_mesh(shape, jax.devices()[:num]) if num > 1 else None
    step = step_on(cfg, mesh, functions)
    state = [init_state(cfg, None if mesh is None else state_shardings(cfg, mesh))]
    batches = _micro_batches(cfg)
    rates = Rates(np.float32(cfg.train.lr.low), np.float32(0.1), np.float32(cfg.train.auxiliary.bias_speed))

    def program() -> float:
        start = time.process_time()
        state[0], report = step(state[0], batches, rates)
        jax.block_until_ready((state[0], report))
        return time.process_time() - start

    return program


def _micro_batches(cfg: RunConfig) -> Batch:
    """The rows of the largest step, in its micro-batches."""
    rows = random_batch(dataclasses.replace(cfg, train=_with_batch(cfg, micro=cfg.train.batch.full)))
    num = cfg.train.batch.full // cfg.train.batch.micro
    parts = [np.array_split(leaf, num, axis=leaf.ndim - 2) for leaf in rows[:3]]
    return stack([Batch(*part) for part in zip(*parts, strict=True)])


def _for_mesh(cfg: RunConfig, parallel: ParallelConfig) -> tuple[RunConfig, str]:
    """`cfg` on a mesh, and the name of what it is compared with: the same batch on one device."""
    if parallel.pipe == 1:
        train = _with_batch(cfg, micro=cfg.train.batch.micro)
        return dataclasses.replace(cfg, parallel=parallel, train=train), "one device"
    train = dataclasses.replace(_with_batch(cfg, micro=1, full=NUM_MICRO_BATCHES), remat="paper")
    name = f"one device, {NUM_MICRO_BATCHES} micro-batches"
    return dataclasses.replace(cfg, parallel=parallel, train=train), name


def _for_one_device(cfg: RunConfig) -> RunConfig:
    return dataclasses.replace(cfg, parallel=ParallelConfig(data=1))


def _with_batch(cfg: RunConfig, *, micro: int, full: int | None = None) -> Any:
    batch = dataclasses.replace(cfg.train.batch, start=full or micro, full=full or micro, micro=micro)
    return dataclasses.replace(cfg.train, batch=batch)


def _print_table(result: dict[str, Any]) -> None:
    table = rich.table.Table(title=f"{result['config']}: CPU seconds of a step, {result['precision']}")
    for column in ("", "seconds (min, max)", "over one device", "goal", "first step s"):
        table.add_column(column, justify="left" if column == "" else "right")
    for name, row in result["programs"].items():
        times = f"{row['median_s']:.2f} ({row['min_s']:.2f}, {row['max_s']:.2f})"
        ratio, goal = (f"{row[key]:.2f}" if key in row else "" for key in ("ratio", "goal"))
        table.add_row(name, times, ratio, goal, f"{row['first_s']:.1f}")
    console = rich.console.Console(width=max(100, rich.console.Console().width))
    console.print(table)
    versions = " ".join(f"{name} {version}" for name, version in result["versions"].items())
    console.print(
        f"medians of {result['rounds']} rounds · {result['device']}, {result['cores']} cores · {versions} · commit "
        f"{result['commit']}",
        highlight=False,
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dsv3_jax.bench.mesh", description="What a mesh costs on a CPU.")
    add_config_arguments(parser)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each program; the median counts")
    parser.add_argument("--meshes", nargs="*", default=[], metavar="MESH", help=f"some of {' '.join(CASES)}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_program(main)
