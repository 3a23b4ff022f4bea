"""A step's report as values that a log can hold."""

from typing import Any, NamedTuple

import numpy as np

from dsv3_jax.training.step import Rates, StepReport


class Progress(NamedTuple):
    """How far a run is: finished optimizer steps, and the tokens they saw (a Python integer of any size)."""

    step: int
    tokens: int


class Speed(NamedTuple):
    """How fast it goes: tokens a second, and the share of the devices' measured matmul rate."""

    tokens_per_s: float
    mfu: float


def load_ratio(load: np.ndarray) -> np.ndarray:
    """max/mean tokens of an expert, for each row of load[L, E]: 1 is perfect balance, E/K everything on K experts."""
    mean = load.mean(axis=-1)
    return np.where(mean > 0, load.max(axis=-1) / np.maximum(mean, 1e-30), 1.0)


def mfu(tokens_per_s: float, flops_per_token: float, peak_flops_per_s: float) -> float:
    """Model-FLOPs utilisation: useful operations a second over what all devices reach in a matmul."""
    return tokens_per_s * flops_per_token / peak_flops_per_s


def metrics_row(progress: Progress, report: StepReport, rates: Rates, speed: Speed) -> dict[str, Any]:
    """One line of metrics.jsonl, in plain Python values. Waits until the step has run.

    Everything but `tokens_per_s` and `mfu` is decided by configuration and data alone.
    """
    terms = report.terms
    return {
        "step": progress.step,
        "tokens": progress.tokens,
        "loss": float(report.loss),
        "main_loss": float(terms.main),
        "mtp_loss": _floats(terms.mtp),
        "balance_loss": _floats(terms.balance),
        "grad_norm": float(report.grad_norm),
        "learning_rate": float(rates.learning_rate),
        "mtp_weight": float(rates.mtp_weight),
        "bias_speed": float(rates.bias_speed),
        "load_max_over_mean": _floats(load_ratio(np.asarray(terms.load))),
        "dropped_tokens": [int(dropped) for dropped in np.asarray(terms.dropped)],
        "bias_min": _floats(report.bias_min),
        "bias_max": _floats(report.bias_max),
        "tokens_per_s": speed.tokens_per_s,
        "mfu": speed.mfu,
    }


def flat(row: dict[str, Any]) -> dict[str, float]:
    """The scalars of a row, a list becoming one entry an item: name/0, name/1, …"""
    scalars: dict[str, float] = {}
    for name, value in row.items():
        entries = {f"{name}/{i}": item for i, item in enumerate(value)} if isinstance(value, list) else {name: value}
        scalars |= {key: float(item) for key, item in entries.items() if isinstance(item, int | float)}
    return scalars


def _floats(values: Any) -> list[float]:
    return [float(value) for value in np.asarray(values)]
