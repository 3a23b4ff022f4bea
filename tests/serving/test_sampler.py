"""From logits to a token: masks against a plain reading, and the frequencies of what is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.serving.sampler import greedy, keep_mask, sample

mask_jit = jax.jit(keep_mask)


def sampling(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> dict:
    return {"temperature": np.float32(temperature), "top_k": np.int32(top_k), "top_p": np.float32(top_p)}


def many(logits: np.ndarray, count: int, seed: int = 0, **how) -> np.ndarray:
    """Tokens [count, B]."""
    keys = jax.random.split(jax.random.key(seed), count)
    return np.asarray(_many(logits, keys, sampling(**how)))


_many = jax.jit(lambda logits, keys, how: jax.vmap(lambda key: sample(logits, key, **how))(keys))


def mask_by_hand(logits: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """One row and token at a time in float64."""
    out = np.zeros(logits.shape, bool)
    for b, row in enumerate(logits.astype(np.float64)):
        order = sorted(range(len(row)), key=lambda v: (-row[v], v))[: top_k or None]
        p = np.exp(row[order] - row[order[0]])
        p /= p.sum()
        mass = 0.0
        for v, share in zip(order, p):
            if mass >= top_p:
                break
            out[b, v] = True
            mass += share
    return out


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = jnp.asarray([[1.0, 3.0, 3.0, -1.0], [2.0, 2.0, 2.0, 2.0], [-5.0, -9.0, -5.0, -6.0]])
    np.testing.assert_array_equal(greedy(logits), [1, 0, 0])
    assert greedy(logits).dtype == jnp.int32


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), top_k=st.integers(0, 20), top_p=st.floats(0.01, 0.99))
def test_mask_by_hand(seed: int, top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(seed).normal(0, 3, (3, 13)).astype(np.float32)
    kept = np.asarray(mask_jit(logits, top_k=np.int32(top_k), top_p=np.float32(top_p)))
    # a mass within rounding of top_p may fall on either side
    either = [mask_by_hand(logits, top_k, np.float32(top_p) + nudge) for nudge in (-1e-5, 1e-5)]
    assert (either[0] <= kept).all()
    assert (kept <= either[1]).all()
    assert kept.any(axis=1).all()


def test_ties_keep_the_lowest_ids() -> None:
    logits = np.zeros((1, 6), np.float32)
    kept = mask_jit(logits, top_k=np.int32(2), top_p=np.float32(1.0))
    np.testing.assert_array_equal(kept, [[True, True, False, False, False, False]])
    half = mask_jit(logits, top_k=np.int32(0), top_p=np.float32(0.5))
    np.testing.assert_array_equal(half, [[True, True, True, False, False, False]])


def test_top_p_of_one_keeps_every_token() -> None:
    """Even where the running sum of a large vocabulary rounds to 1 before its end."""
    logits = np.random.default_rng(0).normal(0, 6, (4, 5000)).astype(np.float32)
    assert np.asarray(mask_jit(logits, top_k=np.int32(0), top_p=np.float32(1.0))).all()


@pytest.mark.parametrize("how", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}, {"temperature": 1e-42}], ids=str)
def test_extremes_are_greedy(how) -> None:
    logits = np.random.default_rng(1).normal(0, 4, (5, 17)).astype(np.float32)
    drawn = many(logits, 50, **how)
    np.testing.assert_array_equal(drawn, np.broadcast_to(greedy(jnp.asarray(logits)), drawn.shape))


@pytest.mark.parametrize(
    "how",
    [{}, {"temperature": 0.5}, {"temperature": 3.0}, {"top_k": 3}, {"top_p": 0.7}, {"top_k": 5, "top_p": 0.6}],
    ids=str,
)
def test_frequencies_are_the_probabilities(how) -> None:
    logits = np.random.default_rng(2).normal(0, 1.5, (2, 9)).astype(np.float32)
    scaled = logits / how.get("temperature", 1.0)
    kept = mask_by_hand(scaled, how.get("top_k", 0), how.get("top_p", 1.0))
    p = np.where(kept, np.exp(scaled.astype(np.float64)), 0)
    p /= p.sum(-1, keepdims=True)
    count = 20000
    drawn = many(logits, count, seed=3, **how)
    for b in range(2):
        seen = np.bincount(drawn[:, b], minlength=9)
        assert (seen[~kept[b]] == 0).all()
        expected = p[b][kept[b]] * count
        chi_square = ((seen[kept[b]] - expected) ** 2 / expected).sum()
        assert chi_square < 30, (how, seen, expected)  # 8 degrees of freedom: one in 5000


def test_rows_and_keys_are_independent() -> None:
    drawn = many(np.zeros((2, 4), np.float32), 4000)
    assert abs((drawn[:, 0] == drawn[:, 1]).mean() - 0.25) < 0.04
    assert abs((drawn[1:, 0] == drawn[:-1, 0]).mean() - 0.25) < 0.04


def test_bfloat16_logits_are_sampled_in_float32() -> None:
    """256 equal logits and one a little higher: the difference is there, and no probability is rounded away."""
    logits = jnp.zeros((1, 257), jnp.bfloat16).at[0, 256].set(4.0)
    drawn = np.asarray(_many(logits, jax.random.split(jax.random.key(0), 4000), sampling()))
    share = np.exp(4.0) / (256 + np.exp(4.0))
    assert abs((drawn == 256).mean() - share) < 4 * np.sqrt(share / 4000)
    assert len(np.unique(drawn)) == 257
