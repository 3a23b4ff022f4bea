"""Which stored tensor fills which place of a model, settled before anything is allocated."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.interop.hf_names import IGNORED_SUFFIXES, SCALE_SUFFIX, Entry, entries
from dsv3_jax.interop.json_file import CheckpointError, shorten
from dsv3_jax.interop.safetensors_io import StoredTensor
from dsv3_kernels.quantize import QTensor, dequantize_tiles

WEIGHTS, SCALES = ("F32", "BF16", "F16", "F8_E4M3"), ("F32", "BF16", "F16", "F8_E8M0")
"""The stored types that are read; F8_E4M3 only as a matrix with scales."""

_MTP_ONLY = re.compile(r"model\.layers\.([0-9]{1,9})\.(?:eh_proj|enorm|hnorm|shared_head|embed_tokens)\.")
_LAYER = re.compile(r"model\.layers\.([0-9]{1,9})\.")
_COMPARED_BYTES = 2**24


class Found(NamedTuple):
    """An entry of the model with its tensor, and its scales if that is FP8."""

    entry: Entry
    tensor: StoredTensor
    scale: StoredTensor | None


class Match(NamedTuple):
    """What is loaded. `left_out`: why MTP modules are not; empty when nothing was left out."""

    cfg: ModelConfig
    found: list[Found]
    left_out: str


def match(folder: Path, cfg: ModelConfig, stored: dict[str, StoredTensor], block: tuple[int, int] | None) -> Match:
    """Pairs every entry of the model with its tensor; nothing may be left over but MTP modules.

    The main model must be whole. MTP modules are an option: unless all that config.json announces are whole, fit, and
    repeat the main model's embedding and head, `cfg.mtp_depth` is 0 and the main model is loaded without them.

    Raises: `CheckpointError` naming file and tensor for a main tensor that is missing, misshapen, of a type that is not
        read, or without its scales; for scales that are negative or not finite, for a router bias that is not finite,
        and for a tensor that has no place.
    """
    left = dict(stored)
    main_cfg = dataclasses.replace(cfg, mtp_depth=0)
    main = [_find(folder, entry, left, block) for entry in entries(main_cfg)]
    optional = _mtp_names(cfg, left)
    rest = [name for name in left if name not in optional and not name.endswith(IGNORED_SUFFIXES)]
    if rest:
        raise _no_place(left, rest, main_cfg.num_layers)
    if cfg.mtp_depth == 0:
        reason = f"{len(optional)} tensors of MTP modules, which this config.json does not announce" if optional else ""
        return Match(main_cfg, main, reason)
    try:
        modules = list(_find_modules(folder, cfg, left, block))
        _check_copies([item for item in modules if item.entry.is_copy], {item.entry.path: item for item in main}, block)
        rest = [name for name in left if _layer(name) < cfg.num_layers + cfg.mtp_depth]
        rest = [name for name in rest if name in optional and not name.endswith(IGNORED_SUFFIXES)]
        if rest:
            raise _no_place(left, rest, cfg.num_layers)
    except CheckpointError as error:
        return Match(
            main_cfg, main, f"the MTP modules that num_nextn_predict_layers={cfg.mtp_depth} announces: {error}"
        )
    more = [name for name in left if name in optional]
    reason = f"{len(more)} tensors of MTP modules beyond num_nextn_predict_layers={cfg.mtp_depth}" if more else ""
    return Match(cfg, [*main, *(item for item in modules if not item.entry.is_copy)], reason)


def _find(folder: Path, entry: Entry, left: dict[str, StoredTensor], block: tuple[int, int] | None) -> Found:
    """Takes the tensor of an entry, and its scales, out of `left`."""
    tensor = left.pop(entry.key, None)
    if tensor is None:
        raise CheckpointError(
            f"{folder}: tensor {entry.key!r} of shape {entry.shape} is missing from the weights, but config.json "
            "asks for it; the checkpoint is incomplete or belongs to another config.json."
        )
    _check_type(tensor, WEIGHTS)
    scale = None
    if tensor.dtype == "F8_E4M3":
        if len(tensor.shape) != 2:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name!r} of shape {tensor.shape} is F8_E4M3, but only matrices have "
                "scales by blocks; convert it to BF16."
            )
        _check_shape(tensor, entry.shape)
        scale = _find_scale(folder, tensor, left.pop(entry.key + SCALE_SUFFIX, None), block)
    _check_shape(tensor, entry.shape)
    if entry.path.startswith("router_state/") and not np.isfinite(tensor.read().astype(np.float32)).all():
        raise CheckpointError(
            f"{tensor.file}: router bias {tensor.name!r} holds a NaN or infinity, with which experts cannot be chosen; "
            "fetch the file again, or take an earlier checkpoint of that training."
        )
    return Found(entry, tensor, scale)


def _find_scale(
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
    _check_type(scale, SCALES)
    _check_shape(scale, tuple(-(-size // n) for size, n in zip(tensor.shape, block, strict=True)))
    values = scale.read().astype(np.float32)
    if not (np.isfinite(values) & (values >= 0)).all():
        raise CheckpointError(
            f"{scale.file}: scale {scale.name!r} holds a value that is negative or not finite; the file is damaged, "
            "fetch it again."
        )
    return scale


def _find_modules(
    folder: Path, cfg: ModelConfig, left: dict[str, StoredTensor], block: tuple[int, int] | None
) -> Iterator[Found]:
    """The entries of MTP modules; the copies of embedding and head may be absent."""
    for entry in entries(cfg):
        if _layer(entry.key) >= cfg.num_layers and not (entry.is_copy and entry.key not in left):
            yield _find(folder, entry, left, block)


def _check_copies(copies: list[Found], main: dict[str, Found], block: tuple[int, int] | None) -> None:
    for copy in copies:
        original = main[copy.entry.path]
        rows = copy.entry.shape[0]
        step = max(1, _COMPARED_BYTES // max(1, 4 * copy.entry.shape[1]))
        step = step if block is None else -(-step // block[0]) * block[0]
        for start in range(0, rows, step):
            mine, other = (read_rows(item, start, min(start + step, rows), block) for item in (copy, original))
            if not np.array_equal(mine.view(np.uint8), other.view(np.uint8)):
                raise CheckpointError(
                    f"{copy.tensor.file}: tensor {copy.tensor.name!r} differs from the main model's "
                    f"{original.tensor.name!r}; an MTP module with its own embedding or head cannot be represented "
                    "here, as the report shares them."
                )


def read_rows(item: Found, start: int, stop: int, block: tuple[int, int] | None) -> np.ndarray:
    """Rows of a matrix in float32, dequantised; `start` is a multiple of the block's rows."""
    rows = item.tensor.read(start, stop)
    if item.scale is None or block is None:
        return rows.astype(np.float32)
    scales = item.scale.read(start // block[0], -(-stop // block[0]))
    return np.asarray(dequantize_tiles(QTensor(rows, scales), tile=block))


def _mtp_names(cfg: ModelConfig, left: dict[str, StoredTensor]) -> set[str]:
    """What belongs to MTP modules: to the layers announced, or to a layer beyond the main ones that has their parts."""
    announced = range(cfg.num_layers, cfg.num_layers + cfg.mtp_depth)
    seen = {int(found[1]) for name in left if (found := _MTP_ONLY.match(name)) and int(found[1]) >= cfg.num_layers}
    return {name for name in left if (layer := _layer(name)) in announced or layer in seen}


def _layer(name: str) -> int:
    """The layer of an official name, -1 for none."""
    found = _LAYER.match(name)
    return int(found[1]) if found else -1


def _no_place(left: dict[str, StoredTensor], names: list[str], num_layers: int) -> CheckpointError:
    name = min(names)
    reason = "it belongs to another architecture or another config.json"
    if _layer(name) >= num_layers:
        reason = f"its layer is beyond num_hidden_layers={num_layers} and is not an MTP module; correct config.json"
    return CheckpointError(
        f"{left[name].file}: tensor {shorten(name)!r} (one of {len(names)} such) has no place in the model that "
        f"config.json describes; {reason}."
    )


def _check_type(tensor: StoredTensor, read: tuple[str, ...]) -> None:
    if tensor.dtype not in read:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} has dtype {tensor.dtype}, which is not read here; "
            f"convert it to one of {', '.join(read)}."
        )


def _check_shape(tensor: StoredTensor, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} has shape {tensor.shape}, but config.json asks for {expected}; "
            "config.json and weights belong to different models."
        )
