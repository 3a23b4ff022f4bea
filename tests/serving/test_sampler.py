"""From logits to a token: against a plain reading in float64, the frequencies of draws, and on what they depend."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.serving.edits import Edits
from dsv3_jax.serving.sampler import Sampling, logprobs_of, sample, top_logprobs
from dsv3_jax.typing import AnyArray
from tests.serving.plain_draws import allowed, check_draw

NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
sample_jit = jax.jit(sample)


def sampling(B: int, seed=None, **how) -> Sampling:
    """One number for all or one for each; a seed of its own for each row."""
    columns = {**NEUTRAL, **how, "seed": np.arange(B) if seed is None else seed}
    types = {"top_k": np.int32, "seed": np.uint32}
    return Sampling(
        **{name: np.broadcast_to(np.asarray(x, types.get(name, np.float32)), (B,)) for name, x in columns.items()}
    )


def some(rows: Any, *trees: Any) -> Any:
    """The same rows of each."""
    return jax.tree.map(lambda column: column[rows], trees)


@jax.jit
def _many(logits, positions, how):
    return jax.lax.map(lambda position: sample(logits, jnp.broadcast_to(position, logits.shape[:1]), how), positions)


def many(logits: AnyArray, count: int, **how) -> np.ndarray:
    """Tokens [count, B] of positions 0, 1, 2, ..."""
    return np.asarray(_many(logits, np.arange(count, dtype=np.int32), sampling(len(logits), **how)))


def check_row(token: int, logits: np.ndarray, position: int, how: Sampling, edits: Edits | None) -> None:
    """That one row's token is the one that a plain reading gives."""
    logits = logits.astype(np.float64)
    if edits is not None:
        logits = edited_by_hand(logits, position, Edits(*(np.asarray(x, np.float64) for x in edits)))
    numbers = {name: float(x) for name, x in how._asdict().items()}
    check_draw(token, logits, position, seed=int(how.seed), how=numbers)


def edited_by_hand(logits: np.ndarray, position: int, edits: Edits) -> np.ndarray:
    """One row, a token at a time."""
    out = logits.copy()
    for v in range(len(out)):
        if edits.counts[v] or edits.in_prompt[v]:
            out[v] = out[v] / edits.repetition if out[v] > 0 else out[v] * edits.repetition
        out[v] -= edits.frequency * edits.counts[v]
        out[v] -= edits.presence if edits.counts[v] else 0
        out[v] += edits.bias[v]
        if edits.is_stop[v] and position < edits.may_stop_from:
            out[v] = -np.inf
    return out


class Case(NamedTuple):
    logits: np.ndarray
    positions: np.ndarray
    how: Sampling
    edits: Edits


def case_of(seed: int, V: int = 131, B: int = 16) -> Case:
    """Rows of parameters, many at their ends: neutral, of one token, of all tokens."""
    rng = np.random.default_rng(seed)

    def ends(*values):
        return lambda low, high: np.where(rng.random(B) < 0.5, rng.choice(values, B), rng.uniform(low, high, B))

    def one_a_token(share):
        return rng.random((B, V)) < rng.choice([0, share], (B, 1))

    how = sampling(
        B,
        seed=rng.integers(0, 2**32, B),
        temperature=ends(0, 1, 1e-6, 50)(0.2, 3),
        top_k=ends(0, 1, V, V - 1, 64, 65)(0, V),
        top_p=ends(1, 1, 1e-6, 0.999)(0, 1),
        min_p=ends(0, 0, 1, 1e-6)(0, 0.5),
    )
    edits = Edits(
        counts=(rng.integers(1, 5, (B, V)) * one_a_token(0.2)).astype(np.int32),
        in_prompt=one_a_token(0.2),
        is_stop=one_a_token(0.05),
        bias=(rng.uniform(-100, 100, (B, V)) * one_a_token(0.05)).astype(np.float32),
        repetition=ends(1, 0.01, 100)(0.5, 2).astype(np.float32),
        presence=ends(0, 2, -2)(-2, 2).astype(np.float32),
        frequency=ends(0, 2, -2)(-2, 2).astype(np.float32),
        may_stop_from=rng.integers(0, 9, B).astype(np.int32),
    )
    edits.is_stop[:, 0] = False
    logits = rng.normal(0, rng.choice([0.1, 1, 5], (B, 1)), (B, V))
    logits = np.where(rng.random((B, 1)) < 0.2, np.round(logits), logits).astype(np.float32)  # many equal ones
    return Case(logits, rng.integers(0, 9, B).astype(np.int32), how, edits)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), is_edited=st.booleans())
def test_draws_are_those_of_a_plain_reading(seed: int, is_edited: bool) -> None:
    """Sixteen rows of parameters at a time, whatever they share a batch with."""
    case = case_of(seed)
    edits = case.edits if is_edited else None
    tokens = np.asarray(sample_jit(case.logits, case.positions, case.how, edits))
    for row, token in enumerate(tokens):
        logits, position, how, row_edits = some(row, case.logits, case.positions, case.how, edits)
        check_row(int(token), logits, int(position), how, row_edits)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_seed_gives_the_same_tokens_alone_and_among_fifteen_neighbours(seed: int) -> None:
    """And in any other row, and beside neighbours that are greedy, cut, edited or nothing of these."""
    case = case_of(seed)
    together = np.asarray(sample_jit(*case))
    other = case_of(seed + 1)
    rng = np.random.default_rng(seed)
    for row in rng.choice(16, 4, replace=False):
        alone = sample_jit(*some([row], *case))
        np.testing.assert_array_equal(alone, together[[row]])
        place = int(rng.integers(16))
        assert sample_jit(*_put(other, place, *some(row, *case)))[place] == together[row]


def _put(case: Case, place: int, *row: Any) -> Case:
    """The case with one row replaced."""

    def replaced(column, value):
        out = np.array(column)
        out[place] = value
        return out

    return Case(*jax.tree.map(replaced, tuple(case), row))


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = jnp.asarray([[1.0, 3.0, 3.0, -1.0], [2.0, 2.0, 2.0, 2.0], [-5.0, -9.0, -5.0, -6.0]])
    tokens = sample_jit(logits, jnp.arange(3), None)
    np.testing.assert_array_equal(tokens, [1, 0, 0])
    assert tokens.dtype == jnp.int32


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.5}, {0, 1, 2}),
        ({"min_p": 1.0}, {0, 1, 2, 3, 4, 5}),
        ({"top_k": 4, "top_p": 0.5}, {0, 1}),
        ({"top_k": 5, "top_p": 0.5}, {0, 1, 2}),
    ],
    ids=str,
)
def test_of_equal_tokens_the_lowest_ids_are_allowed(how, expected) -> None:
    logits = np.concatenate([np.zeros((1, 6), np.float32), np.full((1, 3), -1, np.float32)], axis=1)
    logits = logits[:, :6] if how == {"top_p": 0.5} else logits
    assert set(many(logits, 200, **how)[:, 0].tolist()) == expected


def test_top_p_of_one_allows_every_token() -> None:
    """Even where the running sum of a large vocabulary rounds to 1 before its end."""
    logits = np.zeros((2, 5000), np.float32)
    logits[:, :4990] = 12
    drawn = many(logits, 300, temperature=[40.0, 40.0], top_p=[1.0, 0.5])
    assert (drawn[:, 0] > 4900).any()
    assert drawn[:, 1].max() < 2500


@pytest.mark.parametrize(
    "how", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-6}, {"temperature": 1e-42}], ids=str
)
def test_extremes_are_greedy(how) -> None:
    logits = np.random.default_rng(1).normal(0, 4, (5, 17)).astype(np.float32)
    drawn = many(logits, 50, **how)
    np.testing.assert_array_equal(drawn, np.broadcast_to(logits.argmax(-1), drawn.shape))


FREQUENCIES = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 3},
    {"top_p": 0.7},
    {"min_p": 0.3},
    {"top_k": 5, "top_p": 0.6},
    {"temperature": 1.5, "top_k": 8, "top_p": 0.9, "min_p": 0.1},
]


@pytest.mark.parametrize("how", FREQUENCIES, ids=str)
def test_frequencies_are_the_probabilities(how) -> None:
    logits = np.random.default_rng(2).normal(0, 1.5, (2, 9)).astype(np.float32)
    scaled = logits.astype(np.float64) / how.get("temperature", 1.0)
    count = 20000
    drawn = many(logits, count, seed=[3, 4], **how)
    for b in range(2):
        mask = allowed(scaled[b], NEUTRAL | how)
        p = np.where(mask, np.exp(scaled[b]), 0)
        seen, expected = np.bincount(drawn[:, b], minlength=9), count * p / p.sum()
        assert (seen[~mask] == 0).all()
        chi_square = ((seen[mask] - expected[mask]) ** 2 / expected[mask]).sum()
        assert chi_square < 30, (how, seen, expected)  # at most 8 degrees of freedom: one in 5000


def test_seeds_and_positions_are_independent() -> None:
    drawn = many(np.zeros((2, 4), np.float32), 4000)
    assert abs((drawn[:, 0] == drawn[:, 1]).mean() - 0.25) < 0.04
    assert abs((drawn[1:, 0] == drawn[:-1, 0]).mean() - 0.25) < 0.04
    assert abs((drawn[1:, 0] == drawn[:-1, 1]).mean() - 0.25) < 0.04


def test_rows_without_a_number_harm_no_other() -> None:
    """Whatever they draw is a token, and their neighbours draw what they always do."""
    logits = np.random.default_rng(3).normal(0, 1, (3, 40)).astype(np.float32)
    how = sampling(3, top_p=0.6, top_k=10, min_p=0.1)
    expected = np.asarray(sample_jit(logits, np.arange(3), how))
    for bad in (np.nan, np.inf, -np.inf):
        spoilt = logits.copy()
        spoilt[1] = bad
        tokens = np.asarray(sample_jit(spoilt, np.arange(3), how))
        np.testing.assert_array_equal(tokens[[0, 2]], expected[[0, 2]])
        assert 0 <= tokens[1] < 40


def test_bfloat16_logits_are_sampled_in_float32() -> None:
    """256 equal logits and one a little higher: the difference is there, and no probability is rounded away."""
    logits = jnp.zeros((1, 257), jnp.bfloat16).at[0, 256].set(4.0)
    drawn = many(logits, 4000)
    share = np.exp(4.0) / (256 + np.exp(4.0))
    assert abs((drawn == 256).mean() - share) < 4 * np.sqrt(share / 4000)
    assert len(np.unique(drawn)) == 257


def test_logprobs_are_those_of_the_whole_distribution() -> None:
    """With their ranks and the likeliest tokens; of equal ones the lowest ids first."""
    logits = np.random.default_rng(5).normal(0, 30, (4, 13)).astype(np.float32)
    logits[3] = np.round(logits[3] / 20)
    tokens = np.array([0, 5, 12, 5], np.int32)
    wide = logits.astype(np.float64)
    logprobs = wide - np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1, keepdims=True)) - wide.max(-1)[:, None]
    rows = np.arange(4)
    np.testing.assert_allclose(logprobs_of(jnp.asarray(logits), jnp.asarray(tokens)), logprobs[rows, tokens], rtol=1e-5)
    found = top_logprobs(jnp.asarray(logits), jnp.asarray(tokens), width=6)
    np.testing.assert_allclose(found.logprob, logprobs[rows, tokens], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.rank, (wide >= wide[rows, tokens][:, None]).sum(-1))
    expected = np.argsort(-wide, axis=-1, kind="stable")[:, :6]
    np.testing.assert_array_equal(found.top_ids, expected)
    np.testing.assert_allclose(found.top_logprobs, np.take_along_axis(logprobs, expected, -1), rtol=1e-5, atol=1e-6)


def test_a_sampler_sorts_nothing_and_skips_what_no_row_asks_for() -> None:
    """Its program has no sort; what a greedy batch runs is an argmax alone: all else is behind conditions."""
    case = case_of(0)
    jaxpr = jax.make_jaxpr(sample)(case.logits, case.positions, case.how)
    every = {str(equation.primitive) for equation in _equations(jaxpr.jaxpr)}
    assert {"top_k", "while", "exp", "random_bits"} <= every
    assert "sort" not in every
    always = {str(equation.primitive) for equation in _equations(jaxpr.jaxpr, into=lambda name: name != "cond")}
    assert not always & {"top_k", "while", "exp", "log", "random_bits", "random_wrap"}, always


def _equations(jaxpr: Any, into=lambda name: True):
    """All of them, those within others too."""
    for equation in jaxpr.eqns:
        yield equation
        inner = jax.tree.leaves(list(equation.params.values())) if into(str(equation.primitive)) else []
        for each in inner:
            if hasattr(each, "jaxpr"):
                yield from _equations(each.jaxpr, into)
