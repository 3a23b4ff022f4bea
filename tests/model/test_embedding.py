"""The output head: its logits are float32, whatever it multiplies."""

import jax.numpy as jnp
import numpy as np

from dsv3_jax.model.functions import functions_for
from dsv3_jax.model.parts import unembed

BFLOAT16 = functions_for("bfloat16")


def test_logits_of_bfloat16_are_float32_and_rounded_to_nothing_narrower() -> None:
    rng = np.random.default_rng(0)
    hidden, w = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((2, 7, 20), (20, 61)))
    logits = unembed({"w": w}, hidden, functions=BFLOAT16)
    assert logits.dtype == jnp.float32
    expected = np.asarray(hidden, np.float64) @ np.asarray(w, np.float64)
    np.testing.assert_allclose(logits, expected, atol=1e-5)  # bfloat16 would err by 1e-2
