"""Times torch's scaled FP8 matmul in a process of its own: `python torch_peer.py`, shapes in, seconds out, as JSON.

Runs in any Python that has torch, which is no dependency of this package. Standard input holds
{"clock": ..., "shapes": [[m, n, k, sets], ...]}; standard output {"version": ..., "seconds": {name: [...]}} or
{"missing": reason}. The clocks are those of `timing.py`: kernel times from torch's own CUPTI profiler, or the wall
clock of a CUDA graph of the launches. One scale an operand; "fast" lets the tensor cores add without promotion.
"""

import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

SAMPLES = 5


def main() -> None:
    """Answers one request."""
    request = json.load(sys.stdin)
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        print(json.dumps({"missing": "torch not installed"}))
        return
    if not torch.cuda.is_available():
        print(json.dumps({"missing": f"torch {torch.__version__} sees no GPU"}))
        return
    seconds: dict[str, list[float | None]] = {"torch": [], "torch fast": []}
    for m, n, k, sets in request["shapes"]:
        for name, is_fast in (("torch", False), ("torch fast", True)):
            seconds[name].append(_seconds(torch, m, n, k, sets, is_fast, request["clock"]))
    print(json.dumps({"version": torch.__version__, "seconds": seconds}))


def _seconds(torch: Any, m: int, n: int, k: int, sets: int, is_fast: bool, clock: str) -> float | None:
    """Median of one launch; None where torch refuses the shape."""

    def operand(rows: int) -> Any:
        return torch.randn(rows, k, device="cuda").to(torch.float8_e4m3fn)

    one = torch.ones((), device="cuda")
    pairs = [(operand(m), operand(n).t()) for _ in range(sets)]

    def launch_all() -> list[Any]:
        return [
            torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=is_fast)
            for a, b in pairs
        ]

    try:
        launch_all()
    except RuntimeError:
        return None
    torch.cuda.synchronize()
    sample = _kernel_sample(torch, launch_all) if clock.startswith("CUPTI") else _graph_sample(torch, launch_all)
    return statistics.median(sample() / sets for _ in range(SAMPLES))


def _kernel_sample(torch: Any, launch_all: Callable[[], Any]) -> Callable[[], float]:
    activity = torch.profiler.ProfilerActivity.CUDA

    def sample() -> float:
        with torch.profiler.profile(activities=[activity]) as profile:
            launch_all()
            torch.cuda.synchronize()
        return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6

    return sample


def _graph_sample(torch: Any, launch_all: Callable[[], Any]) -> Callable[[], float]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch_all()

    def sample() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    return sample


if __name__ == "__main__":
    main()
