"""The routed experts: every way of computing them equals computing all experts for all tokens."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config.model import MoEConfig
from dsv3_jax.model.moe.few_tokens import gather_chosen, stacked_experts, visit_used
from dsv3_jax.model.moe.layer import local_experts, moe
from dsv3_jax.precision.policy import BFLOAT16, FLOAT32

D, F = 10, 7


def silu(x):
    return x / (1 + np.exp(-x))


def every_expert(params, x, ids, weights) -> np.ndarray:
    """All experts for all tokens in float64, then the chosen ones by weight."""
    gate_up, down = (np.asarray(params[name], np.float64) for name in ("gate_up", "down"))
    hidden = np.einsum("nd,edjf->nejf", np.asarray(x, np.float64), gate_up)
    outs = np.einsum("nef,efd->ned", silu(hidden[:, :, 0]) * hidden[:, :, 1], down)
    mix = np.zeros((len(x), len(down)))
    np.add.at(mix, (np.arange(len(x))[:, None], np.asarray(ids)), np.asarray(weights, np.float64))
    return np.einsum("ne,ned->nd", mix, outs)


def drawn(seed: int, N: int, E: int, K: int, how: str = "random"):
    """Weights, tokens, and K distinct experts a token: any, or always the first ones, or never the odd ones."""
    rng = np.random.default_rng(seed)
    params = {
        "gate_up": jnp.asarray(rng.normal(0, 0.5, (E, D, 2, F)), jnp.float32),
        "down": jnp.asarray(rng.normal(0, 0.5, (E, F, D)), jnp.float32),
    }
    x = jnp.asarray(rng.normal(0, 1, (N, D)), jnp.float32)
    allowed = {"random": range(E), "same": range(K), "even": range(0, E, 2)}[how]
    ids = np.stack([rng.permutation(allowed)[:K] for _ in range(N)]).astype(np.int32)
    weights = jnp.asarray(rng.random((N, K)), jnp.float32)
    return params, x, jnp.asarray(ids), weights


local = jax.jit(partial(local_experts, policy=FLOAT32))


@pytest.mark.parametrize(("N", "E", "K"), [(1, 3, 2), (37, 6, 3), (130, 5, 1), (70, 9, 4)])
def test_sorted_blocks_equal_every_expert(N: int, E: int, K: int) -> None:
    """Also when some experts get nothing, and when one gets everything (more than one block of 64 rows)."""
    for how in ("random", "same") + (("even",) if K <= (E + 1) // 2 else ()):
        params, x, ids, weights = drawn(N, N, E, K, how)
        np.testing.assert_allclose(local(params, x, ids, weights), every_expert(params, x, ids, weights), atol=2e-5)


def test_gradients_of_sorted_blocks_equal_those_of_every_expert() -> None:
    params, x, ids, weights = drawn(5, 67, 5, 2, "even")

    def dense(params, x, weights):
        hidden = jnp.einsum("nd,edjf->nejf", x, params["gate_up"])
        outs = jnp.einsum("nef,efd->ned", jax.nn.silu(hidden[:, :, 0]) * hidden[:, :, 1], params["down"])
        return jnp.einsum("nk,nkd->nd", weights, jnp.take_along_axis(outs, ids[:, :, None], axis=1))

    def total(fn, *arguments):
        return jnp.sin(fn(*arguments)).sum()

    ours = jax.jit(jax.grad(partial(total, lambda p, x, w: local_experts(p, x, ids, w, policy=FLOAT32)), (0, 1, 2)))
    theirs = jax.jit(jax.grad(partial(total, dense), (0, 1, 2)))
    for actual, expected in zip(
        jax.tree.leaves(ours(params, x, weights)), jax.tree.leaves(theirs(params, x, weights)), strict=True
    ):
        np.testing.assert_allclose(actual, expected, atol=3e-5)


few = jax.jit(partial(stacked_experts, policy=FLOAT32))


@pytest.mark.parametrize(("E", "K"), [(5, 3), (7, 1), (8, 4)])
@pytest.mark.parametrize("N", [1, 2, 3, 8, 17])
def test_few_tokens_equal_sorted_blocks(N: int, E: int, K: int) -> None:
    layers = [drawn(10 * N + layer, N, E, K)[0] for layer in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    for how in ("random", "same") if K < E else ("random",):
        _, x, ids, weights = drawn(N, N, E, K, how)
        for layer in (0, 2):
            expected = every_expert(layers[layer], x, ids, weights)
            np.testing.assert_allclose(few(stack, jnp.int32(layer), x, ids, weights), expected, atol=2e-5)


@pytest.mark.parametrize("compute", [gather_chosen, visit_used])
def test_both_ways_for_few_tokens_agree_at_any_number_of_used_experts(compute) -> None:
    E, K = 5, 2
    run = jax.jit(partial(compute, num_experts=E))
    for ids in ([[0, 1], [0, 1], [1, 0]], [[0, 1], [2, 1], [1, 0]], [[4, 1], [3, 2], [0, 2]], [[3, 4], [4, 3], [2, 4]]):
        params, x, _, weights = drawn(1, 3, 2 * E, K)
        ids = jnp.asarray(ids, jnp.int32)
        second = {name: leaf[E:] for name, leaf in params.items()}
        out = run(params["gate_up"].reshape(2 * E, D, 2 * F), params["down"], jnp.int32(E), x, ids, weights)
        np.testing.assert_allclose(out, every_expert(second, x, ids, weights), atol=2e-5)


MOE = MoEConfig(num_experts=6, num_shared_experts=2, top_k=3, expert_dim=F, num_groups=3, groups_per_token=2)


def layer_params(cfg: MoEConfig, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    params = drawn(seed, 1, cfg.num_experts, 1)[0]
    width = F * cfg.num_shared_experts
    return {
        "router": {"w": jnp.asarray(rng.normal(0, 0.5, (D, cfg.num_experts)), jnp.float32)},
        "experts": params,
        "shared": {
            "gate_up": jnp.asarray(rng.normal(0, 0.5, (D, 2, width)), jnp.float32),
            "down": jnp.asarray(rng.normal(0, 0.5, (width, D)), jnp.float32),
        },
    }


def test_layer_is_shared_plus_chosen_experts() -> None:
    params, rng = layer_params(MOE), np.random.default_rng(1)
    x = jnp.asarray(rng.normal(0, 1, (2, 9, D)), jnp.float32)
    bias = jnp.asarray(rng.normal(0, 0.3, 6), jnp.float32)
    out, routing, _ = jax.jit(partial(moe, cfg=MOE, policy=FLOAT32))(params, bias, x, None)
    flat = np.asarray(x, np.float64).reshape(-1, D)
    shared = np.einsum("nd,djf->njf", flat, params["shared"]["gate_up"])
    shared = silu(shared[:, 0]) * shared[:, 1] @ np.asarray(params["shared"]["down"])
    expected = shared + every_expert(params["experts"], flat, routing.ids, routing.weights)
    np.testing.assert_allclose(out.reshape(-1, D), expected, atol=3e-5)

    alone = dataclasses.replace(MOE, num_shared_experts=0)
    without, _, _ = moe(params, bias, x, None, cfg=alone, policy=FLOAT32)
    np.testing.assert_allclose(without.reshape(-1, D), expected - shared, atol=3e-5)


def test_padding_counts_in_no_load_and_changes_no_token() -> None:
    params, rng = layer_params(MOE), np.random.default_rng(2)
    x = jnp.asarray(rng.normal(0, 1, (2, 9, D)), jnp.float32)
    valid = jnp.asarray(rng.random((2, 9)) < 0.6)
    run = jax.jit(partial(moe, cfg=MOE, policy=FLOAT32))
    out, routing, balance = run(params, jnp.zeros(6), x, valid)
    assert int(routing.load.sum()) == 3 * int(valid.sum())
    noise = jnp.where(valid[..., None], x, 7.0)
    other, other_routing, other_balance = run(params, jnp.zeros(6), noise, valid)
    np.testing.assert_allclose(np.asarray(out)[valid], np.asarray(other)[valid], atol=1e-6)
    np.testing.assert_array_equal(routing.load, other_routing.load)
    np.testing.assert_allclose(balance, other_balance, rtol=1e-6)


def test_router_route_and_experts_can_be_replaced() -> None:
    params = layer_params(MOE)
    x = jnp.asarray(np.random.default_rng(3).normal(0, 1, (1, 4, D)), jnp.float32)

    def first_three(logits, bias, **how):
        ids = jnp.broadcast_to(jnp.arange(3, dtype=jnp.int32)[None, :], (logits.shape[0], 3))
        return jnp.full(ids.shape, 0.5), ids

    def sum_of_weights(params, x, ids, weights, *, policy):
        return jnp.broadcast_to(weights.sum(-1, keepdims=True), x.shape)

    alone = dataclasses.replace(MOE, num_shared_experts=0)
    out, routing, _ = moe(params, None, x, None, cfg=alone, policy=FLOAT32, route=first_three, experts=sum_of_weights)
    np.testing.assert_array_equal(routing.load, [4, 4, 4, 0, 0, 0])
    np.testing.assert_array_equal(out, 1.5)


def test_bfloat16_is_as_close_as_its_rounding_allows() -> None:
    params, x, ids, weights = drawn(9, 40, 6, 3)
    exact = every_expert(params, x, ids, weights)
    for out in (
        local_experts(params, x, ids, weights, policy=BFLOAT16),
        stacked_experts(jax.tree.map(lambda w: w[None], params), jnp.int32(0), x, ids, weights, policy=BFLOAT16),
    ):
        assert out.dtype == jnp.bfloat16
        error = np.asarray(out, np.float64) - exact
        assert np.linalg.norm(error) < 0.015 * np.linalg.norm(exact)
