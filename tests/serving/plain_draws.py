"""How a token is drawn, one row at a time in float64: the twin of the sampler."""

from collections.abc import Mapping

import jax
import numpy as np


def allowed(scaled: np.ndarray, how: Mapping[str, float], nudge: float = 0.0) -> np.ndarray:
    """One row's tokens after min_p, top_k and top_p, in the order in which they are read."""
    order = sorted(range(len(scaled)), key=lambda v: (-scaled[v], v))
    share = np.exp(scaled - scaled.max())
    order = [v for v in order if share[v] >= how["min_p"] * (1 - nudge)] or order[:1]
    order = order[: int(how["top_k"]) or None]
    before = np.cumsum(share[order]) - share[order]
    at_most = (how["top_p"] + nudge) * share[order].sum() if how["top_p"] < 1 else np.inf
    out = np.zeros(len(scaled), bool)
    out[[v for v, mass in zip(order, before, strict=True) if mass < at_most] or order[:1]] = True
    return out


def check_draw(
    token: int, logits: np.ndarray, position: int, *, seed: int, how: Mapping[str, float], rounding: float = 1e-5
) -> None:
    """That a token is the one of the highest noisy logit among the allowed, but for the rounding of the logits."""
    assert logits[token] > -np.inf
    if how["temperature"] == 0:
        assert logits[token] >= logits.max() - 10 * rounding
        return
    key = jax.random.fold_in(jax.random.key(np.uint32(seed), impl="threefry2x32"), position)
    scaled = (logits - logits.max()) / how["temperature"]
    noisy = scaled + np.asarray(jax.random.gumbel(key, logits.shape), np.float64)
    narrow, wide = (allowed(scaled, how, nudge) for nudge in (-rounding, rounding))
    assert wide[token]
    assert noisy[token] >= noisy[narrow].max() - 10 * rounding * max(1, abs(noisy[token]))
