"""What each precision promises of dtypes and of distance from float32."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config.check import ConfigError
from dsv3_jax.model.functions import functions_for, functions_of
from dsv3_jax.model.transformer import forward

FLOAT32 = functions_for("float32")
BFLOAT16 = functions_for("bfloat16")
MIXED = functions_for("mixed")


@pytest.fixture(scope="module")
def case(config, variables_of):
    cfg = config(mtp_depth=1)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 13)).astype(np.int32)
    return cfg, variables_of(cfg), tokens


def narrowed(variables, dtype=jnp.bfloat16):
    return {**variables, "params": jax.tree.map(lambda leaf: leaf.astype(dtype), variables["params"])}


def test_functions_by_name() -> None:
    assert [functions_for(name) for name in ("float32", "bfloat16", "mixed")] == [FLOAT32, BFLOAT16, MIXED]
    assert functions_of(jnp.bfloat16) == BFLOAT16
    assert functions_of(jnp.float32) == FLOAT32
    with pytest.raises(ConfigError, match="precision='fp8' is unknown; use one of float32, bfloat16, mixed"):
        functions_for("fp8")


def test_the_parameters_decide_where_no_functions_are_given(case, run_forward) -> None:
    cfg, variables, tokens = case
    narrow = narrowed(variables)
    given = run_forward(cfg, narrow, tokens, functions=BFLOAT16)
    np.testing.assert_array_equal(run_forward(cfg, narrow, tokens).logits, given.logits)


@pytest.mark.parametrize(
    "functions",
    [pytest.param(BFLOAT16, id="bfloat16"), pytest.param(MIXED, id="mixed", marks=pytest.mark.slow)],
)
def test_low_precision_stays_near_float32(case, run_forward, functions) -> None:
    """Logits, routing weights and loads are float32 or integers always; errors are of bfloat16's size."""
    cfg, variables, tokens = case
    exact = run_forward(cfg, variables, tokens)
    out = run_forward(cfg, narrowed(variables, functions.param_dtype), tokens, functions=functions)
    assert out.logits.dtype == out.mtp_logits[0].dtype == out.router.weights.dtype == jnp.float32
    assert out.router.load.dtype == out.router.ids.dtype == jnp.int32
    # A flipped choice of expert moves a token's logits by more than rounding: compare where all choices agree.
    same = (np.sort(exact.router.ids, -1) == np.sort(out.router.ids, -1)).all((0, 2)).reshape(tokens.shape)
    assert same.mean() > 0.6
    error = np.asarray(out.logits - exact.logits)[same]
    relative = np.linalg.norm(error) / np.linalg.norm(np.asarray(exact.logits)[same])
    assert 1e-4 < relative < 0.1


def test_linear_computes_in_the_compute_dtype() -> None:
    x, w = jnp.ones((2, 3), jnp.float32), jnp.full((3, 4), 1 + 2**-9, jnp.float32)
    assert FLOAT32.project(x, w).dtype == jnp.float32
    assert MIXED.project(x, w).dtype == BFLOAT16.project(x, w).dtype == jnp.bfloat16
    np.testing.assert_allclose(FLOAT32.project(x, w), 3 * (1 + 2**-9), rtol=1e-7)
    np.testing.assert_array_equal(np.asarray(MIXED.project(x, w), np.float32), 3.0)


@pytest.mark.parametrize(
    ("functions", "dtype"),
    [
        pytest.param(MIXED, jnp.float32, id="mixed"),
        pytest.param(BFLOAT16, jnp.bfloat16, id="bfloat16", marks=pytest.mark.slow),
    ],
)
def test_gradients_have_the_dtype_of_the_parameters(case, config, variables_of, functions, dtype) -> None:
    cfg, tokens = config(num_layers=2, mtp_depth=0), case[2]
    narrow = variables_of(cfg, 0, functions.param_dtype)

    def total(params):
        return jnp.sin(forward(cfg, {**narrow, "params": params}, tokens, functions=functions).logits).mean()

    grads = jax.jit(jax.grad(total))(narrow["params"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert leaf.dtype == dtype, jax.tree_util.keystr(path)
        assert np.isfinite(np.asarray(leaf, np.float32)).all()


def test_the_bias_is_float32_under_every_precision(case) -> None:
    cfg, variables, tokens = case
    shapes = jax.eval_shape(partial(forward, cfg, functions=BFLOAT16), narrowed(variables), tokens)
    assert shapes.router.weights.dtype == jnp.float32
    assert variables["router_state"]["moe_layers"]["moe"]["router"]["bias"].dtype == jnp.float32
