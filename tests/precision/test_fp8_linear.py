"""The FP8 linear layers against float32, against the ideal of rounding each operand once, and with NaN."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.precision import fp8_linear, plain_linear
from dsv3_kernels.quantize import dequantize_tiles, quantize_tiles
from tests.dsv3_kernels.errors import calc_diff

SHAPES = [
    (97, 130, 257),
    *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((1, 160, 96), (300, 256, 128), (1025, 448, 160))),
]


def draw(M: int, A: int, Z: int):
    """Activations with outlying features, weights, and gradients whose tokens differ in size, in bfloat16."""
    rng = np.random.default_rng(M)
    x = rng.normal(size=(M, A)) * np.where(rng.random(A) < 0.02, 30.0, 1.0)
    w = rng.normal(size=(A, Z)) * 0.05
    dy = rng.normal(size=(M, Z)) * 10.0 ** rng.integers(-4, -1, (M, 1))
    return jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.float32), jnp.asarray(dy, jnp.bfloat16)


def rounded(x, tile):
    """x quantised and dequantised, in float32."""
    return dequantize_tiles(quantize_tiles(x, tile=tile), tile=tile)


def outputs(function, x, w, dy):
    """y, dx, dw as float32."""
    y, pullback = jax.vjp(function, x, w)
    return [np.asarray(array, np.float32) for array in (y, *pullback(dy.astype(y.dtype)))]


def error(found, exact) -> float:
    return float(np.linalg.norm(np.asarray(found, np.float64) - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("shape", SHAPES)
def test_all_three_products_err_at_most_twice_as_much_as_rounding_each_operand_once(shape):
    x, w, dy = draw(*shape)
    wide = x.astype(jnp.float32), dy.astype(jnp.float32)
    exact = outputs(partial(plain_linear.linear, dtype=jnp.float32), wide[0], w, wide[1])
    found = outputs(jax.jit(partial(fp8_linear.linear, dtype=jnp.bfloat16)), x, w, dy)
    blocks = rounded(w, (128, 128))
    ideal = [
        rounded(x, (1, 128)) @ blocks,
        rounded(dy, (1, 128)) @ blocks.T,
        # A single token has a scale for each number: only what was saved of x in tiles of 128 features is lossy then.
        rounded(x, (128, 1) if shape[0] > 1 else (1, 128)).T @ rounded(dy, (128, 1)),
    ]
    for name, ours, best, truth in zip(("y", "dx", "dw"), found, ideal, exact, strict=True):
        assert error(ours, truth) <= 2 * error(best, truth), name
        assert calc_diff(ours, truth) < 2e-3, name


@pytest.mark.parametrize(
    ("form", "twin"),
    [
        (fp8_linear.swiglu_linear, plain_linear.swiglu_linear),
        (fp8_linear.attention_linear, plain_linear.attention_linear),
    ],
)
@pytest.mark.parametrize("shape", [(1, 80, 33), (97, 192, 130)])
def test_the_other_forms_are_near_their_plain_twins(form, twin, shape):
    M, A, Z = shape
    x, _, dy = draw(M, A, Z)
    w = draw(3, A // 2 if form is fp8_linear.swiglu_linear else A, Z)[1]
    exact = outputs(partial(twin, dtype=jnp.float32), x.astype(jnp.float32), w, dy.astype(jnp.float32))
    found = outputs(jax.jit(partial(form, dtype=jnp.bfloat16)), x, w, dy)
    for name, ours, truth in zip(("y", "dx", "dw"), found, exact, strict=True):
        assert ours.shape == truth.shape
        assert error(ours, truth) < 0.06, name


def test_leading_axes_and_dtypes():
    x, w, _ = draw(12, 160, 96)
    form = partial(fp8_linear.linear, dtype=jnp.bfloat16)
    y = form(x.reshape(3, 4, 160), w)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y.reshape(12, 96), form(x, w))
    dx, dw = jax.grad(lambda x, w: form(x, w).astype(jnp.float32).sum(), argnums=(0, 1))(x.astype(jnp.float32), w)
    assert dx.dtype == dw.dtype == jnp.float32


def test_only_fp8_activations_are_saved():
    x, w, _ = draw(97, 160, 96)
    saved = {}
    for name, argument, weight in (
        ("linear", x, w),
        ("swiglu_linear", x, w[:80]),
        ("attention_linear", x, w),
    ):
        form = partial(getattr(fp8_linear, name), dtype=jnp.bfloat16)
        pullback = jax.eval_shape(lambda a, b, form=form: jax.vjp(form, a, b)[1], argument, weight)
        leaves = [(leaf.dtype.name, leaf.shape) for leaf in jax.tree.leaves(pullback) if leaf.shape != weight.shape]
        saved[name] = sorted(leaves)
    fp8 = [("float32", (97, 2)), ("uint8", (97, 160))]
    assert saved == {
        "linear": fp8,
        "swiglu_linear": fp8,
        "attention_linear": [("float32", (97, 2)), ("uint8", (97, 240))],
    }


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_activation_costs_its_row_of_y_and_at_most_its_tile_of_dw(bad):
    """Where a reduction hands a NaN on, the scale carries it to the 128 features of the tile; XLA's on CPU may not."""
    x, w, dy = draw(300, 384, 96)
    good = outputs(partial(fp8_linear.linear, dtype=jnp.bfloat16), x, w, dy)
    y, dx, dw = outputs(partial(fp8_linear.linear, dtype=jnp.bfloat16), x.at[200, 130].set(bad), w, dy)
    assert not np.isfinite(y[200]).any()
    np.testing.assert_array_equal(np.delete(y, 200, axis=0), np.delete(good[0], 200, axis=0))
    np.testing.assert_array_equal(dx, good[1])  # dx does not depend on x
    assert not np.isfinite(dw[130]).any()
    np.testing.assert_array_equal(np.delete(dw, np.s_[128:256], axis=0), np.delete(good[2], np.s_[128:256], axis=0))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_gradient_costs_its_row_of_dx_and_its_column_of_dw(bad):
    x, w, dy = draw(300, 160, 200)
    good = outputs(partial(fp8_linear.linear, dtype=jnp.bfloat16), x, w, dy)
    _, dx, dw = outputs(partial(fp8_linear.linear, dtype=jnp.bfloat16), x, w, dy.at[7, 150].set(bad))
    assert not np.isfinite(dx[7]).any()
    np.testing.assert_array_equal(np.delete(dx, 7, axis=0), np.delete(good[1], 7, axis=0))
    assert not np.isfinite(dw[:, 150]).any()
    np.testing.assert_array_equal(np.delete(dw, 150, axis=1), np.delete(good[2], 150, axis=1))


def test_blocks_of_gradients_lose_tokens_that_lie_beside_far_larger_ones():
    """The negative control: E4M3 reaches 2^18 below the largest number of a block, and what is less is gone."""
    x, w, dy = draw(128, 128, 128)
    sizes = jnp.where(jnp.arange(128) % 2 == 0, 1e-6, 1.0)[:, None].astype(jnp.bfloat16)
    dy = jnp.clip(dy * 1e3, -1, 1).astype(jnp.bfloat16) * sizes
    exact = outputs(partial(plain_linear.linear, dtype=jnp.float32), x.astype(jnp.float32), w, dy.astype(jnp.float32))[
        1
    ]
    wrong = {}
    for tile in ((1, 128), (128, 128)):
        dx = outputs(partial(fp8_linear.linear, dtype=jnp.bfloat16, gradient_tile=tile), x, w, dy)[1]
        wrong[tile] = error(dx[::2], exact[::2]), error(dx[1::2], exact[1::2])
    assert wrong[1, 128][1] == pytest.approx(wrong[128, 128][1], rel=0.2)
    assert wrong[128, 128][0] > 2 * wrong[1, 128][0]


@pytest.mark.parametrize("name", ["linear", "swiglu_linear", "attention_linear"])
def test_gradients_of_a_large_batch_are_as_exact_as_large_ones(name):
    x, w, dy = draw(40, 160, 96)
    form = partial(getattr(fp8_linear, name), dtype=jnp.bfloat16)
    w = w[:80] if name == "swiglu_linear" else w
    large, small = outputs(form, x, w, dy), outputs(form, x, w, dy * 2.0**-30)
    for wide, narrow in zip(large[1:], small[1:], strict=True):
        np.testing.assert_allclose(narrow * 2.0**30, wide, rtol=0, atol=1e-25)
