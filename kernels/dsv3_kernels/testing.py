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
