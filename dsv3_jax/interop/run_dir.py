"""The model of a run dir of train.py, or of an official folder."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from dsv3_jax.config.check import check
from dsv3_jax.config.load import from_dict
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.paths import user_path
from dsv3_jax.interop.load import check_dtype, load_pretrained
from dsv3_jax.training.checkpoint import load_variables
from dsv3_jax.typing import Variables


def load(path: str | Path, *, dtype: str = "float32", average: bool = False) -> tuple[ModelConfig, Variables]:
    """Reads a trained model: the newest whole checkpoint of a run, or an official folder as `load_pretrained` does.

    A corrupt checkpoint is passed over for the one before, with a line on stderr. Nothing is written.

    Args:
        path: a run dir of train.py (it holds checkpoints/), or a folder with config.json and safetensors.
        dtype: "float32" or "bfloat16", of the parameters returned; router biases stay float32.
        average: of a run, the moving average of the parameters instead of the last.
    Returns: (cfg, {"params": ..., "router_state": ...}).
    Raises: `UserError` for a folder that is neither, a run without a whole checkpoint, an average where there is none,
        or another dtype; else as `load_pretrained`.
    """
    check_dtype(dtype)
    folder = user_path(path)
    check(folder.is_dir(), f"{folder}: is not a folder; give a run dir of train.py or an official folder.")
    if not is_run(folder):
        check(
            (folder / "config.json").exists(),
            f"{folder}: holds neither checkpoints/ nor config.json; give a run dir of train.py that has saved a "
            "checkpoint, or an official folder.",
        )
        check(not average, f"{folder}: is an official folder, which has no moving average; give a run dir of train.py.")
        return load_pretrained(folder, dtype)
    config, variables = load_variables(folder, use_average=average, log=lambda line: print(line, file=sys.stderr))
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), variables["params"])
    router_state = jax.tree.map(jnp.asarray, variables["router_state"])
    return from_dict(config["model"], ModelConfig), {"params": params, "router_state": router_state}


def is_run(folder: Path) -> bool:
    """Whether `folder` is a run dir of train.py that has saved something."""
    return (folder / "checkpoints").is_dir()
