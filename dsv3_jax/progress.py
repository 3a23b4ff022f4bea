"""A progress bar for work that turns out to be long."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import Progress

_AFTER_S = 10.0


@contextlib.contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Gives `advance(amount)`; a bar with the time left appears on stderr after ten seconds, on a terminal alone."""
    started = time.monotonic()
    console = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        bar = Progress(console=console, transient=True, disable=not console.is_terminal)
        task = bar.add_task(label, total=total)

        def advance(amount: int) -> None:
            if not bar.live.is_started and time.monotonic() - started > _AFTER_S:
                stack.enter_context(bar)
            bar.update(task, advance=amount)

        yield advance
