"""Seconds of one launch on torch's side, by the clocks of `gpu/timing.py`."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

SAMPLES = 5
ENOUGH = 0.2
"""Seconds on the clock after which no sample is added: slow ways are not the best ones."""


def seconds_per_launch(torch: Any, launches: Sequence[Callable[[], Any]], clock: str) -> float:
    """Median over samples of the mean over the launches of one.

    The clock is CUPTI's time of the kernels, by torch's own profiler, or the wall clock of a CUDA graph of them all.
    """

    def launch_all() -> list[Any]:
        return [launch() for launch in launches]

    launch_all()
    torch.cuda.synchronize()
    sample = _kernel_sample(torch, launch_all) if clock.startswith("CUPTI") else _graph_sample(torch, launch_all)
    samples = [sample()]
    while len(samples) < SAMPLES and sum(samples) < ENOUGH:
        samples.append(sample())
    return statistics.median(samples) / len(launches)


def _kernel_sample(torch: Any, launch_all: Callable[[], Any]) -> Callable[[], float]:
    activity = torch.profiler.ProfilerActivity.CUDA

    def sample() -> float:
        with torch.profiler.profile(activities=[activity]) as profile:
            launch_all()
            torch.cuda.synchronize()
        return kernel_seconds(profile.key_averages(), torch.autograd.DeviceType.CUDA)

    return sample


def kernel_seconds(events: Iterable[Any], gpu: Any) -> float:
    """What ran on the GPU; without what else the profiler books there, calls and regions that hold the same kernels."""
    kernels = [event for event in events if event.device_type == gpu and not event.is_user_annotation]
    if not kernels:
        raise RuntimeError("the profiler saw no kernels")
    return sum(event.self_device_time_total for event in kernels) / 1e6


def _graph_sample(torch: Any, launch_all: Callable[[], Any]) -> Callable[[], float]:
    """Captured on the stream in use: a backward pass runs on the stream of its forward pass."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        launch_all()

    def sample() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    return sample
