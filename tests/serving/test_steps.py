"""Prefill and decoding over the latent cache: what each row holds, and that nothing unused is ever read."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.functions import functions_for
from dsv3_jax.serving.steps import decode, decoding_weights, prefill

FLOAT32 = functions_for("float32")
BFLOAT16 = functions_for("bfloat16")

S, T = 14, 8
PADDING = np.array([0, 3, 7], np.int32)

prefill_jit = jax.jit(prefill, static_argnames=("cfg", "cache_size", "functions"))


@partial(jax.jit, static_argnames=("cfg", "functions"))
def decode_jit(cfg, variables, tokens, cache, *, functions):
    return decode(cfg, decoding_weights(cfg, variables, functions=functions), tokens, cache, functions=functions)


def tokens_of(cfg, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, cfg.vocab_size, (len(PADDING), count)).astype(np.int32)


@pytest.fixture(scope="module")
def started(model):
    cfg, variables = model
    tokens = tokens_of(cfg, T + 5)
    cache, logits = prefill_jit(cfg, variables, tokens[:, :T], PADDING, cache_size=S, functions=FLOAT32)
    return cfg, variables, tokens, cache, logits


def test_prefill_keeps_one_row_a_token(started) -> None:
    cfg, _, _, cache, _ = started
    assert cache.rows.shape == (cfg.num_layers, 3, S, cfg.mla.kv_latent_dim + cfg.mla.rope_head_dim)
    assert int(cache.length) == T
    np.testing.assert_array_equal(cache.padding, PADDING)
    assert np.isfinite(cache.rows).all()
    np.testing.assert_array_equal(cache.rows[:, :, T:], 0)


def test_every_step_equals_the_uncached_forward(started, uncached_logits) -> None:
    """With NaN in every row of the cache that no sequence may read: left padding and rows not yet written."""
    cfg, variables, tokens, cache, logits = started
    expected = uncached_logits(cfg, variables, [tokens[b, pad:] for b, pad in enumerate(PADDING)])
    for b, pad in enumerate(PADDING):
        np.testing.assert_allclose(logits[b], expected[b][T - 1 - pad], atol=1e-4)
    unused = np.arange(S)[None, :] < PADDING[:, None]
    unused |= np.arange(S)[None, :] >= T
    cache = cache._replace(rows=jnp.where(unused[None, :, :, None], jnp.nan, cache.rows))
    for step in range(5):
        cache, logits = decode_jit(cfg, variables, tokens[:, T + step], cache, functions=FLOAT32)
        assert int(cache.length) == T + step + 1
        for b, pad in enumerate(PADDING):
            np.testing.assert_allclose(logits[b], expected[b][T + step - pad], atol=1e-4)


def test_decoded_rows_equal_prefilled_rows(started) -> None:
    cfg, variables, tokens, cache, _ = started
    for step in range(5):
        cache, logits = decode_jit(cfg, variables, tokens[:, T + step], cache, functions=FLOAT32)
    at_once, last = prefill_jit(cfg, variables, tokens, PADDING, cache_size=S, functions=FLOAT32)
    real = np.arange(S)[None, :] >= PADDING[:, None]
    np.testing.assert_allclose(np.asarray(cache.rows)[:, real], np.asarray(at_once.rows)[:, real], atol=1e-4)
    np.testing.assert_allclose(logits, last, atol=2e-4)


def test_the_cache_can_be_filled_to_its_last_row(base) -> None:
    cfg, variables = base
    tokens = tokens_of(cfg, T + 1, 1)
    tight, _ = prefill_jit(cfg, variables, tokens[:, :T], PADDING, cache_size=T + 1, functions=FLOAT32)
    roomy, _ = prefill_jit(cfg, variables, tokens[:, :T], PADDING, cache_size=S, functions=FLOAT32)
    one, two = (decode_jit(cfg, variables, tokens[:, T], cache, functions=FLOAT32)[1] for cache in (tight, roomy))
    np.testing.assert_allclose(one, two, atol=1e-5)


@pytest.mark.slow
def test_bfloat16_cache_stays_near_float32(base, variables_of) -> None:
    cfg, variables = base
    narrow = variables_of(cfg, 0, jnp.bfloat16)
    tokens = tokens_of(cfg, T + 1, 2)
    results = {}
    for functions, held in ((FLOAT32, variables), (BFLOAT16, narrow)):
        cache, _ = prefill_jit(cfg, held, tokens[:, :T], PADDING, cache_size=S, functions=functions)
        cache, logits = decode_jit(cfg, held, tokens[:, T], cache, functions=functions)
        assert cache.rows.dtype == functions.compute_dtype
        assert logits.dtype == jnp.float32
        results[functions.name] = np.asarray(logits)
    error = results["bfloat16"] - results["float32"]
    assert np.linalg.norm(error) < 0.3 * np.linalg.norm(results["float32"])
