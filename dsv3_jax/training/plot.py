"""One picture of a run: loss on training and held-out text, and how evenly the experts are used."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]

DRAWN = ("tokens", "main_loss", "learning_rate", "grad_norm")


def plot_run(path: Path, title: str, rows: Rows, heldout: Rows, lines: Mapping[str, float], num_mtp: int) -> None:
    """Writes a PNG. Rows that lack a number which is drawn, or hold something else in its place, are left out.

    Args:
        path: file to write.
        title: above the picture.
        rows: of metrics.jsonl.
        heldout: of heldout.jsonl.
        lines: label -> bits per byte, drawn across the panel of bits per byte (compressors).
        num_mtp: how many of the last layers in `load_max_over_mean` are MTP modules.
    """
    rows = _alike([row for row in rows if _has_numbers(row, *DRAWN)], "load_max_over_mean", "mtp_loss")
    heldout = [row for row in heldout if _has_numbers(row, "tokens", "loss", "bits_per_byte")]
    figure = Figure(figsize=(13, 8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13)
    ((loss, bits), (load, rate)) = figure.subplots(2, 2)
    _loss_panel(loss, rows, heldout)
    _bits_panel(bits, heldout, lines)
    _load_panel(load, rows, num_mtp)
    _rate_panel(rate, rows)
    for panel in (loss, bits, load, rate):
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlabel("tokens (millions)")
    figure.savefig(path, dpi=110)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Running mean over the last `window` values, over fewer at the start."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - window)
    return (sums[end] - sums[start]) / (end - start)


def _loss_panel(panel: Any, rows: Rows, heldout: Rows) -> None:
    tokens, main = _column(rows, "tokens") / 1e6, _column(rows, "main_loss")
    if len(main):
        panel.plot(tokens, main, color="C0", alpha=0.25, linewidth=0.7)
        panel.plot(tokens, smooth(main, _window(rows)), color="C0", label="training")
        if rows[0]["mtp_loss"]:
            mtp = np.array([np.mean(row["mtp_loss"]) for row in rows])
            panel.plot(tokens, smooth(mtp, _window(rows)), color="C2", label="training, token after next (MTP)")
        low = np.percentile(main, 0.5)
        panel.set_ylim(bottom=max(0.0, 0.9 * low))
    if heldout:
        panel.plot(_column(heldout, "tokens") / 1e6, _column(heldout, "loss"), "o-", color="C3", ms=4, label="held out")
    panel.set_title("Loss")
    panel.set_ylabel("nats a token")
    _legend(panel)


def _bits_panel(panel: Any, heldout: Rows, lines: Mapping[str, float]) -> None:
    values = _column(heldout, "bits_per_byte")
    panel.plot(_column(heldout, "tokens") / 1e6, values, "o-", color="C3", ms=4, label="this model")
    styles = ("--", "-.", ":")
    for i, (label, value) in enumerate(lines.items()):
        panel.axhline(
            value, color="0.35", linestyle=styles[i % len(styles)], linewidth=1.2, label=f"{label}: {value:.2f}"
        )
    shown = [*values, *lines.values()]
    if shown:
        panel.set_ylim(0.9 * min(shown), min(max(shown) * 1.05, 2.0 * min(shown)))
    panel.set_title("Held-out text")
    panel.set_ylabel("bits per byte")
    _legend(panel)


def _load_panel(panel: Any, rows: Rows, num_mtp: int) -> None:
    ratios = np.array([row["load_max_over_mean"] for row in rows], float)
    if ratios.size:
        tokens, layers = _column(rows, "tokens") / 1e6, ratios.shape[1]
        colors = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.9, layers))
        for layer in range(layers):
            is_mtp = layer >= layers - num_mtp
            name = f"MTP {layer - (layers - num_mtp) + 1}" if is_mtp else f"MoE layer {layer + 1}"
            line = smooth(ratios[:, layer], _window(rows))
            panel.plot(tokens, line, color=colors[layer], linestyle="--" if is_mtp else "-", linewidth=1.3, label=name)
        panel.axhline(1.0, color="0.6", linewidth=1.0)
    panel.set_title("Expert load of a batch (1 = all alike)")
    panel.set_ylabel("busiest expert / mean")
    _legend(panel)


def _rate_panel(panel: Any, rows: Rows) -> None:
    tokens = _column(rows, "tokens") / 1e6
    panel.plot(tokens, _column(rows, "learning_rate"), color="C1")
    panel.set_ylabel("learning rate", color="C1")
    panel.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    norm = panel.twinx()
    norm.plot(tokens, _column(rows, "grad_norm"), color="C4", alpha=0.6, linewidth=0.7)
    norm.set_ylabel("gradient norm before clipping", color="C4")
    norm.set_yscale("log")
    norm.spines[["top"]].set_visible(False)
    panel.set_title("Learning rate, gradient norm")


def _legend(panel: Any) -> None:
    if panel.get_legend_handles_labels()[0]:
        panel.legend(frameon=False, fontsize=8)


def _has_numbers(row: Mapping[str, Any], *names: str) -> bool:
    return all(_is_number(row.get(name)) for name in names)


def _alike(rows: Rows, *names: str) -> Rows:
    """The rows whose lists `names` are as long as those of the last row that has them."""

    def lengths(row: Mapping[str, Any]) -> tuple[int, ...] | None:
        lists = [row.get(name) for name in names]
        if all(isinstance(items, list) and all(_is_number(item) for item in items) for items in lists):
            return tuple(len(items) for items in lists if items is not None)
        return None

    found = [lengths(row) for row in rows]
    wanted = next((each for each in reversed(found) if each is not None), None)
    return [row for row, each in zip(rows, found, strict=True) if each is not None and each == wanted]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _window(rows: Rows) -> int:
    return max(1, min(50, len(rows) // 10))


def _column(rows: Rows, name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], float)
