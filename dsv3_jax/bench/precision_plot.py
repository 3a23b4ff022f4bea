"""The comparison of precisions as a picture: smoothed losses, and how far they are from bf16's."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dsv3_jax.bench.precision_errors import BASE, LAST, WINDOW, Losses, errors
from dsv3_jax.training.plot import smooth

COLORS = ("C0", "0.3", "C2", "C3", "C4")
BOUND = 0.25
"""Percent: the report's bound."""


def plot(path: Path, found: Losses, labels: Mapping[str, str], title: str) -> None:
    """Writes a PNG: losses above, below their errors against bf16, as thin lines of single seeds and a thick mean."""
    figure = Figure(figsize=(9, 9), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    above, below = figure.subplots(2, 1)
    steps = len(next(iter(found[BASE].values())))
    start = min(WINDOW, steps - 1)
    lowest, highest = -2 * BOUND, 2 * BOUND
    for color, (name, by_seed) in zip(COLORS, found.items(), strict=False):
        mean = np.mean([smooth(loss, WINDOW) for loss in by_seed.values()], axis=0)
        above.plot(mean, color=color, linewidth=1.2, label=f"{labels[name]}, {len(by_seed)} seeds")
        if name == BASE:
            continue
        error = 100 * errors(found, name)
        below.plot(error, color=color, linewidth=1.8, label=labels[name])
        for seed in set(by_seed) & set(found[BASE]):
            below.plot(100 * errors(found, name, [seed]), color=color, linewidth=0.5, alpha=0.6)
        lowest, highest = min(lowest, 1.1 * error[start:].min()), max(highest, 1.1 * error[start:].max())
    below.axhspan(-BOUND, BOUND, color="0.9", zorder=0, label=f"{BOUND} %")
    below.axvline(steps - LAST, color="0.6", linestyle=":", label=f"judged from here: the last {LAST} steps")
    below.set_ylim(lowest, highest)
    above.set_ylabel("nats a token")
    below.set_ylabel("relative error against bf16, %")
    for panel in (above, below):
        panel.set_xlabel(f"optimizer step (running mean of {WINDOW})")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
