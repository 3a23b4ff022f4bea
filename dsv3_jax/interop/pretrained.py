"""Official checkpoint folders to variables and back."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from dsv3_jax.config.check import check
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.paths import user_path
from dsv3_jax.interop.convert import put_official, to_official
from dsv3_jax.interop.hf_config import fp8_block, from_hf
from dsv3_jax.interop.hf_names import IGNORED_SUFFIXES, SCALE_SUFFIX, Entry, entries, flatten, unflatten
from dsv3_jax.interop.json_file import CheckpointError, read_json
from dsv3_jax.interop.safetensors_io import StoredTensor, read_folder
from dsv3_jax.interop.save import save_pretrained
from dsv3_jax.model.params import abstract_params
from dsv3_jax.typing import Variables
from dsv3_kernels.quantize import QTensor, dequantize_tiles

__all__ = ["load_pretrained", "read_config", "save_pretrained"]


def load_pretrained(folder: str | Path, dtype: str = "float32") -> tuple[ModelConfig, Variables]:
    """Reads an official folder: float32, bfloat16, float16 or FP8 blocks, in one file or many.

    FP8 is dequantised in float32, then cast to `dtype`; router biases stay float32. Tensors are read one at a time
    into stacks that JAX takes over, so on a CPU the peak is the model plus one tensor. An MTP module's copies of the
    embedding and the head must equal the main ones. When config.json announces MTP modules whose tensors are absent
    (transformers drops them), `cfg.mtp_depth` is 0.

    Args:
        folder: config.json, and model.safetensors or model.safetensors.index.json with its shards.
        dtype: "float32" or "bfloat16", of the parameters returned.
    Returns: (cfg, {"params": ..., "router_state": ...}).
    Raises: `ConfigError` for what `ModelConfig` cannot represent; `CheckpointError` naming file and tensor for a
        missing or truncated shard, a missing, unexpected or misshapen tensor, or a missing scale.
    """
    check(dtype in ("float32", "bfloat16"), f"dtype={dtype!r} cannot be loaded; use 'float32' or 'bfloat16'.")
    folder = user_path(folder)
    config = read_config(folder)
    cfg, block = from_hf(config), fp8_block(config)
    stored = read_folder(folder)
    if not any(name.startswith(f"model.layers.{cfg.num_layers}.") for name in stored):
        cfg = dataclasses.replace(cfg, mtp_depth=0)
    found = _match(folder, cfg, stored, block)
    arrays = {
        path: _aligned_empty(spec.shape, spec.dtype) for path, spec in flatten(abstract_params(cfg, dtype)).items()
    }
    for entry, tensor, scale in _in_file_order(found):
        _fill(arrays, entry, tensor, scale, block)
    return cfg, unflatten({path: jax.device_put(arrays.pop(path)) for path in list(arrays)})


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of an official folder. Raises: `CheckpointError` when there is none to read."""
    if not os.path.isdir(folder):
        raise CheckpointError(f"{folder}: is not a folder; give a local folder with config.json and weights.")
    if not os.path.lexists(folder / "config.json"):
        raise CheckpointError(f"{folder}: has no config.json; give the folder of a checkpoint in the official format.")
    return read_json(folder / "config.json")


_Found = tuple[Entry, StoredTensor, StoredTensor | None]


def _match(
    folder: Path, cfg: ModelConfig, stored: dict[str, StoredTensor], block: tuple[int, int] | None
) -> list[_Found]:
    """Pairs every entry of the model with its tensor, and its scale if it is FP8; nothing may be left over."""
    left = dict(stored)
    found: list[_Found] = []
    for entry in entries(cfg):
        tensor = left.pop(entry.key, None)
        if tensor is None and entry.is_copy:
            continue
        if tensor is None:
            raise CheckpointError(
                f"{folder}: tensor {entry.key!r} of shape {entry.shape} is missing from the weights, but config.json "
                "asks for it; the checkpoint is incomplete or belongs to another config.json."
            )
        _check_shape(tensor, entry.shape)
        scale = None
        if tensor.dtype == "F8_E4M3":
            scale = _match_scale(folder, tensor, left.pop(entry.key + SCALE_SUFFIX, None), block)
        found.append((entry, tensor, scale))
    left = {name: tensor for name, tensor in left.items() if not name.endswith(IGNORED_SUFFIXES)}
    if left:
        name = min(left)
        raise CheckpointError(
            f"{left[name].file}: tensor {name!r} (one of {len(left)} such) has no place in the model that "
            "config.json describes; it belongs to another architecture or another config.json."
        )
    return found


def _match_scale(
    folder: Path, tensor: StoredTensor, scale: StoredTensor | None, block: tuple[int, int] | None
) -> StoredTensor:
    if block is None:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} is F8_E4M3, but config.json has no quantization_config, so its "
            "block size is unknown; restore config.json's quantization_config."
        )
    if scale is None:
        raise CheckpointError(
            f"{folder}: scale {tensor.name + SCALE_SUFFIX!r} of the FP8 tensor in {tensor.file.name} is missing from "
            "all shards; the checkpoint is incomplete, fetch it again."
        )
    _check_shape(scale, tuple(-(-size // n) for size, n in zip(tensor.shape, block, strict=True)))
    return scale


def _check_shape(tensor: StoredTensor, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} has shape {tensor.shape}, but config.json asks for {expected}; "
            "config.json and weights belong to different models."
        )


def _in_file_order(found: list[_Found]) -> Iterator[_Found]:
    """In the order of the disk; copies last, when what they repeat is there."""
    yield from sorted(found, key=lambda item: (item[0].is_copy, item[1].file, item[1].start))


def _fill(
    arrays: dict[str, np.ndarray],
    entry: Entry,
    tensor: StoredTensor,
    scale: StoredTensor | None,
    block: tuple[int, int] | None,
) -> None:
    """Brings one tensor to its place; of a copy, checks that it is one."""
    official = tensor.read()
    if scale is not None and block is not None:
        official = np.asarray(dequantize_tiles(QTensor(official, scale.read()), tile=block))
    place = arrays[entry.path][entry.index]
    official = official.astype(place.dtype, copy=False)
    if not entry.is_copy:
        put_official(place, official, entry.input_axes)
    elif not np.array_equal(_bits(official), _bits(to_official(place, entry.input_axes))):
        raise CheckpointError(
            f"{tensor.file}: tensor {entry.key!r} differs from the main model's; an MTP module with its own embedding "
            "or head cannot be represented here, as the report shares them."
        )


def _bits(x: np.ndarray) -> np.ndarray:
    return x.view(np.uint16 if x.dtype == ml_dtypes.bfloat16 else np.uint32)


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array at a multiple of 64 bytes, which JAX takes over on a CPU without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + size].view(dtype).reshape(shape)
