"""How far a kernel's result is from the truth, by the measures DeepGEMM and FlashMLA are accepted with."""

import numpy as np
from numpy.typing import ArrayLike


def calc_diff(x: ArrayLike, y: ArrayLike) -> float:
    """1 - 2 Σxy / Σ(x² + y²) over the whole tensors in float64; 0 if both are zero. DeepGEMM accepts FP8 below 1e-3."""
    x64, y64 = np.asarray(x, np.float64), np.asarray(y, np.float64)
    denominator = float((x64 * x64 + y64 * y64).sum())
    return 0.0 if denominator == 0 else 1 - 2 * float((x64 * y64).sum()) / denominator


def cos_diff(x: ArrayLike, y: ArrayLike) -> float:
    """1 - 2 Σxy / max(Σ(x² + y²), 1e-12) in float64. FlashMLA accepts outputs below 5e-6."""
    x64, y64 = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return 1 - 2 * float((x64 * y64).sum()) / max(float((x64 * x64 + y64 * y64).sum()), 1e-12)


def flash_mismatch(
    actual: ArrayLike, expected: ArrayLike, *, absolute: float, relative: float, cosine: float
) -> str | None:
    """What FlashMLA's tests would reject, or None: its rule for outputs and log-sum-exps.

    NaN and infinities must be in the same places with the same sign. Everywhere else an element passes if its absolute
    or its relative error is small enough, and `cos_diff` over all of them must be below `cosine`.
    """
    a, e = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if a.shape != e.shape:
        return f"shape {a.shape} instead of {e.shape}"
    is_finite = np.isfinite(e)
    if not np.array_equal(a[~is_finite], e[~is_finite], equal_nan=True) or not np.isfinite(a[is_finite]).all():
        return "NaN or infinities in other places"
    a, e = a[is_finite], e[is_finite]
    error = np.abs(a - e)
    fails = (error > absolute) & (error > relative * np.abs(e))
    if fails.any():
        worst = int(np.argmax(np.where(fails, error, 0)))
        return f"{int(fails.sum())} of {a.size} elements, the worst {a[worst]} instead of {e[worst]}"
    if not e.any() and not a.any():
        return None  # of zeros the cosine means nothing
    difference = cos_diff(a, e)
    return None if difference <= cosine else f"cos_diff {difference:.2e} over {cosine:.0e}"
