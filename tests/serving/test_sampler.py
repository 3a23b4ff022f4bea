"""From logits to a token: masks against a plain reading, the frequencies of what is drawn, and on what it depends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.serving.sampler import Sampling, allowed, logprobs_of, next_token

mask_jit = jax.jit(allowed)


def sampling(B: int, temperature=1.0, top_k=0, top_p=1.0, seed=None) -> Sampling:
    """One number for all or one for each; a seed of its own for each row."""

    def column(value, dtype):
        return np.broadcast_to(np.asarray(value, dtype), (B,))

    seed = np.arange(B) if seed is None else seed
    return Sampling(
        column(temperature, np.float32), column(top_k, np.int32), column(top_p, np.float32), column(seed, np.uint32)
    )


def many(logits: np.ndarray, count: int, **how) -> np.ndarray:
    """Tokens [count, B] of positions 0, 1, 2, ..."""
    return np.asarray(_many(logits, np.arange(count, dtype=np.int32), sampling(len(logits), **how)))


@jax.jit
def _many(logits, positions, how):
    def at(position):
        return next_token(logits, jnp.broadcast_to(position, logits.shape[:1]), how)

    return jax.vmap(at)(positions)


def mask_of(logits: np.ndarray, top_k, top_p) -> np.ndarray:
    how = sampling(len(logits), top_k=top_k, top_p=top_p)
    return np.asarray(mask_jit(logits, top_k=how.top_k, top_p=how.top_p))


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
    tokens = next_token(logits, jnp.arange(3), None)
    np.testing.assert_array_equal(tokens, [1, 0, 0])
    assert tokens.dtype == jnp.int32


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), top_k=st.integers(0, 20), top_p=st.floats(0.01, 0.99))
def test_mask_by_hand(seed: int, top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(seed).normal(0, 3, (3, 13)).astype(np.float32)
    kept = mask_of(logits, top_k, top_p)
    # a mass within rounding of top_p may fall on either side
    either = [mask_by_hand(logits, top_k, np.float32(top_p) + nudge) for nudge in (-1e-5, 1e-5)]
    assert (either[0] <= kept).all()
    assert (kept <= either[1]).all()
    assert kept.any(axis=1).all()


def test_of_equal_tokens_the_lowest_ids_are_allowed() -> None:
    logits = np.zeros((2, 6), np.float32)
    two, half = [True, True, False, False, False, False], [True, True, True, False, False, False]
    np.testing.assert_array_equal(mask_of(logits, [2, 0], [1.0, 0.5]), [two, half])


def test_top_p_of_one_allows_every_token() -> None:
    """Even where the running sum of a large vocabulary rounds to 1 before its end."""
    logits = np.random.default_rng(0).normal(0, 6, (4, 5000)).astype(np.float32)
    mask = mask_of(logits, 0, [1.0, 1.0, 0.5, 1.0])
    assert mask[[0, 1, 3]].all()
    assert not mask[2].all()


@pytest.mark.parametrize("how", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}, {"temperature": 1e-42}], ids=str)
def test_extremes_are_greedy(how) -> None:
    logits = np.random.default_rng(1).normal(0, 4, (5, 17)).astype(np.float32)
    drawn = many(logits, 50, **how)
    np.testing.assert_array_equal(drawn, np.broadcast_to(logits.argmax(-1), drawn.shape))


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
    drawn = many(logits, count, seed=[3, 4], **how)
    for b in range(2):
        seen = np.bincount(drawn[:, b], minlength=9)
        assert (seen[~kept[b]] == 0).all()
        expected = p[b][kept[b]] * count
        chi_square = ((seen[kept[b]] - expected) ** 2 / expected).sum()
        assert chi_square < 30, (how, seen, expected)  # 8 degrees of freedom: one in 5000


def test_seeds_and_positions_are_independent() -> None:
    drawn = many(np.zeros((2, 4), np.float32), 4000)
    assert abs((drawn[:, 0] == drawn[:, 1]).mean() - 0.25) < 0.04
    assert abs((drawn[1:, 0] == drawn[:-1, 0]).mean() - 0.25) < 0.04
    assert abs((drawn[1:, 0] == drawn[:-1, 1]).mean() - 0.25) < 0.04


def test_a_row_depends_on_nothing_but_itself() -> None:
    """Alone, in another row, beside neighbours that are greedy or cut or neither; a greedy row draws nothing."""
    rng = np.random.default_rng(4)
    logits = rng.normal(0, 2, (6, 31)).astype(np.float32)
    positions = rng.integers(0, 2**20, 6).astype(np.int32)
    how = sampling(
        6, [1.0, 0, 0.7, 2.0, 0, 1.5], [0, 0, 5, 0, 3, 0], [1.0, 1.0, 0.9, 1.0, 0.5, 0.8], rng.integers(0, 2**32, 6)
    )
    step = jax.jit(next_token)
    together = np.asarray(step(logits, positions, how))
    for rows in ([0], [5], [2, 0, 3], [3, 0, 2], [5, 4, 3, 2, 1, 0]):
        some = step(logits[rows], positions[rows], Sampling(*(column[rows] for column in how)))
        np.testing.assert_array_equal(some, together[rows])
    np.testing.assert_array_equal(together[[1, 4]], logits[[1, 4]].argmax(-1))
    same = step(logits[[0, 0]], positions[[0, 0]], Sampling(*(column[[0, 0]] for column in how)))
    np.testing.assert_array_equal(same, together[[0, 0]])


def test_bfloat16_logits_are_sampled_in_float32() -> None:
    """256 equal logits and one a little higher: the difference is there, and no probability is rounded away."""
    logits = jnp.zeros((1, 257), jnp.bfloat16).at[0, 256].set(4.0)
    drawn = many(logits, 4000)
    share = np.exp(4.0) / (256 + np.exp(4.0))
    assert abs((drawn == 256).mean() - share) < 4 * np.sqrt(share / 4000)
    assert len(np.unique(drawn)) == 257


def test_logprobs_are_those_of_the_whole_distribution() -> None:
    logits = np.random.default_rng(5).normal(0, 30, (4, 13)).astype(np.float32)
    tokens = np.array([0, 5, 12, 5], np.int32)
    wide = logits.astype(np.float64)
    expected = wide[np.arange(4), tokens] - np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1)) - wide.max(-1)
    np.testing.assert_allclose(logprobs_of(jnp.asarray(logits), jnp.asarray(tokens)), expected, rtol=1e-5)
