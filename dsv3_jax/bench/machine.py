"""What a measurement ran on: processor, versions, commit, memory, and the rate of a large matmul."""

import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from dsv3_jax.training.throughput import measure_matmul_peak
from dsv3_jax.typing import DType


def describe(dtype: DType) -> dict[str, Any]:
    """Device, versions, commit, and `matmul_gflops`: what a large matmul in `dtype` reaches here and now."""
    device = jax.devices()[0]
    return {
        "device": _cpu_name() if device.platform == "cpu" else device.device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "matmul_gflops": measure_matmul_peak(dtype) / 1e9,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        },
        "commit": _commit(),
    }


def peak_memory_gib() -> float:
    """The most memory this process ever held: on the device if it says so, else resident on the host."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**30
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / 2**30 if sys.platform == "darwin" else largest / 2**20


def _commit() -> str:
    """Short hash of the source's commit, with "+" when files differ from it; "unknown" outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short", "HEAD")
        return commit + ("+" if commit and git("status", "--porcelain", "--untracked-files=no") else "") or "unknown"
    except FileNotFoundError:  # no git on this machine
        return "unknown"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
