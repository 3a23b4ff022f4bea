import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.training.ema import HostEMA


def test_it_is_the_recursion_whatever_the_timing():
    ema = HostEMA({"w": jnp.zeros(3)}, decay=0.75)
    expected = np.zeros(3)
    for step in range(1, 20):
        ema.update({"w": jnp.full(3, step, jnp.float32)})
        expected = 0.75 * expected + 0.25 * step
    np.testing.assert_allclose(ema.average()["w"], expected, rtol=1e-6)
    ema.close()


def test_donated_parameters_do_not_reach_back():
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    params = {"w": jnp.zeros((300, 300))}
    ema = HostEMA(params, decay=0.5)
    expected = 0.0
    for step in range(30):
        ema.update(params)
        expected = 0.5 * expected + 0.5 * step
        params = bump(params)
    average = ema.average()["w"]
    np.testing.assert_array_equal(average, np.full((300, 300), np.float32(average[0, 0])))
    np.testing.assert_allclose(average[0, 0], expected, rtol=1e-6)
    ema.close()


def test_what_is_handed_out_does_not_change_later():
    ema = HostEMA({"w": jnp.zeros(2)}, decay=0.0)
    first = ema.average()
    ema.update({"w": jnp.ones(2)})
    np.testing.assert_array_equal(ema.average()["w"], np.ones(2))
    np.testing.assert_array_equal(first["w"], np.zeros(2))
    ema.close()


def test_bfloat16_parameters_are_averaged_in_float32():
    ema = HostEMA({"w": jnp.ones(2, jnp.bfloat16)}, decay=0.999)
    for _ in range(5):
        ema.update({"w": jnp.full(2, 2, jnp.bfloat16)})
    average = ema.average()["w"]
    assert average.dtype == np.float32
    np.testing.assert_allclose(average, 2 - 0.999**5, rtol=1e-6)
    ema.close()
