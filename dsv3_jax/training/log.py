"""What a run writes while it trains: metrics.jsonl, heldout.jsonl and TensorBoard's events."""

import contextlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

from dsv3_jax.config.check import UserError
from dsv3_jax.output import warn
from dsv3_jax.training.metrics import flat
from dsv3_jax.training.replace import replace_file
from dsv3_jax.training.tensorboard import EventFile

METRICS = "metrics.jsonl"
HELDOUT = "heldout.jsonl"
TENSORBOARD = "tensorboard"


class LogError(UserError):
    """metrics.jsonl or heldout.jsonl cannot be written."""


class RunLog:
    """Appends rows to `metrics.jsonl` and `heldout.jsonl` (a JSON object a line, floats in full) and to TensorBoard.

    Opening it at `step` drops rows of later steps, which a resumed run will write again: one row a step, always.
    Lines that are no rows are moved to `<name>.damaged`. In TensorBoard the tags are `train/…` and `heldout/…`; when
    its events cannot be written, `tensorboard_failure` tells why and the run goes on.

    Args:
        warn: takes a line on what the user should know.
    """

    def __init__(self, run_dir: Path, *, step: int, tensorboard: bool, warn: Callable[[str], None] = warn) -> None:
        self._run_dir = run_dir
        self._files: dict[str, TextIO] = {}
        try:
            for name in (METRICS, HELDOUT):
                rows, damaged = _parse(run_dir / name)
                if damaged:
                    _set_aside(run_dir / f"{name}.damaged", damaged)
                    warn(f"{run_dir / name}: lines that are no rows: {len(damaged)}; moved to {name}.damaged.")
                _rewrite(run_dir / name, [row for row in rows if row["step"] <= step])
                self._files[name] = (run_dir / name).open("a", encoding="utf-8")
        except OSError as error:
            raise _cannot_write(run_dir, error) from error
        self._board = EventFile(run_dir / TENSORBOARD, step=step, warn=warn) if tensorboard else None

    @property
    def tensorboard_failure(self) -> str:
        """Why TensorBoard's events are incomplete; empty when they are not."""
        return "" if self._board is None else self._board.failure

    def write(self, row: dict[str, Any]) -> None:
        """The metrics of one step, on their way to the disk before this returns.

        Raises:
            LogError: metrics.jsonl cannot be written.
        """
        self._append(METRICS, "train", row)

    def write_heldout(self, row: dict[str, Any]) -> None:
        """The result of one evaluation; raises as `write` does."""
        self._append(HELDOUT, "heldout", row)

    def close(self) -> None:
        """Closes the files. Raises nothing: every row is already on its way, or its failure was raised."""
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()
        if self._board is not None:
            self._board.close()

    def _append(self, name: str, group: str, row: dict[str, Any]) -> None:
        try:
            self._files[name].write(json.dumps(row) + "\n")
            self._files[name].flush()
        except OSError as error:
            raise _cannot_write(self._run_dir, error) from error
        if self._board is not None:
            scalars = {f"{group}/{key}": value for key, value in flat(row).items() if key != "step"}
            self._board.write(row["step"], scalars)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl or heldout.jsonl by step, the last of each step; lines that are no rows are left out.

    A row is a JSON object with a whole number `step`; what else it holds is the writer's affair.
    """
    return _parse(path)[0]


def _parse(path: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    """Rows of a log, and the lines that are none; a last line cut off by a kill is neither."""
    if not path.exists():
        return [], []
    rows: dict[int, dict[str, Any]] = {}
    damaged = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        row = _row(line)
        if row is not None:
            rows[row["step"]] = row
        elif line:
            damaged.append(line)
    return [rows[step] for step in sorted(rows)], damaged


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def _set_aside(path: Path, lines: Iterable[bytes]) -> None:
    with path.open("ab") as stream:
        stream.writelines(line + b"\n" for line in lines)


def _rewrite(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    replace_file(path, "".join(json.dumps(row) + "\n" for row in rows))


def _cannot_write(run_dir: Path, error: OSError) -> LogError:
    return LogError(
        f"cannot write the metrics in {run_dir}: {error}; make room there, then start the same command again."
    )
