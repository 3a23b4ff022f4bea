"""DeepSeekMoE of one layer equals computing all experts for all tokens."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config.model import MoEConfig
from dsv3_jax.model.functions import functions_for
from dsv3_jax.model.moe.layer import moe

FLOAT32 = functions_for("float32")
BFLOAT16 = functions_for("bfloat16")

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
    out, routing = jax.jit(partial(moe, cfg=MOE, functions=FLOAT32))(params, bias, x, None)
    flat = np.asarray(x, np.float64).reshape(-1, D)
    shared = np.einsum("nd,djf->njf", flat, params["shared"]["gate_up"])
    shared = silu(shared[:, 0]) * shared[:, 1] @ np.asarray(params["shared"]["down"])
    expected = shared + every_expert(params["experts"], flat, routing.ids, routing.weights)
    np.testing.assert_allclose(out.reshape(-1, D), expected, atol=3e-5)

    alone = dataclasses.replace(MOE, num_shared_experts=0)
    without, _ = moe(params, bias, x, None, cfg=alone, functions=FLOAT32)
    np.testing.assert_allclose(without.reshape(-1, D), expected - shared, atol=3e-5)


def test_padding_counts_in_no_load_and_changes_no_token() -> None:
    params, rng = layer_params(MOE), np.random.default_rng(2)
    x = jnp.asarray(rng.normal(0, 1, (2, 9, D)), jnp.float32)
    valid = jnp.asarray(rng.random((2, 9)) < 0.6)
    run = jax.jit(partial(moe, cfg=MOE, functions=FLOAT32))
    out, routing = run(params, jnp.zeros(6), x, valid)
    assert int(routing.load.sum()) == 3 * int(valid.sum())
    noise = jnp.where(valid[..., None], x, 7.0)
    other, other_routing = run(params, jnp.zeros(6), noise, valid)
    np.testing.assert_allclose(np.asarray(out)[valid], np.asarray(other)[valid], atol=1e-6)
    np.testing.assert_array_equal(routing.load, other_routing.load)
    np.testing.assert_allclose(routing.balance_loss, other_routing.balance_loss, rtol=1e-6)


def test_router_and_experts_can_be_replaced() -> None:
    params = layer_params(MOE)
    x = jnp.asarray(np.random.default_rng(3).normal(0, 1, (1, 4, D)), jnp.float32)

    def first_three(logits, bias, **how):
        ids = jnp.broadcast_to(jnp.arange(3, dtype=jnp.int32)[None, :], (logits.shape[0], 3))
        return jnp.full(ids.shape, 0.5), ids

    def weight_alone(gate_up, down, dispatched):
        return jnp.broadcast_to(dispatched.weights[:, None], dispatched.rows.shape)

    alone = dataclasses.replace(MOE, num_shared_experts=0)
    functions = dataclasses.replace(FLOAT32, route=first_three, expert_ffn=weight_alone)
    out, routing = moe(params, None, x, None, cfg=alone, functions=functions)
    np.testing.assert_array_equal(routing.load, [4, 4, 4, 0, 0, 0])
    np.testing.assert_array_equal(out, 1.5)


def test_padding_goes_to_no_expert() -> None:
    params, rng = layer_params(MOE), np.random.default_rng(4)
    x = jnp.asarray(rng.normal(0, 1, (2, 9, D)), jnp.float32)
    alone, valid = dataclasses.replace(MOE, num_shared_experts=0), jnp.asarray(rng.random((2, 9)) < 0.6)
    out, _ = jax.jit(partial(moe, cfg=alone, functions=FLOAT32))(params, jnp.zeros(6), x, valid)
    np.testing.assert_array_equal(np.asarray(out)[~np.asarray(valid)], 0)


def test_experts_of_one_layer_are_found_in_a_stack_of_all() -> None:
    params, x = layer_params(MOE), jnp.asarray(np.random.default_rng(5).normal(0, 1, (1, 3, D)), jnp.float32)
    run = jax.jit(partial(moe, cfg=MOE, functions=FLOAT32))
    stack = jax.tree.map(lambda w: jnp.concatenate([jnp.full_like(w, jnp.nan), w]), params["experts"])
    inside, _ = run({**params, "experts": stack}, jnp.zeros(6), x, None, first_expert=jnp.int32(6))
    np.testing.assert_allclose(inside, run(params, jnp.zeros(6), x, None)[0], atol=1e-6)


def test_bfloat16_is_as_close_as_its_rounding_allows() -> None:
    params, x, ids, weights = drawn(9, 40, 6, 3)
    exact = every_expert(params, x, ids, weights)
    sent = BFLOAT16.dispatch(x.astype(jnp.bfloat16)[None], ids[None], weights[None], num_experts=6)
    out = BFLOAT16.combine(BFLOAT16.expert_ffn(params["gate_up"], params["down"], sent), sent.plan)
    assert out.dtype == jnp.bfloat16
    error = np.asarray(out, np.float64) - exact
    assert np.linalg.norm(error) < 0.015 * np.linalg.norm(exact)
