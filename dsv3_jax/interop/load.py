"""Official checkpoint folders to variables."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from dsv3_jax.config.check import check
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.paths import user_path
from dsv3_jax.interop.fill import fill, zeros
from dsv3_jax.interop.hf_config import fp8_block, from_hf
from dsv3_jax.interop.hf_names import flatten, unflatten
from dsv3_jax.interop.json_file import CheckpointError, read_json
from dsv3_jax.interop.match import match
from dsv3_jax.interop.safetensors_io import read_folder
from dsv3_jax.model.params import abstract_params
from dsv3_jax.progress import progress
from dsv3_jax.typing import Variables


def load_pretrained(
    folder: str | Path, dtype: str = "float32", log: Callable[[str], None] | None = None
) -> tuple[ModelConfig, Variables]:
    """Reads an official folder: float32, bfloat16, float16 or FP8 blocks, in one file or many.

    FP8 is dequantised in float32, then cast to `dtype`; router biases stay float32. Tensors go in chunks, on every
    core, from the files into stacks that JAX takes over, so on a CPU the peak is the model plus a few megabytes a core.
    A load of more than ten seconds shows a bar on a terminal.

    MTP modules are an option. When config.json announces none, or some that are not all there, do not fit, or have
    an embedding or head that differ from the main model's (stale after fine-tuning), the main model alone is loaded:
    `cfg.mtp_depth` is 0, and one line tells what was left out.

    Args:
        folder: config.json, and model.safetensors or model.safetensors.index.json with its shards.
        dtype: "float32" or "bfloat16", of the parameters returned.
        log: takes that line; by default it goes to stderr.
    Returns: (cfg, {"params": ..., "router_state": ...}).
    Raises: `ConfigError` for what `ModelConfig` cannot represent; `CheckpointError` naming file and tensor for a
        missing, truncated or contradictory file, a missing, unexpected or misshapen tensor, one of a type that is not
        read, missing, negative or infinite scales, or a router bias that is not finite.
    """
    check_dtype(dtype)
    folder = user_path(folder)
    config = read_config(folder)
    block = fp8_block(config)
    cfg, found, left_out = match(folder, from_hf(config), read_folder(folder), block)
    if left_out:
        (log or _to_stderr)(f"{folder}: loaded with mtp_depth={cfg.mtp_depth}, without {left_out}")
    specs = flatten(abstract_params(cfg, dtype))
    with progress(f"loading {folder.name}", sum(item.tensor.stop - item.tensor.start for item in found)) as advance:
        try:
            arrays = zeros(specs)
        except MemoryError as error:
            raise CheckpointError(
                f"{folder}: the model does not fit into memory ({error}); load it as bfloat16."
            ) from None
        fill(arrays, found, block, advance=advance)
    return cfg, unflatten({path: jax.device_put(arrays.pop(path)) for path in list(arrays)})


def check_dtype(dtype: str) -> None:
    """Raises `ConfigError` unless parameters can be loaded as `dtype`."""
    check(dtype in ("float32", "bfloat16"), f"dtype={dtype!r} cannot be loaded; use 'float32' or 'bfloat16'.")


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of an official folder. Raises: `CheckpointError` when there is none to read."""
    if not os.path.isdir(folder):
        raise CheckpointError(f"{folder}: is not a folder; give a local folder with config.json and weights.")
    if not os.path.lexists(folder / "config.json"):
        raise CheckpointError(f"{folder}: has no config.json; give the folder of a checkpoint in the official format.")
    return read_json(folder / "config.json")


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
