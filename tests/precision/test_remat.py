"""What the backward pass recomputes changes no gradient under FP8."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config.load import load_config
from dsv3_jax.model.functions import functions_for
from dsv3_jax.model.params import init
from dsv3_jax.model.transformer import hidden_states

FP8 = functions_for("fp8_dsv3")


@pytest.mark.slow
def test_every_rematerialisation_gives_the_same_gradients(repository):
    cfg = load_config(repository / "tests" / "training" / "midget.py").model
    variables = init(cfg, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 40), 0, cfg.vocab_size)

    def gradients(remat):
        def total(params):
            states = hidden_states(cfg, {**variables, "params": params}, tokens, functions=FP8, remat=remat)
            return jnp.sin(states.hidden.astype(jnp.float32)).mean() + states.routing.balance_loss.sum()

        # XLA may leave out the rounding to bfloat16 within a fused kernel, and fuses each program in its own way.
        exactly = {"xla_allow_excess_precision": False}
        return jax.jit(jax.grad(total), compiler_options=exactly)(variables["params"])

    plain = gradients("none")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(plain))
    for remat in ("paper", "received", "full", "offload"):
        jax.tree.map(np.testing.assert_array_equal, gradients(remat), plain)
