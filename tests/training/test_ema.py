import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config.check import UserError
from dsv3_jax.training.ema import HostEMA


def weighted_mean(values: list[float], decay: float) -> float:
    """The newest has weight 1, each one before `decay` times that of the next."""
    weights = decay ** np.arange(len(values))[::-1]
    return float((weights * values).sum() / weights.sum())


def test_it_is_the_weighted_mean_of_all_updates_whatever_the_timing_and_the_start():
    ema = HostEMA({"w": jnp.full(3, 100.0)}, decay=0.75)
    np.testing.assert_array_equal(ema.average()["w"], np.full(3, 100.0))
    ema.update({"w": jnp.full(3, 0.1)})
    np.testing.assert_array_equal(ema.average()["w"], np.full(3, np.float32(0.1)))
    for step in range(2, 20):
        ema.update({"w": jnp.full(3, step, jnp.float32)})
    np.testing.assert_allclose(ema.average()["w"], weighted_mean([0.1, *range(2, 20)], 0.75), rtol=1e-6)
    ema.close()


def test_continued_with_the_number_of_its_updates_it_gives_the_same_bits():
    values = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)
    ema = HostEMA({"w": jnp.zeros(5)}, decay=0.9)
    for value in values[:4]:
        ema.update({"w": jnp.asarray(value)})
    resumed = HostEMA(ema.average(), decay=0.9, num_updates=4)
    for value in values[4:]:
        ema.update({"w": jnp.asarray(value)})
        resumed.update({"w": jnp.asarray(value)})
    np.testing.assert_array_equal(ema.average()["w"], resumed.average()["w"])
    ema.close()
    resumed.close()


def test_a_thread_that_fails_is_told_in_a_sentence():
    ema = HostEMA({"w": jnp.zeros(3)}, decay=0.75)
    ema.update({"w": jnp.zeros(4)})
    with pytest.raises(UserError, match=r"averaging the parameters failed \(ValueError: "):
        ema.average()
    ema.close()


def test_donated_parameters_do_not_reach_back():
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    params = {"w": jnp.zeros((300, 300))}
    ema = HostEMA(params, decay=0.5)
    for _ in range(30):
        ema.update(params)
        params = bump(params)
    average = ema.average()["w"]
    np.testing.assert_array_equal(average, np.full((300, 300), np.float32(average[0, 0])))
    np.testing.assert_allclose(average[0, 0], weighted_mean([*range(30)], 0.5), rtol=1e-6)
    ema.close()


def test_what_is_handed_out_does_not_change_later():
    ema = HostEMA({"w": jnp.zeros(2)}, decay=0.0)
    first = ema.average()
    ema.update({"w": jnp.ones(2)})
    np.testing.assert_array_equal(ema.average()["w"], np.ones(2))
    np.testing.assert_array_equal(first["w"], np.zeros(2))
    ema.close()


def test_bfloat16_parameters_are_averaged_in_float32():
    ema = HostEMA({"w": jnp.zeros(2, jnp.bfloat16)}, decay=0.999)
    for value in (1, 2, 3):
        ema.update({"w": jnp.full(2, value, jnp.bfloat16)})
    average = ema.average()["w"]
    assert average.dtype == np.float32
    np.testing.assert_allclose(average, weighted_mean([1, 2, 3], 0.999), rtol=1e-6)
    assert average[0] != np.float32(2), "0.0007 away, which bfloat16 cannot hold"
    ema.close()
