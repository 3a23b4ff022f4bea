"""Variables to an official checkpoint folder, whole or not at all."""

import contextlib
import itertools
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dsv3_jax.config.check import ConfigError, check
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.paths import user_path
from dsv3_jax.interop.convert import to_official
from dsv3_jax.interop.hf_config import to_hf
from dsv3_jax.interop.hf_names import FP8_BLOCK, Entry, entries, flatten, stored_tensors
from dsv3_jax.interop.hf_tokenizer import tokenizer_files
from dsv3_jax.interop.safetensors_io import INDEX, SINGLE, CheckpointError, read_metadata, write_file
from dsv3_jax.interop.whole_folder import replaced, resolve, write_bytes
from dsv3_jax.model.params import abstract_params
from dsv3_jax.typing import Variables
from dsv3_kernels.quantize import quantize_tiles

DTYPES = ("float32", "bfloat16", "float8_e4m3fn")
_PRODUCER = {"format": "pt", "producer": "dsv3-jax"}
_OTHER_FILES = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", INDEX}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def save_pretrained(
    folder: str | Path,
    cfg: ModelConfig,
    variables: Variables,
    dtype: str = "bfloat16",
    max_shard_size: int | str = "5GB",
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Writes an official folder that transformers, vLLM and `load_pretrained` read.

    In "float8_e4m3fn" the linear layers are in 128x128 blocks with float32 `weight_scale_inv`; embedding, head,
    router, norms and the MTP projection stay bfloat16, router biases float32. float32 and bfloat16 parameters come
    back bit for bit from a folder of their own dtype. An FP8 folder loaded as float32 and saved as FP8 again is the
    same, byte for byte; through bfloat16 parameters it cannot be, as value times scale has more bits than they hold.

    Everything goes to a hidden folder beside, is fsynced, then renamed: a folder of that name is always whole. A
    process that was killed leaves `.NAME.partial-*`, which may be deleted. One tensor is in memory at a time.

    Args:
        folder: where a link points, if it is one. An earlier export of ours is replaced, anything else that is not
            empty only if `overwrite`.
        variables: `{"params": ..., "router_state": ...}` of `cfg`, on any device, of any float type.
        dtype: "float32", "bfloat16" or "float8_e4m3fn".
        max_shard_size: bytes, or such as "500MB" or "5GB"; a larger tensor has a shard of its own.
        tokenizer: a tokenizer.json to go with the model.
    Raises: `ConfigError` when `cfg` has no official form, `variables` do not fit it, or `folder` is in use;
        `CheckpointError` when the disk is full or refuses. Then nothing of the export is left, and what was there is.
    """
    check(dtype in DTYPES, f"dtype={dtype!r} cannot be saved; use one of {', '.join(DTYPES)}.")
    config = to_hf(cfg, dtype)
    leaves = _checked_leaves(cfg, variables)
    shards = _plan(cfg, dtype, _bytes(max_shard_size))
    texts = tokenizer_files(cfg, user_path(tokenizer)) if tokenizer is not None else {}
    folder = resolve(folder)
    _check_target(folder, overwrite)
    size = sum(item.size for shard in shards for item in shard)
    with replaced(folder, size=size, is_ours=_is_own_export) as new_folder:
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):06d}.safetensors"
            contents = [tensor for item in shard for tensor in item.tensors]
            write_file(new_folder / name, contents, _tensors(leaves, shard), _PRODUCER)
            weight_map.update((tensor, name) for tensor, _, _ in contents)
        if len(shards) > 1:
            texts[INDEX] = _json({"metadata": {"total_size": size}, "weight_map": weight_map})
        texts["generation_config.json"] = _json(
            {"_from_model_config": True, "bos_token_id": cfg.bos_id, "eos_token_id": cfg.eos_id}
        )
        texts["config.json"] = _json(config)
        for name, text in texts.items():
            write_bytes(new_folder / name, text.encode())


class _Item(NamedTuple):
    """One entry with the (name, shape, dtype) of what is stored for it: a tensor, or FP8 values and scales."""

    entry: Entry
    tensors: list[tuple[str, tuple[int, ...], str]]
    size: int


def _plan(cfg: ModelConfig, dtype: str, max_size: int) -> list[list[_Item]]:
    """Fills shards in order; values and scales stay together."""
    shards: list[list[_Item]] = [[]]
    filled = 0
    for entry in entries(cfg):
        tensors = stored_tensors(entry, dtype)
        size = sum(int(np.prod(shape)) * np.dtype(kind).itemsize for _, shape, kind in tensors)
        if shards[-1] and filled + size > max_size:
            shards.append([])
            filled = 0
        shards[-1].append(_Item(entry, tensors, size))
        filled += size
    return shards


def _tensors(leaves: dict[str, Any], shard: list[_Item]) -> Iterator[tuple[str, np.ndarray]]:
    for entry, stored, _ in shard:
        ours = _on_host(leaves[entry.path], entry.index)
        if len(stored) == 1:
            name, _, kind = stored[0]
            yield name, to_official(ours.astype(kind, copy=False), entry.input_axes)
            continue
        quantised = quantize_tiles(to_official(ours, entry.input_axes), tile=FP8_BLOCK)
        if not np.isfinite(quantised.scales).all():
            raise ConfigError(
                f"{entry.key}: holds a NaN or infinity, which FP8 blocks would spread over 128x128 numbers; "
                "export a finite checkpoint, or look at this one in dtype='float32'."
            )
        for (name, _, _), array in zip(stored, quantised, strict=True):
            yield name, array


def _on_host(leaf: Any, index: tuple[int | slice, ...]) -> np.ndarray:
    """`leaf[index]` in NumPy; of an array on devices, only the layer or expert is fetched."""
    if not isinstance(leaf, jax.Array) or _is_in_host_memory(leaf):
        return np.asarray(leaf)[index]
    stacked = tuple(itertools.takewhile(lambda n: isinstance(n, int), index))
    part = _part(leaf, np.asarray(stacked, np.int32), num_axes=len(stacked))
    return np.asarray(part)[index[len(stacked) :]]


def _is_in_host_memory(leaf: jax.Array) -> bool:
    """Whether NumPy can see it all without a copy."""
    return len(leaf.devices()) == 1 and next(iter(leaf.devices())).platform == "cpu"


@partial(jax.jit, static_argnames="num_axes")
def _part(leaf: jax.Array, position: jax.Array, *, num_axes: int) -> jax.Array:
    """leaf[position]; compiled once for each shape, not once for each position."""
    for axis in range(num_axes):
        leaf = jax.lax.dynamic_index_in_dim(leaf, position[axis], keepdims=False)
    return leaf


def _checked_leaves(cfg: ModelConfig, variables: Variables) -> dict[str, Any]:
    leaves, specs = flatten(variables), flatten(abstract_params(cfg))
    for path in sorted(specs.keys() ^ leaves.keys()):
        problem = "lack" if path in specs else "have an extra leaf"
        raise ConfigError(f"variables {problem} {path!r}; they belong to another ModelConfig.")
    for path, spec in specs.items():
        check(
            leaves[path].shape == spec.shape,
            f"variables {path!r} has shape {leaves[path].shape}, but the config asks for {spec.shape}; "
            "they belong to another ModelConfig.",
        )
    return leaves


def _check_target(folder: Path, overwrite: bool) -> None:
    try:
        if not folder.exists():
            return
        check(folder.is_dir(), f"{folder}: is a file; choose a folder for the export.")
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be looked at ({error.strerror}); choose another folder.") from error
    check(
        overwrite or not names or _is_own_export(folder),
        f"{folder}: is not empty and not an earlier export of ours; choose another folder or pass overwrite=True.",
    )


def _is_own_export(folder: Path) -> bool:
    """Whether it holds what `save_pretrained` writes, if only a part, and nothing else."""
    with contextlib.suppress(ValueError, OSError, AttributeError, CheckpointError):
        weights = {path.name for path in folder.iterdir()} - _OTHER_FILES
        return bool(weights) and all(
            name.startswith("model")
            and name.endswith(".safetensors")
            and read_metadata(folder / name).get("producer") == _PRODUCER["producer"]
            for name in weights
        )
    return False


def _bytes(size: int | str) -> int:
    if isinstance(size, str):
        number, unit = size[:-2], size[-2:].upper()
        check(
            unit in _UNITS and number.strip().isdigit(),
            f"max_shard_size={size!r} is not a size; write bytes or such as '500MB' or '5GB'.",
        )
        size = int(number) * _UNITS[unit]
    check(size > 0, f"max_shard_size={size} must be positive.")
    return size


def _json(value: object) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"
