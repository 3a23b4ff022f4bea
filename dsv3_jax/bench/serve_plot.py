"""Throughput and latencies of a server over the number of clients, as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dsv3_jax.config.check import UserError

_SHOWN = (("ttft", "C0"), ("tpot", "C2"), ("itl", "C3"))


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Writes a picture of the rows under "load": tokens a second, and medians with their 99th percentiles.

    Raises:
        UserError: it cannot be written.
    """
    rows = sorted(result["load"], key=lambda row: row["concurrency"])
    clients = [row["concurrency"] for row in rows]
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(str(result.get("url", result.get("config"))))
    rate, latency = figure.subplots(1, 2)
    rate.plot(clients, [row["output_throughput"] for row in rows], "o-", color="0.2")
    rate.set_ylabel("generated tokens a second")
    rate.set_ylim(bottom=0)
    for name, color in _SHOWN:
        found = [row for row in rows if f"median_{name}_ms" in row]
        at = [row["concurrency"] for row in found]
        latency.plot(
            at, [row[f"median_{name}_ms"] for row in found], "o-", color=color, label=f"{name.upper()}, median"
        )
        latency.plot(at, [row[f"p99_{name}_ms"] for row in found], "--", color=color, label="99th percentile")
    latency.set_ylabel("milliseconds")
    latency.set_yscale("log")
    latency.legend(frameon=False, fontsize=8)
    for panel in (rate, latency):
        panel.set_xlabel("clients")
        panel.set_xticks(clients, map(str, clients))
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {path}: cannot be written ({error}); give a .png in a folder that exists.") from error
