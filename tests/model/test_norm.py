"""RMSNorm against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.parts import rms_norm


def exact(x, scale, eps: float) -> np.ndarray:
    x64 = np.asarray(x, np.float64)
    return x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + eps) * np.asarray(scale, np.float64)


@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 5, 97), (2, 1, 3, 130)])
@pytest.mark.parametrize("size", [1e-12, 1e-3, 1.0, 1e12])
def test_norm_equals_float64(shape, size: float) -> None:
    rng = np.random.default_rng(len(shape))
    x, scale = rng.normal(0, size, shape).astype(np.float32), rng.normal(1, 0.5, shape[-1:]).astype(np.float32)
    for eps in (1e-6, 1e-5):
        out = rms_norm(jnp.asarray(x), jnp.asarray(scale), eps=eps)
        np.testing.assert_allclose(out, exact(x, scale, eps), rtol=2e-6, atol=1e-30)


def test_bfloat16_rounds_once_at_the_end() -> None:
    rng = np.random.default_rng(0)
    x, scale = jnp.asarray(rng.normal(0, 3, (5, 64)), jnp.bfloat16), jnp.asarray(rng.normal(1, 0.5, 64), jnp.float32)
    out = rms_norm(x, scale, eps=1e-6)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float64), exact(x, scale, 1e-6), rtol=2**-8)


def test_zero_rows_stay_zero_with_a_finite_gradient() -> None:
    gradient = jax.grad(lambda x: rms_norm(x, jnp.ones(8), eps=1e-6).sum())(jnp.zeros((2, 8)))
    np.testing.assert_array_equal(rms_norm(jnp.zeros((2, 8)), jnp.ones(8), eps=1e-6), 0)
    assert np.isfinite(gradient).all()


def test_size_of_a_row_does_not_matter_and_rows_do_not_mix() -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(0, 1, (4, 33)), jnp.float32)
    whole = rms_norm(x, jnp.ones(33), eps=1e-12)
    np.testing.assert_allclose(rms_norm(x * 64, jnp.ones(33), eps=1e-12), whole, rtol=1e-6)
    np.testing.assert_allclose(rms_norm(x[2:3], jnp.ones(33), eps=1e-12), whole[2:3], rtol=1e-6)
