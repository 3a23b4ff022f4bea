"""Routed experts in FP8 against the plain ones in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.moe.layer import local_experts
from dsv3_jax.precision.policy import FLOAT32, FP8_DSV3, make_fp8_policy


def case(N: int, D: int, F: int, E: int, K: int, *, unused: int = 0):
    """Tokens, experts, choices (never of the last `unused` experts) and weights."""
    rng = np.random.default_rng(N)
    x = jnp.asarray(rng.normal(size=(N, D)), jnp.bfloat16)
    params = {
        "gate_up": jnp.asarray(rng.normal(size=(E, D, 2, F)) * D**-0.5, jnp.float32),
        "down": jnp.asarray(rng.normal(size=(E, F, D)) * F**-0.5, jnp.float32),
    }
    ids = jnp.asarray(np.stack([rng.permutation(E - unused)[:K] for _ in range(N)]), jnp.int32)
    weights = jnp.asarray(rng.uniform(0.1, 1.0, (N, K)), jnp.float32)
    return x, params, ids, weights


def run(policy, x, params, ids, weights, size=1.0):
    """The result and the gradients of its product with a fixed random tensor of `size`, as float32 by name."""
    d_out = jnp.asarray(np.random.default_rng(9).normal(size=x.shape), jnp.float32) * size

    @jax.jit
    def total(params, x, weights):
        out = local_experts(params, x, ids, weights, policy=policy)
        return (out.astype(jnp.float32) * d_out).sum(), out

    (_, out), grads = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(params, x, weights)
    found = {"out": out, "gate_up": grads[0]["gate_up"], "down": grads[0]["down"], "x": grads[1], "weights": grads[2]}
    return {name: np.asarray(array, np.float32) for name, array in found.items()}


@pytest.mark.parametrize(
    "case_of",
    [
        pytest.param({"N": 1, "D": 20, "F": 9, "E": 4, "K": 2}, id="one token"),
        pytest.param({"N": 97, "D": 160, "F": 96, "E": 8, "K": 3, "unused": 3}, id="empty experts"),
        pytest.param({"N": 300, "D": 256, "F": 128, "E": 3, "K": 1}, id="several blocks", marks=pytest.mark.slow),
    ],
)
def test_fp8_experts_are_near_float32_and_so_are_their_gradients(case_of):
    x, params, ids, weights = case(**case_of)
    exact = run(FLOAT32, x.astype(jnp.float32), params, ids, weights)
    found = run(FP8_DSV3, x, params, ids, weights)
    for name, truth in exact.items():
        error = np.linalg.norm(found[name] - truth) / np.linalg.norm(truth)
        # Each rounding errs by 2.7 %, and the gradient of gate_up has six of them in a row.
        assert error < 0.12, (name, error)
    unused = case_of.get("unused", 0)
    if unused:
        assert not found["down"][-unused:].any()
        assert not found["gate_up"][-unused:].any()


def test_a_bad_token_costs_its_own_row_and_the_gradients_of_its_experts():
    x, params, ids, weights = case(97, 160, 96, 8, 2)
    good = run(FP8_DSV3, x, params, ids, weights)
    bad = run(FP8_DSV3, x.at[5, 3].set(jnp.nan), params, ids, weights)
    assert np.isnan(bad["out"][5]).all()
    np.testing.assert_array_equal(np.delete(bad["out"], 5, axis=0), np.delete(good["out"], 5, axis=0))
    np.testing.assert_array_equal(np.delete(bad["x"], 5, axis=0), np.delete(good["x"], 5, axis=0))
    np.testing.assert_array_equal(np.delete(bad["weights"], 5, axis=0), np.delete(good["weights"], 5, axis=0))
    others = [expert for expert in range(8) if expert not in np.asarray(ids[5])]
    for name in ("gate_up", "down"):
        np.testing.assert_array_equal(bad[name][others], good[name][others])
        assert np.isnan(bad[name][np.asarray(ids[5])]).any()


def test_gradients_of_a_large_batch_are_as_exact_as_large_ones():
    """Loss gradients of single tokens are tiny; a floor under the scales must not swallow them."""
    arguments = case(97, 160, 96, 8, 2)
    large, small = run(FP8_DSV3, *arguments), run(FP8_DSV3, *arguments, size=2.0**-30)
    for name in ("x", "gate_up", "down", "weights"):
        np.testing.assert_allclose(small[name] * 2.0**30, large[name], rtol=1e-5, atol=1e-7)


def test_the_control_differs_in_gradients_only():
    arguments = case(97, 160, 96, 8, 2)
    recipe = run(FP8_DSV3, *arguments)
    control = run(make_fp8_policy(gradient_tile=(128, 128)), *arguments)
    np.testing.assert_array_equal(control["out"], recipe["out"])
    assert (control["x"] != recipe["x"]).any()
    assert (control["down"] != recipe["down"]).any()
