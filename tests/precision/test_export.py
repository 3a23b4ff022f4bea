"""FP8 files hold what the FP8 forward pass multiplies."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv3_jax as ds
from dsv3_jax.config.load import load_config
from dsv3_jax.model.params import init
from dsv3_kernels import cast_blocks, dequantize_tiles


def multiplied(w) -> np.ndarray:
    """The [A, Z] weight as an FP8 linear layer sees it."""
    return np.asarray(dequantize_tiles(cast_blocks(jnp.asarray(w).T), tile=(128, 128)).T)


@pytest.mark.slow
def test_an_fp8_export_is_quantised_as_the_training_does(repository: Path, tmp_path: Path):
    model = load_config(repository / "tests" / "training" / "midget.py").model
    cfg = dataclasses.replace(
        model,
        model_dim=144,
        ffn_dim=256,
        moe=dataclasses.replace(model.moe, num_experts=2, top_k=2, num_groups=1, groups_per_token=1, expert_dim=128),
    )
    variables = init(cfg, jax.random.key(3))
    ds.save_pretrained(tmp_path / "fp8", cfg, variables, dtype="float8_e4m3fn")
    loaded = ds.load_pretrained(tmp_path / "fp8", dtype="float32")[1]["params"]
    params = jax.tree.map(np.asarray, variables["params"])
    for stack, part, name, inputs in (
        ("dense_layers", "mla", "q_down", 1),
        ("moe_layers", "mla", "kv_up", 1),
        ("moe_layers", "mla", "out", 2),
        ("dense_layers", "mlp", "gate_up", 1),
        ("dense_layers", "mlp", "down", 1),
    ):
        ours, read = params[stack][part][name][0], np.asarray(loaded[stack][part][name][0])
        flat = ours.reshape(int(np.prod(ours.shape[:inputs])), -1)
        np.testing.assert_array_equal(read.reshape(flat.shape), multiplied(flat), err_msg=f"{stack}/{part}/{name}")
    for name in ("gate_up", "down"):
        ours, read = params["moe_layers"]["moe"]["experts"][name][0], loaded["moe_layers"]["moe"]["experts"][name][0]
        for expert in range(2):
            flat = ours[expert].reshape(ours.shape[1], -1)
            np.testing.assert_array_equal(np.asarray(read[expert]).reshape(flat.shape), multiplied(flat), err_msg=name)
