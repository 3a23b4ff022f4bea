"""Does a change leave every bit as it was? The same model computed by two checkouts of this project.

    git worktree add ../before HEAD~1
    python -m dsv3_jax.bench.same_bits ../before                     # configs/tiny.py, in float32 and mixed
    python -m dsv3_jax.bench.same_bits ../before --precisions float32 bfloat16 mixed fp8_dsv3

Logits, routing, gradients of all parameters and generated ids, from the same weights and tokens, each made in a process
of its own. Exit code 1 if anything differs; the table says by how much.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.box
import rich.console
import rich.table

from dsv3_jax.config.check import UserError, check
from dsv3_jax.config.paths import user_path
from dsv3_jax.interrupt import run_program

HERE = Path(__file__).parents[2]

PROBE = Path(__file__).with_name("same_bits_probe.py")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 all the same, 1 something differs, 2 a user's error."""
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_jax.bench.same_bits", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("other", type=user_path, metavar="CHECKOUT", help="the folder of another checkout")
    parser.add_argument("--config", type=user_path, default=HERE / "configs" / "tiny.py", metavar="FILE")
    parser.add_argument("--precisions", nargs="+", default=["float32", "mixed"])
    given = parser.parse_args(arguments)
    try:
        check((given.other / "dsv3_jax").is_dir(), f"{given.other} is no checkout of dsv3-jax; give its root folder.")
        table = rich.table.Table(box=rich.box.SIMPLE)
        for column in ("", "precision", "largest difference", "of"):
            table.add_column(column)
        num_same = num_other = 0
        for precision in given.precisions:
            for name, (difference, size) in compare(given.other, given.config, precision).items():
                num_same, num_other = num_same + (difference == 0), num_other + (difference != 0)
                if difference:
                    table.add_row(name, precision, f"{difference:.2e}", f"{size:.2e}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if num_other:
        rich.console.Console().print(table)
    print(f"{num_same} of {num_same + num_other} tensors have the same bits")
    return 1 if num_other else 0


def compare(other: Path, config: Path, precision: str) -> dict[str, tuple[float, float]]:
    """For each tensor, its largest difference between the checkouts, and its largest entry.

    Raises:
        UserError: a checkout cannot compute it.
    """
    with tempfile.TemporaryDirectory() as folder:
        ours = _probe(HERE, config, precision, Path(folder) / "ours.npz")
        theirs = _probe(other, config, precision, Path(folder) / "theirs.npz")
    check(ours.keys() == theirs.keys(), f"the checkouts differ in {sorted(ours.keys() ^ theirs.keys())}.")
    return {name: (_difference(ours[name], theirs[name]), float(np.abs(ours[name]).max())) for name in ours}


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    if a.shape != b.shape:
        return float("inf")
    same = (a == b) | (np.isnan(a) & np.isnan(b)) if a.dtype.kind == "f" else a == b
    return 0.0 if same.all() else float(np.abs(a.astype(np.float64) - b).max())


def _probe(root: Path, config: Path, precision: str, out: Path) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    command = [sys.executable, "-P", str(PROBE), str(config), precision, str(out)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    check(done.returncode == 0, f"{root} cannot compute {config.name} in {precision}:\n{done.stderr[-2000:]}")
    with np.load(out) as found:
        return dict(found)


if __name__ == "__main__":
    run_program(main)
