"""Attention: by hand, absorbed equals naive, and nothing that is masked can leak."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config.model import YarnConfig
from dsv3_jax.model.attention import attend_reference
from dsv3_jax.model.latent_attention import attend_latent
from dsv3_jax.model.mla import absorb, latents, mla, mla_absorbed
from dsv3_jax.model.rope import rope_table, softmax_scale
from dsv3_jax.precision.policy import FLOAT32


def by_hand(q, k, v, segment_ids, scale: float) -> np.ndarray:
    """One query, head and row at a time, in float64."""
    B, T, H, _ = q.shape
    out = np.zeros((B, T, H, v.shape[-1]))
    for b in range(B):
        for t in range(T):
            seen = [s for s in range(t + 1) if segment_ids is None or segment_ids[b, s] == segment_ids[b, t]]
            for h in range(H):
                scores = k[b, seen, h].astype(np.float64) @ q[b, t, h] * scale
                p = np.exp(scores - scores.max())
                out[b, t, h] = (p / p.sum()) @ v[b, seen, h]
    return out


@pytest.mark.parametrize("with_segments", [False, True])
@pytest.mark.parametrize("T", [1, 9, 13])
def test_attention_by_hand(T: int, with_segments: bool) -> None:
    rng = np.random.default_rng(T)
    q, k = rng.normal(0, 1, (2, 2, T, 3, 8)).astype(np.float32)
    v = rng.normal(0, 1, (2, T, 3, 5)).astype(np.float32)
    segments = np.sort(rng.integers(0, 3, (2, T))) if with_segments else None
    given = None if segments is None else jnp.asarray(segments)
    out = attend_reference(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), given, scale=0.3)
    np.testing.assert_allclose(out, by_hand(q, k, v, segments, 0.3), atol=2e-6)


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
        return mla(params, x, rope(positions), segments, cfg=cfg, policy=FLOAT32)

    @jax.jit
    def rows(x, positions):
        kept = latents(params, x, rope(positions), cfg=cfg, policy=FLOAT32)
        return jnp.concatenate([kept.kv, kept.k_rope], -1)

    @jax.jit
    def absorbed(x, positions, cache, visible):
        return mla_absorbed(absorb(params, cfg=cfg), x, rope(positions), cache, visible, cfg=cfg, policy=FLOAT32)

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
        expected, kept = naive(x, positions, jnp.asarray(real.astype(np.int32)))

        stored = rows(x, positions)
        np.testing.assert_allclose(stored, np.concatenate([kept.kv, kept.k_rope], -1), atol=1e-6)
        cache = np.full((B, S, stored.shape[-1]), np.nan, np.float32)
        cache[:, :T][real] = np.asarray(stored)[real]
        visible = (np.arange(S)[None, :] <= np.arange(T)[:, None])[None] & np.pad(real, ((0, 0), (0, S - T)))[:, None]
        visible = np.where(real[:, :, None], visible, np.arange(S) == T - 1)  # a filler query reads one real row
        out = np.asarray(absorbed(x, positions, jnp.asarray(cache), jnp.asarray(visible)))
        np.testing.assert_allclose(out[real], np.asarray(expected)[real], atol=3e-6)


def test_one_token_at_a_time_equals_naive(case) -> None:
    cfg, naive, rows, absorbed = case
    rng = np.random.default_rng(7)
    T = 6
    x = jnp.asarray(rng.normal(0, 1, (2, T, cfg.model_dim)), jnp.float32)
    positions = jnp.asarray(rng.integers(0, 100, (2, T)))
    expected, _ = naive(x, positions, jnp.ones((2, T), jnp.int32))
    cache = np.full((2, S, cfg.mla.kv_latent_dim + cfg.mla.rope_head_dim), np.nan, np.float32)
    for t in range(T):
        now = slice(t, t + 1)
        cache[:, now] = rows(x[:, now], positions[:, now])
        visible = jnp.broadcast_to(jnp.arange(S)[None, None, :] <= t, (2, 1, S))
        out = absorbed(x[:, now], positions[:, now], jnp.asarray(cache), visible)
        np.testing.assert_allclose(out, expected[:, now], atol=3e-6)


def test_the_softmax_scale_reaches_both_forms(config) -> None:
    sharp = YarnConfig(factor=40.0, original_max_position=16)
    cfg = config(yarn=sharp)
    used = []

    def attend(q, k, v, segment_ids, *, scale):
        used.append(scale)
        return attend_reference(q, k, v, segment_ids, scale=scale)

    assert softmax_scale(cfg.mla, sharp) == pytest.approx(13**-0.5 * (0.1 * np.log(40) + 1) ** 2)
    rope = rope_table(jnp.zeros((1, 2), jnp.int32), rope_dim=6, theta=1e4, yarn=sharp)
    zeros = {
        "q_down": (20, 14), "q_norm": (14,), "q_up": (14, 3, 13), "kv_down": (20, 16), "kv_norm": (10,),
        "kv_up": (10, 3, 12), "out": (3, 5, 20),
    }  # fmt: skip
    params = {name: jnp.zeros(shape) for name, shape in zeros.items()}
    mla(params, jnp.zeros((1, 2, 20)), rope, None, cfg=cfg, policy=FLOAT32, attend=attend)
    assert used == [softmax_scale(cfg.mla, sharp)]


def test_latent_attention_is_shift_invariant_and_finite_for_huge_scores() -> None:
    rng = np.random.default_rng(3)
    q, q_rope = (jnp.asarray(rng.normal(0, 1, (1, 2, 3, d)) * 1e4, jnp.float32) for d in (4, 2))
    cache = jnp.asarray(rng.normal(0, 1e4, (1, 7, 6)), jnp.float32)
    visible = jnp.asarray(rng.random((1, 2, 7)) < 0.5).at[:, :, 3].set(True)
    out = attend_latent(q, q_rope, cache, visible, scale=1.0)
    assert np.isfinite(out).all()
    best = np.where(visible[:, :, None], np.einsum("bthx,bsx->bths", np.concatenate([q, q_rope], -1), cache), -np.inf)
    np.testing.assert_allclose(out, np.asarray(cache)[0, best[0].argmax(-1), :4][None], rtol=1e-5)


def test_later_tokens_do_not_change_earlier_ones(case) -> None:
    cfg, naive, _, _ = case
    rng = np.random.default_rng(8)
    x = rng.normal(0, 1, (2, 9, cfg.model_dim)).astype(np.float32)
    positions, ones = jnp.asarray(rng.integers(0, 100, (2, 9))), jnp.ones((2, 9), jnp.int32)
    changed = x.copy()
    changed[:, 5:] += 1.0
    before, after = naive(x, positions, ones)[0], naive(changed, positions, ones)[0]
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert np.abs(np.asarray(before - after))[:, 5:].max() > 0.01
