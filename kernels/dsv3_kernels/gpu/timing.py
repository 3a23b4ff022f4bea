"""Seconds of one launch on a GPU, from programs that launch it many times on inputs that the L2 cache has forgotten.

A program is one jitted function of several sets of inputs, one launch a set, back to back without the host in between.
Before a set comes round again all others were read, together four times an H100's L2 (50 MB), so that every launch
finds its inputs in the main memory and somebody else's results in the cache, as a layer of a model does.

The clock is CUPTI's time of each kernel, as in DeepGEMM's own bench (it leaves out the gaps between launches), summed
over the kernels of a launch. Where CUPTI cannot be used the wall clock of a whole program serves, divided by
its launches: an upper bound, by some microseconds a launch.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

KERNEL_CLOCK, WALL_CLOCK = "CUPTI kernel time", "wall clock of repeated launches"

_L2_BYTES = 50e6
_FORGETTING = 4
_MOST_SETS = 32


class Times(NamedTuple):
    """Seconds of one launch of a function."""

    median: float
    least: float
    most: float
    kernels: tuple[float, ...] = ()
    """Median of each of its kernels, in their order; () where the clock does not separate them."""


def num_input_sets(num_bytes: float) -> int:
    """Sets of inputs so that those between two uses of one fill the L2 cache four times; 2 to 32."""
    return max(2, min(_MOST_SETS, 1 + -int(-_FORGETTING * _L2_BYTES // max(num_bytes, 1.0))))


def repeated(function: Callable[[Any], Any]) -> Callable[[Sequence[Any]], list[Any]]:
    """One program of a launch for each set of inputs; lowered once, as the inner function is jitted, too."""
    launch = jax.jit(function)
    return jax.jit(lambda sets: [launch(inputs) for inputs in sets])


def seconds_per_launch(function: Callable[[Any], Any], sets: Sequence[Any], *, clock: str, samples: int) -> Times:
    """Median, fastest and slowest launch of `function` over `samples` runs of the program.

    Raises: whatever tracing `function` raises; RuntimeError if CUPTI gives nothing.
    """
    program = repeated(function)
    jax.block_until_ready(program(sets))  # compiles; picks algorithms
    if clock != KERNEL_CLOCK:
        return summed([(seconds,) for _ in range(samples) for seconds in _wall_seconds(program, sets)])._replace(
            kernels=()
        )
    return summed([launch for _ in range(samples) for launch in _kernel_seconds(program, sets)])


def summed(launches: Sequence[tuple[float, ...]]) -> Times:
    """Of launches, each given by its kernels."""
    seconds = [sum(launch) for launch in launches]
    is_even = len({len(launch) for launch in launches}) == 1
    kernels = tuple(statistics.median(each) for each in zip(*launches, strict=True)) if is_even else ()
    return Times(statistics.median(seconds), min(seconds), max(seconds), kernels)


def usable_clock() -> tuple[str, str]:
    """The best clock that works here, and why it is not CUPTI ("" if it is)."""
    try:
        _kernel_seconds(repeated(lambda x: x + 1), [jax.numpy.zeros(1024), jax.numpy.ones(1024)])
    except (ImportError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        return WALL_CLOCK, f"CUPTI cannot be used here ({type(error).__name__}: {error})"
    return KERNEL_CLOCK, ""


def _kernel_seconds(program: Callable[[Sequence[Any]], Any], sets: Sequence[Any]) -> list[tuple[float, ...]]:
    """Times on the GPU of the kernels of each launch of one run."""
    from jax.experimental.mosaic.gpu import profiler  # needs a jax that this package does not ask for elsewhere

    _, kernels = profiler.measure(program, aggregate=False)(sets)
    if not kernels:
        raise RuntimeError("CUPTI saw no kernels")
    return split_launches([milliseconds / 1e3 for _, milliseconds in kernels], len(sets))


def split_launches(kernels: Sequence[float], launches: int) -> list[tuple[float, ...]]:
    """Kernel times in the order of their launch -> those of each launch; their mean, if they do not divide evenly."""
    if len(kernels) % launches:
        return [(sum(kernels) / launches,)] * launches
    each = len(kernels) // launches
    return [tuple(kernels[i * each : (i + 1) * each]) for i in range(launches)]


def _wall_seconds(program: Callable[[Sequence[Any]], Any], sets: Sequence[Any]) -> list[float]:
    start = time.perf_counter()
    jax.block_until_ready(program(sets))
    return [(time.perf_counter() - start) / len(sets)]
