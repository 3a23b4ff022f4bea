"""Whether a training step fits the memory of the devices it is planned for, counted from shapes in a second.

    python -m dsv3_jax.planning.fit configs/dsv3_671b.py
    python -m dsv3_jax.planning.fit configs/dsv3_671b.py --set precision=mixed
    python -m dsv3_jax.planning.fit configs/tiny.py --devices 8 --set parallel.expert=4

Prints the mesh, what the most loaded device holds by class with what each is made of, and whether 80 GB and 141 GB
hold it; if 80 GB do not, which class is to blame and the nearest plans that fit. Nothing is compiled: what one chunk
works with is an estimate, all else is what the program allocates (`aot` compares).
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence

from dsv3_jax.config.arguments import add_config_arguments
from dsv3_jax.config.check import UserError, check
from dsv3_jax.config.load import load_config
from dsv3_jax.config.mesh_rules import check_rows
from dsv3_jax.config.run import RunConfig
from dsv3_jax.interrupt import run_program
from dsv3_jax.parallel.mesh import mesh_shape
from dsv3_jax.planning.held import Copies, Held, copies, held
from dsv3_jax.planning.nearest import Plan, nearest

MEMORIES = {"80 GB": 80 * 10**9, "141 GB": 141 * 10**9}
"""Of an H100 or H800, and of an H200; bytes."""

_SPLITS = {
    "pipe": "layers, in stages",
    "data": "rows of a batch; what is stored",
    "node": "rows; routed experts, between nodes",
    "expert": "rows; routed experts, inside a node",
    "tensor": "heads and widths of feed-forwards",
}


def plan_text(cfg: RunConfig, shape: Mapping[str, int]) -> str:
    """The mesh, what each axis splits, what a device holds, and whether that fits.

    Raises:
        ConfigError: the configuration and the mesh do not go together.
    """
    shape, batch = dict(shape), cfg.train.batch
    check_rows(batch, data=shape["data"], expert=shape["node"] * shape["expert"])
    devices, counted = math.prod(shape.values()), held(cfg, shape)
    mesh = [f"  {axis:<8}{size:>6}  {_SPLITS[axis]}" for axis, size in shape.items()]
    head = f"{cfg.name}, {cfg.precision}, {devices:,} devices"
    return "\n".join(
        [
            head,
            *mesh,
            "",
            *_table(counted),
            "",
            *_parameters(counted, list(copies(cfg, shape))),
            *_verdict(cfg, shape, counted),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for a user error."""
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_jax.planning.fit", description="Whether a training step fits the memory of its devices."
    )
    add_config_arguments(parser)
    parser.add_argument("--devices", type=int, help="how many (default: the product of the configuration's axes)")
    args = parser.parse_args(arguments)
    try:
        cfg = load_config(args.config, args.set)
        print(plan_text(cfg, mesh_shape(cfg.parallel, _devices(cfg, args.devices))))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _devices(cfg: RunConfig, given: int | None) -> int:
    """As many as asked for, or as the plan names; where it leaves `data` open, as many as its micro-batch has rows."""
    parallel = cfg.parallel
    if given is not None:
        check(given > 0, f"--devices {given} must be at least 1.")
        return given
    data = parallel.data if parallel.data > 0 else max(1, cfg.train.batch.micro // parallel.expert)
    return parallel.pipe * data * parallel.expert * parallel.tensor


def _table(counted: Held) -> list[str]:
    rows = [*((line.name, line.size, line.how) for line in counted.lines), ("together", counted.total, "")]
    return [f"  {name:<24}{_size(size):>12}  {how}".rstrip() for name, size, how in rows]


def _size(size: int) -> str:
    """Decimal, as memories are sold."""
    return f"{size / 1e9:.2f} GB" if size >= 10**7 else f"{size / 1e6:.2f} MB"


def _parameters(counted: Held, copied: Sequence[Copies]) -> list[str]:
    number = sum(one.elements for one in copied)
    said = f"{counted.parameters:,} parameters"
    if not number:
        return [f"All devices together store {said}, each once."]
    names = sorted({one.path.rpartition("/")[0].rpartition("/")[2] or one.path for one in copied})
    return [f"All devices together store {said} and {number:,} copies of some: {', '.join(names)}."]


def _verdict(cfg: RunConfig, shape: Mapping[str, int], counted: Held) -> list[str]:
    lines = []
    for name, limit in MEMORIES.items():
        rest = limit - counted.total
        holds = f"hold it, {_size(rest)} left" if rest >= 0 else f"do not hold it: {_size(-rest)} too much"
        lines.append(f"{name} {holds}.")
    limit = min(MEMORIES.values())
    if counted.total > limit:
        lines += _ways_out(counted, nearest(cfg, shape, limit))
    return lines


def _ways_out(counted: Held, plans: Sequence[Plan]) -> list[str]:
    largest = max(counted.lines, key=lambda line: line.size)
    lines = [f"The largest class is {largest.name}, {_size(largest.size)}."]
    for plan in plans:
        changes = " ".join(f"{key}={value}" for key, value in plan.changes.items())
        saved = max(counted.lines, key=lambda line: line.size - plan.held.of(line.name))
        less = _size(saved.size - plan.held.of(saved.name))
        lines.append(f"  --set {changes}: {_size(plan.held.total)}; most by {saved.name}, {less} less")
    return lines if plans else [*lines, "No plan with a change or two holds it on as many devices."]


if __name__ == "__main__":
    run_program(main)
