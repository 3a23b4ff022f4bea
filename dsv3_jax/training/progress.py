"""How fast a run goes, how long it will still take, and how a user sees it."""

import collections
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import rich.console
import rich.progress

from dsv3_jax.training.metrics import Progress, Speed, mfu

T = TypeVar("T")

WINDOW = 300
"""Steps whose mean speed the estimate of the time left goes by: fewer follow every disturbance, more are slow to."""

SLOW_STEPS = 5
"""A process's first steps, which are slower than those that follow; estimates forget them."""

FIRST_ESTIMATE = 10
"""Steps before the first line with an estimate."""

ANNOUNCED_AFTER_S = 10.0
"""Work that takes longer is announced, and gets a bar on a terminal."""


class Clock:
    """Times the steps of a run; compilation is left out of everything it says.

    Args:
        progress: where the run is.
        flops_per_token: useful operations of training.
        peak_flops_per_s: what the device reaches in a matmul.
        now: seconds, from any start.
    """

    def __init__(
        self,
        progress: Progress,
        *,
        flops_per_token: float,
        peak_flops_per_s: float,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._flops, self._peak, self._now = flops_per_token, peak_flops_per_s, now
        self._laps: collections.deque[tuple[int, float]] = collections.deque(maxlen=WINDOW)
        self._num_laps = 0
        self._step_seconds, self._other_seconds, self._seconds_after = 0.0, 0.0, 0.0
        self.restart(progress)

    def lap(self, progress: Progress) -> Speed:
        """Speed since the last call of any method: that of one step."""
        tokens, seconds = progress.tokens - self._tokens, self._since()
        self.restart(progress)
        self._laps.append((tokens, seconds))
        self._num_laps += 1
        if self._num_laps == SLOW_STEPS + 1:
            self._laps = collections.deque([(tokens, seconds)], maxlen=WINDOW)
        self._step_seconds += seconds
        speed = tokens / max(seconds, 1e-9)
        return Speed(speed, mfu(speed, self._flops, self._peak))

    def pause(self, progress: Progress, *, times_after: float = 0.0) -> None:
        """Counts the time since the last call as evaluating or saving, which go on to take their share.

        Args:
            progress: where the run is.
            times_after: how often the work just done, an evaluation, will be done after the last step; 0: unknown.
        """
        seconds = self._since()
        self._other_seconds += seconds
        if times_after:
            self._seconds_after = times_after * seconds
        self.restart(progress)

    def restart(self, progress: Progress) -> None:
        """Counts the time since the last call as nothing: it will not come again (compilation)."""
        self._tokens, self._time = progress.tokens, self._now()

    def seconds_left(self, tokens: int) -> float:
        """How long a run with `tokens` to go will take, evaluations and checkpoints included; NaN before a lap."""
        seconds = sum(seconds for _, seconds in self._laps)
        seen = sum(tokens for tokens, _ in self._laps)
        if not seen:
            return float("nan")
        training = max(0, tokens) * seconds / seen * (1.0 + self._other_seconds / max(self._step_seconds, 1e-9))
        return training + self._seconds_after

    def _since(self) -> float:
        return self._now() - self._time


class ProgressBar:
    """Tokens done, speed, time left and the newest loss: a bar on a terminal, elsewhere a line every 5 percent."""

    def __init__(self, console: rich.console.Console, *, total_tokens: int, done: int) -> None:
        self._console, self._total = console, total_tokens
        self._has_bar = has_bar(console)
        columns = (
            rich.progress.TextColumn("step {task.fields[step]}"),
            rich.progress.BarColumn(),
            rich.progress.TaskProgressColumn(),
            rich.progress.TextColumn("loss {task.fields[loss]:.4f}"),
            rich.progress.TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("{task.fields[left]}"),
        )
        self._bar = rich.progress.Progress(*columns, console=console, disable=not self._has_bar)
        self._task = self._bar.add_task(
            "", total=total_tokens, completed=done, step=0, loss=float("nan"), speed=0.0, left=""
        )
        self._num_shown, self._last_percent = 0, -1
        self._bar.start()

    def show(self, row: dict[str, Any], seconds_left: float) -> None:
        """Moves the bar to a row of metrics; without a terminal prints a line now and then."""
        self._num_shown += 1
        is_early = self._num_shown < FIRST_ESTIMATE
        left = "" if is_early else f"{seconds_left / 60:.1f} min left"
        speed, tokens = row["tokens_per_s"], row["tokens"]
        self._bar.update(self._task, completed=tokens, step=row["step"], loss=row["main_loss"], speed=speed, left=left)
        percent = 100 * tokens // self._total
        if self._has_bar or (is_early and tokens < self._total) or percent // 5 == self._last_percent // 5:
            return
        done = f"training {percent:3d} %  step {row['step']}  loss {row['main_loss']:.4f}  {speed:,.0f} tokens/s"
        self.log(f"{done}  {left}" if tokens < self._total else done)  # the results announce themselves
        self._last_percent = percent

    def log(self, text: str) -> None:
        """One line above the bar."""
        self._console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.stop()


def announced(items: Iterable[T], *, total: int, name: str, console: rich.console.Console) -> Iterator[T]:
    """`items`, of which there are `total`; says how long the work on them will take once that is seen to be long.

    The time is measured on the first items but one, which may compile.
    """
    start, is_announced = time.monotonic(), False
    with rich.progress.Progress(console=console, transient=True, disable=True) as bar:
        task = bar.add_task(name, total=total)
        for i, item in enumerate(items):
            if i == 1:
                start = time.monotonic()
            seconds = time.monotonic() - start
            if not is_announced and i > 1 and seconds > 1.0:
                left = seconds / (i - 1) * (total - i)
                is_announced = True
                if left > ANNOUNCED_AFTER_S:
                    console.print(f"{name}: {left / 60:.1f} min left", markup=False, highlight=False)
                    if has_bar(console):
                        bar.disable = False
                        bar.start()
            bar.update(task, completed=i)
            yield item


def has_bar(console: rich.console.Console) -> bool:
    """Whether a bar can move on this console."""
    return console.is_terminal and not console.is_dumb_terminal
