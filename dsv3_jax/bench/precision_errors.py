"""How far the losses of two precisions are apart.

The smoothed loss of an arm at a step is its running mean over the last `WINDOW` steps, averaged over the seeds that
both the arm and bf16 were trained from. The error at a step is its distance from bf16's smoothed loss, as a share of
it, and is judged at each of the last `LAST` steps. Seeds are averaged because training is chaotic: two runs of bf16
that start a millionth apart differ, for some hundred steps, by as much as is to be measured.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.training.log import METRICS, read_rows
from dsv3_jax.training.plot import smooth

BASE = "bf16"
"""The arm that all others are compared with."""

WINDOW = 100
"""Steps of the running mean."""

LAST = 200
"""Steps at the end at which the error is judged; their running means reach back `WINDOW` - 1 steps further."""

Losses = Mapping[str, Mapping[int, np.ndarray]]
"""The main model's loss of every step, by arm and seed."""


def seeds_in(out: Path) -> list[tuple[int, Path]]:
    """The folders OUT/seedN by N."""
    found = [(re.fullmatch("seed([0-9]+)", folder.name), folder) for folder in out.glob("seed*")]
    return sorted((int(match[1]), folder) for match, folder in found if match)


def read_losses(runs: Mapping[str, Mapping[int, Path]], *, steps: int) -> dict[str, dict[int, np.ndarray]]:
    """The losses of runs, by arm and seed, that reached step `steps`; the rest is left out."""
    found: dict[str, dict[int, np.ndarray]] = {name: {} for name in runs}
    for name, by_seed in runs.items():
        for seed, run_dir in by_seed.items():
            by_step = {row["step"]: row.get("main_loss") for row in read_rows(run_dir / METRICS)}
            loss = [by_step.get(step) for step in range(1, steps + 1)]
            if all(isinstance(value, float) for value in loss):
                found[name][seed] = np.array(loss)
    return {name: by_seed for name, by_seed in found.items() if by_seed}


def errors(found: Losses, name: str, seeds: Sequence[int] | None = None) -> np.ndarray:
    """The relative error of arm `name` at every step, over `seeds`, or over all that it shares with bf16."""
    seeds = _shared(found, name) if seeds is None else seeds
    base = np.mean([smooth(found[BASE][seed], WINDOW) for seed in seeds], axis=0)
    return np.mean([smooth(found[name][seed], WINDOW) for seed in seeds], axis=0) / base - 1


def summary(found: Losses) -> dict[str, dict[str, Any]]:
    """By arm: mean loss of the last steps, its error by seed, and the errors of the smoothed loss at those steps."""
    rows: dict[str, dict[str, Any]] = {}
    for name, by_seed in found.items():
        rows[name] = {"seeds": len(by_seed), "loss": float(np.mean([loss[-LAST:].mean() for loss in by_seed.values()]))}
        seeds = _shared(found, name)
        if name == BASE or not seeds:
            continue
        last = errors(found, name)[-LAST:]
        rows[name] |= {
            "seeds": len(seeds),
            "mean_error_by_seed": [
                float(by_seed[seed][-LAST:].mean() / found[BASE][seed][-LAST:].mean() - 1) for seed in seeds
            ],
            "mean_error": float(last.mean()),
            "mean_abs_error": float(abs(last).mean()),
            "max_abs_error": float(abs(last).max()),
            "max_abs_error_by_seed": [float(abs(errors(found, name, [seed])[-LAST:]).max()) for seed in seeds],
        }
    return rows


def table(rows: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str]) -> str:
    """The summary as text."""
    heads = ("mean error", "mean |error|", "largest", "largest of one seed")
    lines = [f"{'arm':40}{'seeds':>6}{'loss':>9}" + "".join(f"{head:>{len(head) + 3}}" for head in heads)]
    for name, row in rows.items():
        line = f"{labels[name]:40}{row['seeds']:6}{row['loss']:9.4f}"
        if "mean_error" in row:
            cells = (row["mean_error"], row["mean_abs_error"], row["max_abs_error"], max(row["max_abs_error_by_seed"]))
            line += "".join(f"{100 * cell:{len(head) + 2}.3f}%" for head, cell in zip(heads, cells, strict=True))
        lines.append(line)
    return "\n".join([*lines, f"Smoothed loss (running mean of {WINDOW}, mean of seeds) at the last {LAST} steps."])


def _shared(found: Losses, name: str) -> list[int]:
    return [seed for seed in found[name] if seed in found.get(BASE, {})]
