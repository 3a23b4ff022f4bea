"""Does a mesh learn what one device does? One step from the same states, on simulated devices.

    python -m dsv3_jax.bench.parity --mesh data=2,expert=2,tensor=2
    python -m dsv3_jax.bench.parity --mesh expert=4,expert_nodes=2,capacity=0.5 --set train.remat=paper
    python -m dsv3_jax.bench.parity --mesh data=2,expert=4 --set precision=fp8_dsv3
    python -m dsv3_jax.bench.parity --all

A small model is trained on one device. From each of several states of that run, the mesh takes one step: its loss must
be that of one device within 1e-6 of it, every gradient and moment within 1e-5 of its largest entry, loads, biases and
the experts of every token equal. Low precision rounds other sums on other devices, so there the error of loss and
gradients against float32 may be at most 1.1 times that of one device. Exit code 1 if anything differs.
"""

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.box
import rich.console
import rich.table

from dsv3_jax.bench.parity_meshes import CASES, Case, configure
from dsv3_jax.bench.parity_states import Outcome, outcomes_on, reference
from dsv3_jax.config.arguments import add_set_argument
from dsv3_jax.config.check import UserError, check
from dsv3_jax.config.parallel import ParallelConfig
from dsv3_jax.config.run import RunConfig
from dsv3_jax.interrupt import run_program
from dsv3_jax.parallel.mesh import make_mesh

LOSS, ARRAYS, RATIO = 1e-6, 1e-5, 1.1
"""Largest relative difference of losses, of gradients and moments; of an error by one device's."""


class Difference(NamedTuple):
    """The worst over all states: differences, or under low precision ratios of errors."""

    loss: float
    gradients: float
    moments: float
    is_routing_equal: bool
    limits: tuple[float, float, float]

    @property
    def is_small(self) -> bool:
        """Whether the mesh learned what one device did. What is not a number is not small."""
        found = (self.loss, self.gradients, self.moments)
        return self.is_routing_equal and all(one <= limit for one, limit in zip(found, self.limits, strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 equal, 1 something differs, 2 a user's error."""
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_jax.bench.parity", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--mesh", metavar="AXIS=SIZE,...", help="axes, and other fields of `parallel`")
    which.add_argument("--all", action="store_true", help=f"{len(CASES)} meshes of 2 to 16 devices")
    add_set_argument(parser)
    parser.add_argument("--states", type=int, default=5, help="states that a step is taken from")
    given = parser.parse_args(arguments)
    try:
        check(given.states > 0, f"--states {given.states} must be at least 1.")
        cases = CASES if given.all else (Case(given.mesh),)
        runs = [(case, configure(case.mesh, [*case.settings, *given.set])) for case in cases]
        jax.config.update("jax_num_cpu_devices", max(num_devices(cfg) for _, cfg in runs))
        jax.config.update("jax_default_matmul_precision", "highest")
        return 0 if _check_all(runs, num_states=given.states) else 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def num_devices(cfg: RunConfig) -> int:
    """Of the mesh of `cfg`."""
    parallel = cfg.parallel
    return parallel.pipe * parallel.data * parallel.expert * parallel.tensor


def difference(cfg: RunConfig, *, num_states: int) -> Difference:
    """Of one step on the mesh of `cfg` from one on one device. References are computed once for all meshes."""
    plain = _on_one_device(cfg)
    starts, expected = reference(plain, num_states)
    found = list(outcomes_on(cfg, _mesh_of(cfg), starts))
    if cfg.precision == "float32":
        return _compare(found, expected)
    return _compare_errors(found, expected, _twins(plain, num_states))


@functools.lru_cache(maxsize=8)
def _twins(plain: RunConfig, num_states: int) -> list[Outcome]:
    """What float32 makes of the starts of a run in low precision."""
    exact = dataclasses.replace(plain, precision="float32")
    return list(outcomes_on(exact, _mesh_of(exact), reference(plain, num_states).starts))


def _mesh_of(cfg: RunConfig) -> jax.sharding.Mesh:
    return make_mesh(cfg.parallel, jax.devices()[: num_devices(cfg)])


def _compare(found: Sequence[Outcome], expected: Sequence[Outcome]) -> Difference:
    pairs = list(zip(found, expected, strict=True))
    equal = [
        ours.dropped == 0 and _are_equal((ours.loads, ours.biases, ours.ids), (theirs.loads, theirs.biases, theirs.ids))
        for ours, theirs in pairs
    ]
    return Difference(
        max(abs(ours.loss - theirs.loss) / abs(theirs.loss) for ours, theirs in pairs),
        max(_largest(ours.gradients, theirs.gradients) for ours, theirs in pairs),
        max(_largest(ours.moments, theirs.moments) for ours, theirs in pairs),
        all(equal),
        (LOSS, ARRAYS, ARRAYS),
    )


def _compare_errors(found: Sequence[Outcome], one: Sequence[Outcome], exact: Sequence[Outcome]) -> Difference:
    def error(outcomes: Sequence[Outcome], measure: Callable[[Outcome, Outcome], float]) -> float:
        return float(np.sqrt(np.mean([measure(*pair) ** 2 for pair in zip(outcomes, exact, strict=True)])))

    def of_losses(a: Outcome, b: Outcome) -> float:
        return float(np.sqrt(np.mean((a.row_losses - b.row_losses) ** 2)))

    def of_gradients(a: Outcome, b: Outcome) -> float:
        return _distance(a.gradients, b.gradients)

    def of_moments(a: Outcome, b: Outcome) -> float:
        return _distance(a.moments, b.moments)

    def ratio(measure: Callable[[Outcome, Outcome], float]) -> float:
        return error(found, measure) / error(one, measure)

    ratios = ratio(of_losses), ratio(of_gradients), ratio(of_moments)
    return Difference(*ratios, all(ours.dropped == 0 for ours in found), (RATIO, RATIO, RATIO))


def _largest(ours: Any, theirs: Any) -> float:
    """The largest difference of any two arrays, by the largest entry of the second."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in pairs)


def _distance(ours: Any, theirs: Any) -> float:
    """‖ours - theirs‖ / ‖theirs‖ over all arrays together."""
    a, b = (np.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(tree)]) for tree in (ours, theirs))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _are_equal(ours: Any, theirs: Any) -> bool:
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def _on_one_device(cfg: RunConfig) -> RunConfig:
    """The same run without a mesh, in one micro-batch a step, nothing computed twice."""
    train = cfg.train
    batch = dataclasses.replace(train.batch, micro=train.batch.full)
    return dataclasses.replace(
        cfg, parallel=ParallelConfig(data=1), train=dataclasses.replace(train, batch=batch, remat="none")
    )


def _check_all(runs: Sequence[tuple[Case, RunConfig]], *, num_states: int) -> bool:
    """Prints a row as soon as it is known; returns whether all are equal."""
    console, results = rich.console.Console(width=132), []
    table = rich.table.Table(box=rich.box.SIMPLE)
    for column in ("mesh", "set", "loss", "gradients", "moments", "routing", "CPU s", ""):
        table.add_column(column, no_wrap=column == "mesh", overflow="fold")
    for case, cfg in runs:
        start = time.process_time()
        found = difference(cfg, num_states=num_states)
        results.append(found.is_small)
        shown = [f"{one:.1e}" if cfg.precision == "float32" else f"{one:.2f} x" for one in found[:3]]
        routing = "equal" if found.is_routing_equal else "differs"
        verdict = "ok" if found.is_small else "DIFFERS"
        row = [case.mesh, " ".join(case.settings), *shown, routing, f"{time.process_time() - start:.0f}", verdict]
        table.add_row(*row)
        print("  ".join(part for part in row if part), file=sys.stderr, flush=True)
        jax.clear_caches()
    console.print(table)
    print(f"{sum(results)} of {len(results)} meshes learn what one device does, from {num_states} states each")
    return all(results)


if __name__ == "__main__":
    run_program(main)
