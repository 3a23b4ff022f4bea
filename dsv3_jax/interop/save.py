"""Variables to an official checkpoint folder, whole or not at all."""

import contextlib
import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dsv3_jax.config.check import ConfigError, check
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.paths import user_path
from dsv3_jax.interop.convert import official_view, to_official
from dsv3_jax.interop.hf_config import to_hf
from dsv3_jax.interop.hf_names import FP8_BLOCK, Entry, entries, flatten, stored_tensors
from dsv3_jax.interop.hf_tokenizer import companion_files, declared_ids
from dsv3_jax.interop.safetensors_io import INDEX, SINGLE, CheckpointError, read_metadata, write_file
from dsv3_jax.interop.whole_folder import replaced, resolve, write_bytes
from dsv3_jax.model.params import abstract_params
from dsv3_jax.progress import progress
from dsv3_jax.typing import Variables
from dsv3_kernels.quantize import quantize_tiles

DTYPES = ("float32", "bfloat16", "float8_e4m3fn")
_PRODUCER = "dsv3-jax"
_OTHER_FILES = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", INDEX}
"""What an export may have beside its weights, and whatever else their headers list as written with them."""


def save_pretrained(
    folder: str | Path,
    cfg: ModelConfig,
    variables: Variables,
    dtype: str = "bfloat16",
    max_shard_size: int | float | str = "5GB",
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    with_mtp: bool = True,
    check_stop: Callable[[], None] | None = None,
) -> None:
    """Writes an official folder that transformers, vLLM and `load_pretrained` read.

    In "float8_e4m3fn" the linear layers are in 128x128 blocks with float32 `weight_scale_inv`; embedding, head,
    router, norms and the MTP projection stay bfloat16, router biases float32. float32 and bfloat16 parameters come
    back bit for bit from a folder of their own dtype. An FP8 folder loaded as float32 and saved as FP8 again is the
    same, byte for byte; through bfloat16 parameters it cannot be, as value times scale has more bits than they hold.

    Everything goes to a hidden folder beside, is fsynced, then renamed: a folder of that name is always whole. A
    process that was killed leaves `.NAME.partial-*`, which may be deleted. Two tensors are in memory at a time. On a
    terminal a bar with the time left appears after ten seconds.

    Args:
        folder: where a link points, if it is one. An earlier export of ours is replaced, anything else that is not
            empty only if `overwrite`.
        variables: `{"params": ..., "router_state": ...}` of `cfg`, on any device, of any float type.
        dtype: "float32", "bfloat16" or "float8_e4m3fn".
        max_shard_size: bytes, or such as "500MB" or "5GiB"; a larger tensor has a shard of its own.
        tokenizer: a tokenizer.json to go with the model, or an official folder, of which tokenizer, chat templates,
            generation_config.json and the ids that config.json names go along as they are.
        with_mtp: whether MTP modules are written; without them the main model alone is.
        check_stop: called after every piece of some megabytes; what it raises ends the export, which leaves nothing.
    Raises: `ConfigError` when `cfg` has no official format, `variables` do not fit it, or `folder` is in use;
        `CheckpointError` when the disk is full or refuses. Then nothing of the export is left, and what was there is.
    """
    check(dtype in DTYPES, f"dtype={dtype!r} cannot be saved; use one of {', '.join(DTYPES)}.")
    source = None if tokenizer is None else user_path(tokenizer)
    if not with_mtp:
        cfg, variables = _main_model(cfg, variables)
    config = to_hf(cfg, dtype) | ({} if source is None else declared_ids(cfg, source))
    leaves = _checked_leaves(cfg, variables)
    shards = _plan(cfg, dtype, _bytes(max_shard_size))
    files = companion_files(cfg, source)
    folder = resolve(folder)
    _check_target(folder, overwrite)
    size = sum(item.size for shard in shards for item in shard)
    metadata = {"format": "pt", "producer": _PRODUCER}
    if extra := sorted(files.keys() - _OTHER_FILES):
        metadata["files"] = "\n".join(extra)
    with (
        replaced(folder, size=size, is_ours=_is_own_export) as new_folder,
        progress(f"writing {folder.name}", size) as shown,
    ):

        def advance(num_bytes: int) -> None:
            shown(num_bytes)
            if check_stop is not None:
                check_stop()

        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):06d}.safetensors"
            contents = [tensor for item in shard for tensor in item.tensors]
            write_file(new_folder / name, contents, _tensors(leaves, shard), metadata, advance)
            weight_map.update((tensor, name) for tensor, _, _ in contents)
        if len(shards) > 1:
            files[INDEX] = _json({"metadata": {"total_size": size}, "weight_map": weight_map})
        files["config.json"] = _json(config)
        for name, data in files.items():
            write_bytes(new_folder / name, data)


class _Item(NamedTuple):
    """One entry with the (name, shape, dtype) of what is stored for it: a tensor, or FP8 values and scales."""

    entry: Entry
    tensors: list[tuple[str, tuple[int, ...], str]]
    size: int


def _plan(cfg: ModelConfig, dtype: str, max_size: int | float) -> list[list[_Item]]:
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
            yield name, official_view(ours.astype(kind, copy=False), entry.input_axes)
            continue
        quantised = quantize_tiles(to_official(ours, entry.input_axes), tile=FP8_BLOCK)
        if not np.isfinite(quantised.scales).all():
            raise ConfigError(
                f"{entry.key}: holds a NaN or infinity, which FP8 blocks would spread over 128x128 elements; "
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


def _main_model(cfg: ModelConfig, variables: Variables) -> tuple[ModelConfig, Variables]:
    without = {kind: {name: tree for name, tree in trees.items() if name != "mtp"} for kind, trees in variables.items()}
    return dataclasses.replace(cfg, mtp_depth=0), without


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
    with contextlib.suppress(ValueError, OSError, CheckpointError):
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
        weights = {name for name in names if name.startswith("model") and name.endswith(".safetensors")}
        written = [read_metadata(folder / name) for name in weights]
        known = _OTHER_FILES.union(weights, *(each.get("files", "").split("\n") for each in written))
        return bool(written) and names <= known and all(each.get("producer") == _PRODUCER for each in written)
    return False


def _bytes(given: int | float | str) -> int | float:
    size = given
    if isinstance(size, str):
        match = re.fullmatch(r"([0-9]{1,15}) ?([KMGT]i?)?B?", size.strip(), re.IGNORECASE)
        check(match is not None, f"max_shard_size={given!r} is not a size; write bytes or such as '500MB' or '5GiB'.")
        assert match is not None
        number, unit = match[1], (match[2] or "").upper()
        size = int(number) * (1024 if unit.endswith("I") else 1000) ** " KMGT".index(unit[:1] or " ")
    check(size > 0, f"max_shard_size={given} must be positive.")
    return size


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
