"""A progress bar for work that takes long."""

import contextlib
import threading
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_AFTER_S = 10.0


@contextlib.contextmanager
def progress(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Gives `advance(amount)`; a bar appears on standard output after ten seconds, on a terminal alone.

    It shows the time left, or without a `total` the time taken, and moves during long calls of native code too.
    """
    console = Console()
    times = TimeRemainingColumn() if total else TimeElapsedColumn()
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), times
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(label, total=total)
    start = threading.Timer(_AFTER_S, bar.start)
    start.daemon = True
    start.start()
    try:
        yield lambda amount: bar.advance(task, amount)
    finally:
        start.cancel()
        start.join()
        if bar.live.is_started:
            bar.stop()
