"""A model's fingerprint changes with whatever changes its latents."""

import dataclasses

import jax
import jax.numpy as jnp

from dsv3_jax.model.functions import functions_for
from dsv3_jax.serving.fingerprint import fingerprint

FLOAT32 = functions_for("float32")


def test_equal_models_have_one_fingerprint_and_others_another(base) -> None:
    cfg, variables = base
    embed = variables["params"]["embed"]["w"]
    swapped = embed.at[jnp.array([2, 5])].set(embed[jnp.array([5, 2])])
    tiny = embed.at[3, 4].set(jnp.nextafter(embed[3, 4], jnp.float32(9)))

    def with_embedding(w: jax.Array) -> dict:
        return {**variables, "params": {**variables["params"], "embed": {"w": w}}}

    prints = [
        fingerprint(cfg, variables, functions=FLOAT32),
        fingerprint(cfg, with_embedding(swapped), functions=FLOAT32),
        fingerprint(cfg, with_embedding(tiny), functions=FLOAT32),
        fingerprint(dataclasses.replace(cfg, rope_theta=2 * cfg.rope_theta), variables, functions=FLOAT32),
        fingerprint(cfg, variables, functions=functions_for("mixed")),
    ]
    assert len(set(prints)) == len(prints)
    assert fingerprint(cfg, with_embedding(embed + 0), functions=FLOAT32) == prints[0]
