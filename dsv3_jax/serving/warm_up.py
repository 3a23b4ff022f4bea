"""Compilation of every program of a runner before the first request."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

COMPILED_AT_ONCE = 2
"""XLA compiles without Python's lock, so two programs keep two cores busy."""


class Program(NamedTuple):
    """One to be compiled."""

    name: str
    """With its shape, as `serve.py --print-shapes` lists it."""
    function: Any
    """A jitted one."""
    arguments: tuple[Any, ...]
    settings: dict[str, Any]


def compile_all(programs: list[Program], report: Callable[[int, int], None]) -> None:
    """Compiles `programs`, so that calls of their functions find them; calls report(done, total) after each."""
    with ThreadPoolExecutor(COMPILED_AT_ONCE, thread_name_prefix="compile") as pool:
        running = [pool.submit(_compile, program) for program in programs]
        try:
            for done, one in enumerate(as_completed(running), 1):
                one.result()
                report(done, len(programs))
        finally:
            for one in running:
                one.cancel()


def _compile(program: Program) -> None:
    program.function.lower(*program.arguments, **program.settings).compile()
