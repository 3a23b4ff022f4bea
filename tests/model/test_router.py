"""The choice of experts against a token-by-token reading of the report, and against DeepSeek's own gate."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.model.functions import functions_for
from dsv3_jax.model.moe.layer import moe
from dsv3_jax.model.moe.router import affinity, expert_load, route, router_logits

BFLOAT16 = functions_for("bfloat16")

route_jit = jax.jit(
    route, static_argnames=("num_groups", "groups_per_token", "top_k", "score", "normalize_weights", "scale")
)

# experts, groups, groups a token, experts a token, score, normalised, scale
SHAPES = [
    (8, 4, 2, 4, "sigmoid", True, 2.5),
    (12, 3, 2, 5, "sigmoid", True, 1.0),
    (9, 3, 1, 3, "sigmoid", False, 2.5),
    (6, 1, 1, 6, "sigmoid", True, 1.5),
    (10, 5, 5, 4, "softmax", False, 16.0),
    (15, 5, 3, 7, "softmax", True, 1.0),
    (256, 8, 4, 8, "sigmoid", True, 2.5),
]
BIASES = ("none", "zero", "random", "negative", "one_group")


def bias_of(kind: str, rng: np.random.Generator, E: int, G: int) -> np.ndarray | None:
    """Biases that make all biased affinities negative ("negative"), or all but one group's ("one_group")."""
    if kind == "none":
        return None
    if kind == "one_group":
        return np.where(np.arange(E) // (E // G) == rng.integers(G), 0.0, -5.0).astype(np.float32)
    mean, std = {"zero": (0.0, 0.0), "random": (0.0, 0.3), "negative": (-3.0, 0.5)}[kind]
    return rng.normal(mean, std, E).astype(np.float32)


def reference(logits, bias, *, num_groups, groups_per_token, top_k, score, normalize_weights, scale):
    """Experts, their weights, and how clear the choice was: the smallest gap between a taken and a left score."""
    all_ids, all_weights, clear = [], [], []
    for row in logits.astype(np.float64):
        s = 1 / (1 + np.exp(-row)) if score == "sigmoid" else np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        biased = s if bias is None else s + bias
        gaps = [np.inf]
        groups = np.split(np.arange(len(s)), num_groups)
        rank = [biased[g].max() if bias is None else np.sort(biased[g])[-2:].sum() for g in groups]
        order = sorted(range(num_groups), key=lambda g: -rank[g])
        if groups_per_token < num_groups:
            gaps.append(rank[order[groups_per_token - 1]] - rank[order[groups_per_token]])
        allowed = np.concatenate([groups[g] for g in order[:groups_per_token]])
        best = sorted(allowed, key=lambda e: -biased[e])
        if top_k < len(best):
            gaps.append(biased[best[top_k - 1]] - biased[best[top_k]])
        ids = np.array(best[:top_k])
        w = s[ids] / s[ids].sum() if normalize_weights else s[ids]
        all_ids.append(ids)
        all_weights.append(w * scale)
        clear.append(min(gaps))
    return np.array(all_ids), np.array(all_weights), np.array(clear)


def dense(ids: np.ndarray, weights: np.ndarray, E: int) -> np.ndarray:
    """Weights at their experts, zero elsewhere: independent of the order of the choice."""
    out = np.zeros((len(ids), E))
    np.put_along_axis(out, np.asarray(ids), np.asarray(weights, np.float64), axis=-1)
    return out


@pytest.mark.parametrize("kind", BIASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_route_reads_the_report_token_by_token(shape, kind: str) -> None:
    E, G, g, K, score, normalised, scale = shape
    if kind != "none" and G > 1 and E // G < 2:
        pytest.skip("a bias ranks groups by two experts")
    how = {"num_groups": G, "groups_per_token": g, "top_k": K, "score": score}
    how |= {"normalize_weights": normalised, "scale": scale}
    for seed in range(3):
        rng = np.random.default_rng(seed)
        logits = rng.normal(0, 2, (37, E)).astype(np.float32)
        bias = bias_of(kind, rng, E, G)
        weights, ids = route_jit(logits, bias, **how)
        ref_ids, ref_weights, clear = reference(logits, bias, **how)
        seen = clear > 1e-6
        assert seen.mean() > 0.9
        np.testing.assert_allclose(
            dense(ids, weights, E)[seen], dense(ref_ids, ref_weights, E)[seen], rtol=2e-5, atol=1e-7 * scale
        )
        assert all(len(set(row)) == K for row in np.asarray(ids).tolist())
        assert all(len({e // (E // G) for e in row}) <= g for row in np.asarray(ids).tolist())
        if normalised:
            np.testing.assert_allclose(weights.sum(-1), scale, rtol=1e-5)
        load = expert_load(ids, None, num_experts=E)
        np.testing.assert_array_equal(load, np.bincount(np.asarray(ids).ravel(), minlength=E))


@pytest.mark.parametrize("name", ["v3", "v3_small", "v2", "v2lite"])
def test_route_equals_the_official_gate(golden, name: str) -> None:
    data = np.load(golden / "fp8_gate.npz")
    x, w = data[f"gate/{name}/x"], data[f"gate/{name}/weight"]
    bias = data.get(f"gate/{name}/bias")
    E, G, g, K = data[f"gate/{name}/params"].tolist()
    score = str(data[f"gate/{name}/score_func"])
    how = {"num_groups": G, "groups_per_token": g, "top_k": K, "score": score}
    how |= {"normalize_weights": score == "sigmoid", "scale": float(data[f"gate/{name}/route_scale"])}
    weights, ids = route_jit(router_logits({"w": jnp.asarray(w.T)}, jnp.asarray(x)), bias, **how)
    clear = reference(x.astype(np.float64) @ w.T.astype(np.float64), bias, **how)[2] >= 1e-6
    assert clear.mean() > 0.95
    expected = dense(data[f"gate/{name}/topk_idx_sorted"], data[f"gate/{name}/topk_w"], E)
    np.testing.assert_array_equal(np.sort(ids, -1)[clear], data[f"gate/{name}/topk_idx_sorted"][clear])
    np.testing.assert_allclose(dense(ids, weights, E)[clear], expected[clear], rtol=1e-4, atol=1e-6)


V3_SMALL = {"num_groups": 4, "groups_per_token": 2, "top_k": 3, "score": "sigmoid", "scale": 2.5}


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), favoured=st.integers(0, 11), size=st.floats(3.0, 100.0))
def test_bias_changes_choice_but_not_weights(seed: int, favoured: int, size: float) -> None:
    logits = np.random.default_rng(seed).normal(0, 2, (5, 12)).astype(np.float32)
    bias = np.zeros(12, np.float32)
    bias[favoured] = size
    weights, ids = (np.asarray(a) for a in route_jit(logits, bias, **V3_SMALL))
    assert (ids == favoured).any(axis=1).all()
    s = 1 / (1 + np.exp(-np.take_along_axis(logits.astype(np.float64), ids, -1)))
    np.testing.assert_allclose(weights, 2.5 * s / s.sum(-1, keepdims=True), rtol=1e-5)


def test_equal_choices_have_equal_weights_whatever_the_bias() -> None:
    logits = np.random.default_rng(0).normal(0, 1, (50, 12)).astype(np.float32)
    uniform = [route_jit(logits, np.full(12, b, np.float32), **V3_SMALL) for b in (0.0, 0.5, -4.0)]
    for weights, ids in uniform[1:]:
        np.testing.assert_array_equal(np.sort(ids, -1), np.sort(uniform[0][1], -1))
        np.testing.assert_allclose(np.sort(weights, -1), np.sort(uniform[0][0], -1), rtol=1e-6)


def test_bias_has_no_gradient_and_logits_have_the_right_one() -> None:
    rng = np.random.default_rng(1)
    logits, bias = rng.normal(0, 1, (7, 12)).astype(np.float32), rng.normal(0, 0.2, 12).astype(np.float32)
    mix = rng.normal(0, 1, (7, 12)).astype(np.float32)

    def total(logits, bias):
        weights, ids = route(logits, bias, **V3_SMALL)
        return (weights * jnp.take_along_axis(mix, ids, -1)).sum()

    d_logits, d_bias = jax.jit(jax.grad(total, argnums=(0, 1)))(logits, bias)
    np.testing.assert_array_equal(d_bias, 0)
    ids = np.asarray(route_jit(logits, bias, **V3_SMALL)[1])
    s = 1 / (1 + np.exp(-logits.astype(np.float64)))
    chosen = dense(ids, np.ones(ids.shape), 12)
    total_s = (s * chosen).sum(-1, keepdims=True)
    mean = (mix * s * chosen).sum(-1, keepdims=True) / total_s
    expected = 2.5 * chosen * s * (1 - s) * (mix - mean) / total_s
    np.testing.assert_allclose(d_logits, expected, rtol=1e-4, atol=1e-6)


def test_saturated_logits_stay_finite() -> None:
    logits = np.concatenate([np.full((2, 12), -120.0), np.full((2, 12), 120.0)]).astype(np.float32)
    weights, _ = route_jit(logits, np.zeros(12, np.float32), **V3_SMALL)
    assert np.isfinite(weights).all()


def test_router_computes_in_float32_from_bfloat16(config, variables_of) -> None:
    cfg = config()
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(0, 1, (2, 5, cfg.model_dim)), jnp.bfloat16)
    layer = jax.tree.map(lambda leaf: leaf[0], variables_of(cfg, 3, jnp.bfloat16)["params"]["moe_layers"]["moe"])
    logits = router_logits(layer["router"], x)
    assert logits.dtype == jnp.float32
    exact = np.asarray(x, np.float64) @ np.asarray(layer["router"]["w"], np.float64)
    np.testing.assert_allclose(logits, exact, rtol=1e-5, atol=1e-5)
    bias = jnp.zeros(cfg.moe.num_experts)
    _, routing = jax.jit(partial(moe, cfg=cfg.moe, functions=BFLOAT16))(layer, bias, x, None)
    assert routing.weights.dtype == routing.balance_loss.dtype == jnp.float32
    ids = np.asarray(routing.ids)
    s = 1 / (1 + np.exp(-np.take_along_axis(exact.reshape(10, -1), ids, -1)))
    np.testing.assert_allclose(routing.weights, cfg.moe.scale * s / s.sum(-1, keepdims=True), rtol=1e-4)


def test_affinity_of_v2_is_a_distribution() -> None:
    logits = np.random.default_rng(3).normal(0, 30, (4, 9)).astype(np.float32)
    np.testing.assert_allclose(affinity(jnp.asarray(logits), score="softmax").sum(-1), 1, rtol=1e-6)
    sigmoid = affinity(jnp.asarray(logits), score="sigmoid")
    np.testing.assert_allclose(sigmoid, 1 / (1 + np.exp(-logits.astype(np.float64))), rtol=1e-5)
