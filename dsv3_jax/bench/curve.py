"""Does the training loss of a run ever rise? Its smoothed curve after warm-up, beside what chance alone would do.

    python -m dsv3_jax.bench.curve runs/tiny
    python -m dsv3_jax.bench.curve runs/tiny --window 200 --at-most 0.05      exit code 1 if it rises by more

A rise is how far the mean of `window` steps lies above its lowest value so far. By chance: the run's own differences
from a falling trend, in random order (5th and 95th percentile of 300 draws); a rise within that is noise of small
batches.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.config.check import UserError, check
from dsv3_jax.config.paths import user_path
from dsv3_jax.interrupt import run_program
from dsv3_jax.training.log import METRICS, read_rows
from dsv3_jax.training.run import CONFIG_NAME
from dsv3_jax.typing import Float

WINDOWS = (50, 100, 200)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 1 for a rise beyond `--at-most`, 2 for a user's error."""
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_jax.bench.curve", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run_dir", type=user_path, metavar="RUN_DIR", help="a run dir of train.py")
    parser.add_argument("--window", type=int, action="append", help="steps averaged; default 50, 100 and 200")
    parser.add_argument("--at-most", type=float, default=float("inf"), metavar="NATS", help="the largest rise allowed")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(arguments)
    try:
        result = measure(given.run_dir, given.window or WINDOWS)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps(result))
    else:
        print(f"{'steps averaged':>15}{'largest rise':>15}{'by chance':>18}   nats, after warm-up")
        for window, found in result.items():
            low, high = found["by_chance"]
            print(f"{window:>15}{found['rise']:>15.3f}{low:>11.3f}–{high:.3f}")
    return int(any(found["rise"] > given.at_most for found in result.values()))


def measure(run_dir: Path, windows: Sequence[int]) -> dict[str, dict[str, Any]]:
    """`rise` and `by_chance` of each window, by the main model's loss.

    Raises:
        UserError: the run is too short for a window.
    """
    rows = read_rows(run_dir / METRICS)
    warm = _warmup_tokens(run_dir)
    loss = np.array([row["main_loss"] for row in rows if row["tokens"] > warm])
    longest = max(windows)
    check(min(windows) > 0, f"--window {min(windows)} must be at least 1.")
    check(
        len(loss) > longest,
        f"{run_dir} has {len(loss)} steps after warm-up; give a --window below that, or train longer.",
    )
    x = np.log(np.arange(1, len(loss) + 1))
    trend = np.minimum.accumulate(np.polyval(np.polyfit(x, loss, 3), x))
    rng = np.random.default_rng(0)
    shuffled = [trend + rng.permutation(loss - trend) for _ in range(300)]
    return {
        str(window): {
            "rise": largest_rise(loss, window),
            "by_chance": np.percentile([largest_rise(one, window) for one in shuffled], [5, 95]).tolist(),
        }
        for window in windows
    }


def largest_rise(loss: Float[np.ndarray, "n"], window: int) -> float:
    """How far the mean of `window` neighbours ever lies above its lowest value so far."""
    smoothed = np.convolve(loss, np.ones(window) / window, "valid")
    return float((smoothed - np.minimum.accumulate(smoothed)).max())


def _warmup_tokens(run_dir: Path) -> int:
    try:
        return json.loads((run_dir / CONFIG_NAME).read_bytes())["train"]["lr"]["warmup_tokens"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run_dir} is no run dir of train.py ({error}); give one.") from error


if __name__ == "__main__":
    run_program(main)
