"""What a run writes while it trains: metrics.jsonl, TensorBoard events, a progress bar."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

import rich.console
import rich.progress
from tensorboardX import SummaryWriter

from dsv3_jax.config.check import UserError
from dsv3_jax.training.metrics import flat

METRICS = "metrics.jsonl"
HELDOUT = "heldout.jsonl"


class RunLog:
    """Appends rows to `metrics.jsonl` and `heldout.jsonl` (a JSON object a line, floats in full) and to TensorBoard.

    Opening it at `step` drops rows of later steps, which a resumed run will write again: one row a step, always.
    """

    def __init__(self, run_dir: Path, *, step: int, tensorboard: bool) -> None:
        self._run_dir = run_dir
        self._files: dict[str, TextIO] = {}
        try:
            for name in (METRICS, HELDOUT):
                _rewrite(run_dir / name, [row for row in read_rows(run_dir / name) if row["step"] <= step])
                self._files[name] = (run_dir / name).open("a")
            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1) if tensorboard else None
        except OSError as error:
            raise _cannot_write(run_dir, error) from error

    def write(self, row: dict[str, Any]) -> None:
        """The metrics of one step, on their way to the disk before this returns."""
        self._append(METRICS, row)

    def write_heldout(self, row: dict[str, Any]) -> None:
        """The result of one evaluation."""
        self._append(HELDOUT, row)

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()
        if self._board is not None:
            self._board.close()

    def _append(self, name: str, row: dict[str, Any]) -> None:
        try:
            self._files[name].write(json.dumps(row) + "\n")
            self._files[name].flush()
        except OSError as error:
            raise _cannot_write(self._run_dir, error) from error
        if self._board is not None:
            for key, value in flat(row).items():
                self._board.add_scalar(key, value, row["step"])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


class ProgressBar:
    """Tokens done, speed, time left and the newest loss, on standard error; plain lines when that is no terminal."""

    def __init__(self, *, total_tokens: int, done: int) -> None:
        self._console = rich.console.Console(stderr=True, soft_wrap=True)
        columns = (
            rich.progress.TextColumn("step {task.fields[step]}"),
            rich.progress.BarColumn(),
            rich.progress.TaskProgressColumn(),
            rich.progress.TextColumn("loss {task.fields[loss]:.4f}"),
            rich.progress.TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("left"),
            rich.progress.TimeRemainingColumn(elapsed_when_finished=False),
        )
        self._bar = rich.progress.Progress(
            *columns, console=self._console, disable=not self._console.is_terminal, speed_estimate_period=60.0
        )
        self._task = self._bar.add_task("", total=total_tokens, completed=done, step=0, loss=float("nan"), speed=0.0)
        self._total = total_tokens
        self._last_percent = -1
        self._bar.start()

    def show(self, row: dict[str, Any]) -> None:
        """Moves the bar to a row of metrics; without a terminal prints a line every 5 percent."""
        speed = row["tokens_per_s"]
        self._bar.update(self._task, completed=row["tokens"], step=row["step"], loss=row["main_loss"], speed=speed)
        percent = 100 * row["tokens"] // self._total
        if not self._console.is_terminal and percent // 5 != self._last_percent // 5:
            left = max(0, self._total - row["tokens"]) / max(speed, 1e-9)
            done = f"{percent:3d} %  step {row['step']}  loss {row['main_loss']:.4f}"
            self.say(f"{done}  {speed:,.0f} tokens/s  {left / 60:.1f} min left")
            self._last_percent = percent

    def say(self, text: str) -> None:
        """One line above the bar."""
        self._console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.stop()


def _rewrite(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(path)


def _cannot_write(run_dir: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write the metrics in {run_dir}: {error}; make room there, then start the same command again."
    )
