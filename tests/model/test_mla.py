"""MLA: absorbed equals naive, one token at a time or many, and nothing that is masked can leak."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config.model import YarnConfig
from dsv3_jax.model.attention import attend, attend_reference
from dsv3_jax.model.functions import functions_for
from dsv3_jax.model.mla import Context, latents, mla, queries
from dsv3_jax.model.rope import rope_table, softmax_scale
from dsv3_jax.serving.absorbed import absorb, attend_absorbed

FLOAT32 = functions_for("float32")


VARIANTS = {
    "plain": {"yarn": None},
    "yarn": {},
    "no_q_latent": {"mla": {"q_latent_dim": None}},
    "one_head": {"mla": {"num_heads": 1, "nope_head_dim": 1, "v_head_dim": 11, "rope_head_dim": 2}, "yarn": None},
}
S = 13  # rows of the cache; prompts use fewer


@pytest.fixture(scope="module", params=VARIANTS, ids=VARIANTS)
def case(request, config, variables_of):
    cfg = config(**VARIANTS[request.param])
    params = jax.tree.map(lambda leaf: leaf[1], variables_of(cfg, 1)["params"]["moe_layers"]["mla"])

    def rope(positions):
        return rope_table(positions, rope_dim=cfg.mla.rope_head_dim, theta=cfg.rope_theta, yarn=cfg.yarn)

    @jax.jit
    def naive(x, positions, segments):
        return mla(params, x, Context(rope(positions), segments), cfg=cfg, functions=FLOAT32)[0]

    @jax.jit
    def rows(x, positions):
        return jnp.concatenate(latents(params, x @ params["kv_down"], rope(positions), cfg=cfg), -1)

    @jax.jit
    def absorbed(x, positions, cache, q_segments, kv_segments, starts):
        q = queries(params, x, rope(positions), cfg=cfg, functions=FLOAT32)
        places = (cache, q_segments, kv_segments, starts)
        out = attend_absorbed(absorb(params, cfg=cfg), q, *places, cfg=cfg, functions=FLOAT32)
        return jnp.einsum("bthw,hwd->btd", out, params["out"])

    return cfg, naive, rows, absorbed


def test_absorbed_equals_naive_whatever_lies_in_unused_rows(case) -> None:
    """Random positions, left padding, and NaN in every cache row that no query may read."""
    cfg, naive, rows, absorbed = case
    for seed in range(3):
        rng = np.random.default_rng(seed)
        B, T = 2, 9
        x = jnp.asarray(rng.normal(0, 1, (B, T, cfg.model_dim)), jnp.float32)
        positions = jnp.asarray(rng.integers(0, 100, (B, T)))
        padding = np.array([0, rng.integers(1, T)])
        real = np.arange(T)[None, :] >= padding[:, None]
        expected = np.asarray(naive(x, positions, jnp.asarray(real.astype(np.int32))))

        stored = np.asarray(rows(x, positions))
        cache = np.full((B, S, stored.shape[-1]), np.nan, np.float32)
        cache[:, :T][real] = stored[real]
        segments = np.pad(real.astype(np.int32), ((0, 0), (0, S - T)))
        ones, starts = np.ones((B, T), np.int32), np.zeros(B, np.int32)
        out = np.asarray(absorbed(x, positions, cache, ones, segments, starts))
        np.testing.assert_allclose(out[real], expected[real], atol=3e-6)


def test_one_token_at_a_time_equals_naive(case) -> None:
    cfg, naive, rows, absorbed = case
    rng = np.random.default_rng(7)
    T = 6
    x = jnp.asarray(rng.normal(0, 1, (2, T, cfg.model_dim)), jnp.float32)
    positions = jnp.asarray(rng.integers(0, 100, (2, T)))
    expected = naive(x, positions, jnp.ones((2, T), jnp.int32))
    cache = np.full((2, S, cfg.mla.kv_latent_dim + cfg.mla.rope_head_dim), np.nan, np.float32)
    for t in range(T):
        now = slice(t, t + 1)
        cache[:, now] = rows(x[:, now], positions[:, now])
        segments = np.ones((2, 1), np.int32), np.ones((2, S), np.int32)
        out = absorbed(x[:, now], positions[:, now], cache, *segments, np.full(2, t, np.int32))
        np.testing.assert_allclose(out, expected[:, now], atol=3e-6)


def test_the_softmax_scale_reaches_both_forms(config) -> None:
    sharp = YarnConfig(factor=40.0, original_max_position=16)
    cfg = config(yarn=sharp)
    used = []

    def noting(q, k, v, *segment_ids, scale, **where):
        used.append(scale)
        return attend_reference(q, k, v, *segment_ids, scale=scale, **where)

    assert softmax_scale(cfg.mla, sharp) == pytest.approx(13**-0.5 * (0.1 * np.log(40) + 1) ** 2)
    rope = rope_table(jnp.zeros((1, 2), jnp.int32), rope_dim=6, theta=1e4, yarn=sharp)
    zeros = {
        "q_down": (20, 14), "q_norm": (14,), "q_up": (14, 3, 13), "kv_down": (20, 16), "kv_norm": (10,),
        "kv_up": (10, 3, 12), "out": (3, 5, 20),
    }  # fmt: skip
    params = {name: jnp.zeros(shape) for name, shape in zeros.items()}
    functions, x = dataclasses.replace(FLOAT32, attend=noting), jnp.zeros((1, 2, 20))
    mla(params, x, Context(rope), cfg=cfg, functions=functions)
    q, ones = queries(params, x, rope, cfg=cfg, functions=functions), jnp.ones((1, 2), jnp.int32)
    rows, starts = jnp.zeros((1, 2, 16)), jnp.zeros(1, jnp.int32)
    attend_absorbed(absorb(params, cfg=cfg), q, rows, ones, ones, starts, cfg=cfg, functions=functions)
    assert used == [softmax_scale(cfg.mla, sharp)] * 2


def test_latent_attention_is_shift_invariant_and_finite_for_huge_scores() -> None:
    rng = np.random.default_rng(3)
    q, q_rope = (jnp.asarray(rng.normal(0, 1, (1, 2, 3, d)) * 1e4, jnp.float32) for d in (4, 2))
    cache = jnp.asarray(rng.normal(0, 1e4, (1, 7, 6)), jnp.float32)
    segments = jnp.asarray(rng.integers(0, 2, (1, 7))).at[:, 0].set(1)
    queries, rows = jnp.concatenate([q, q_rope], -1), cache[:, :, None]
    out = attend(queries, rows, rows[..., :4], jnp.ones((1, 2), jnp.int32), segments, scale=1.0)
    visible = (np.arange(7)[None, :] <= 5 + np.arange(2)[:, None])[None] & (np.asarray(segments) == 1)[:, None]
    assert np.isfinite(out).all()
    best = np.where(visible[:, :, None], np.einsum("bthx,bsx->bths", queries, cache), -np.inf)
    np.testing.assert_allclose(out, np.asarray(cache)[0, best[0].argmax(-1), :4][None], rtol=1e-5)


def test_later_tokens_do_not_change_earlier_ones(case) -> None:
    cfg, naive, _, _ = case
    rng = np.random.default_rng(8)
    x = rng.normal(0, 1, (2, 9, cfg.model_dim)).astype(np.float32)
    positions, ones = jnp.asarray(rng.integers(0, 100, (2, 9))), jnp.ones((2, 9), jnp.int32)
    changed = x.copy()
    changed[:, 5:] += 1.0
    before, after = naive(x, positions, ones), naive(changed, positions, ones)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert np.abs(np.asarray(before - after))[:, 5:].max() > 0.01
