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
    """That a token is one that the row may draw, whichever way what is all but equal was rounded."""
    assert logits[token] > -np.inf
    if how["temperature"] == 0:
        assert logits[token] >= logits.max() - 10 * rounding
        return
    key = jax.random.fold_in(jax.random.key(np.uint32(seed), impl="threefry2x32"), position)
    scaled = (logits - logits.max()) / how["temperature"]
    narrow, wide = (allowed(scaled, how, nudge) for nudge in (-rounding, rounding))
    if 0 < how["top_k"] <= min(FEW, len(scaled)):
        order = np.array(sorted(range(len(scaled)), key=lambda v: (-scaled[v], v))[:FEW])
        found = {
            int(order[place])
            for is_in in (narrow, wide)
            for place in draws(scaled[order], is_in[order], key, 0, rounding)
        }
    else:
        found = tried(scaled, np.ones(len(scaled), bool), narrow, wide, key, rounding)
    assert token in found


FEW, BLOCK = 64, 64


def tried(scaled, is_left, narrow, wide, key, rounding, attempt: int = 0) -> set[int]:
    """Tokens that may be drawn in the end: one that is refused leaves those before it to the next attempt."""
    found = set()
    for token in draws(scaled, is_left, key, attempt, rounding):
        if wide[token]:
            found.add(token)
        if not narrow[token]:
            is_before = (scaled > scaled[token]) | ((scaled == scaled[token]) & (np.arange(len(scaled)) < token))
            if is_before.any():
                found |= tried(scaled, is_before, narrow, wide, key, rounding, attempt + 1)
    return found


def draws(scaled, is_left, key, attempt: int, rounding: float) -> set[int]:
    """Tokens that one attempt may draw from those that are left: the first of a block of tokens, then of its tokens."""
    blocks = np.pad(np.where(is_left, scaled, -np.inf), (0, -len(scaled) % BLOCK), constant_values=-np.inf)
    blocks = blocks.reshape(-1, BLOCK)
    noise = jax.random.gumbel(jax.random.fold_in(key, attempt), (len(blocks) + BLOCK,))
    noise = np.asarray(noise, np.float64)
    with np.errstate(divide="ignore"):
        mass = np.log(np.exp(blocks).sum(1))
    chosen = highest(mass + noise[: len(blocks)], rounding)
    return {
        int(block * BLOCK + place)
        for block in chosen
        for place in highest(blocks[block] + noise[len(blocks) :], rounding)
    }


def highest(noisy: np.ndarray, rounding: float) -> np.ndarray:
    """Places of all that may be the highest."""
    best = noisy.max()
    return np.flatnonzero(noisy >= best - 10 * rounding * max(1, abs(best)))
