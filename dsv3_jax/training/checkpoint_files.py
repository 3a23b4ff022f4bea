"""A checkpoint as it lies on disk: names, manifest, damage, removal.

`<step in twelve digits>/` holds what Orbax writes, then `host.json` (what the host must know to go on) and last of all
`MANIFEST.json` (size and CRC-32 of every file). A folder without a manifest was never finished; one that disagrees
with its manifest is corrupt. Where several processes write, each notes its part of both in `part-<process>.json`.
"""

import functools
import json
import re
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from dsv3_jax.config.check import UserError
from dsv3_jax.training.state import TrainState

MANIFEST = "MANIFEST.json"
HOST = "host.json"
AVERAGE = "average"

_STEP = re.compile(r"[0-9]{12}")
_UNFINISHED = re.compile(r"[0-9]{12}(\.orbax-checkpoint-tmp(-[0-9]+)?)?")
_CORRUPT = re.compile(r"[0-9]{12}\.corrupt(-[0-9]+)?")
_WRITTEN_BY_ORBAX = {"_CHECKPOINT_METADATA", "commit_success.txt", "orbax.checkpoint"}
_WRITTEN_BY_US = {HOST, MANIFEST, f"{HOST}.partial", f"{MANIFEST}.partial"}
_PART = re.compile(r"part-[0-9]{5}\.json(\.partial)?")
_ENTRIES = {*TrainState._fields, AVERAGE, *_WRITTEN_BY_ORBAX, *_WRITTEN_BY_US}
"""Whatever a save puts into its folder."""

_JSON_LIMIT = 2**28


class CheckpointError(UserError):
    """A checkpoint could not be written, or none can be read."""


def step_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return folder / f"{step:012d}"


def finished(folder: Path) -> list[Path]:
    """The checkpoints in `folder` that have a manifest, oldest first, corrupt ones included."""
    return [path for path in _named(folder, _STEP) if _has_manifest(path)]


def unfinished(folder: Path) -> list[Path]:
    """What interrupted saves left in `folder`: their names, no manifest, and no link."""
    found = _named(folder, _UNFINISHED)
    return [path for path in found if not path.is_symlink() and not _has_manifest(path)]


def set_aside(folder: Path) -> list[Path]:
    """The corrupt checkpoints that were renamed."""
    return _named(folder, _CORRUPT)


def part_name(process: int) -> str:
    """The file in which a process notes its part of manifest and `host.json`."""
    return f"part-{process:05d}.json"


def inventory(path: Path, known: Mapping[str, list[int]] | None = None) -> dict[str, list[int]]:
    """Size and CRC-32 of every file of a checkpoint, those that are `known` as they are known."""
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    return {name: (known or {}).get(name) or fingerprint(path / name) for name in names}


def own_inventory(path: Path, process: int) -> dict[str, list[int]]:
    """Size and CRC-32 of the arrays that one of several processes has written."""
    files = (file for folder in path.rglob(f"ocdbt.process_{process}") for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): fingerprint(file) for file in sorted(files)}


def read_parts(path: Path, processes: int) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """`host.json` and inventory that all processes know together; what each knows of both is in its part."""
    parts = [_read_json(path / part_name(process)) for process in range(processes)]
    known = {name: found for part in parts for name, found in part["files"].items()}
    return functools.reduce(_joined, (part["host"] for part in parts)), known


def find_damage(path: Path) -> str | None:
    """Why the checkpoint at `path` cannot be trusted, or None: every file is read and compared with the manifest.

    Raises:
        CheckpointError: a file may not be read, so that nobody knows.
    """
    try:
        manifest = _read_json(path / MANIFEST)
        if not isinstance(manifest, dict) or HOST not in manifest:
            return f"{MANIFEST} is incomplete"
        for name, recorded in manifest.items():
            inside = PurePosixPath(name)
            if inside.is_absolute() or ".." in inside.parts:
                return f"{MANIFEST} names {name!r}, which lies outside"
            if not (path / name).is_file():
                return f"{name} is missing"
            if fingerprint(path / name) != recorded:
                return f"{name} is not as it was written"
        if not isinstance(_read_json(path / HOST), dict):
            return f"{HOST} is no JSON object"
    except PermissionError as error:
        raise _unreadable(path, error) from error
    except (OSError, ValueError, RecursionError) as error:
        return f"it is unreadable: {error}"
    return None


def fingerprint(file: Path) -> list[int]:
    """Size and CRC-32 of a file, as the manifest has them."""
    size, crc = 0, 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def read_host(path: Path) -> dict[str, Any]:
    """`host.json` of a checkpoint that is whole."""
    return _read_json(path / HOST)


def remove(path: Path) -> str | None:
    """Deletes a checkpoint or what is left of one, its manifest first: interrupted, it is an unfinished one.

    Returns why it was left, if it was: it is a link, or holds what no save writes.

    Raises:
        CheckpointError: it cannot be deleted.
    """
    if path.is_symlink():
        return "it is a link"
    try:
        foreign = sorted(entry.name for entry in path.iterdir() if not _is_ours(entry.name))
        if foreign:
            return f"it holds {', '.join(foreign[:3])}, which no save writes"
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be deleted ({error}); make it deletable or move it away.") from error
    return None


def aside(path: Path) -> Path:
    """A free name to set a corrupt checkpoint aside under."""
    taken, name = 1, path.with_name(f"{path.name}.corrupt")
    while name.exists() or name.is_symlink():
        taken += 1
        name = path.with_name(f"{path.name}.corrupt-{taken}")
    return name


def _is_ours(name: str) -> bool:
    return name in _ENTRIES or _PART.fullmatch(name) is not None


def _joined(left: Any, right: Any) -> Any:
    """Objects joined key by key, all that is no object as it is on the left."""
    if not isinstance(left, dict) or not isinstance(right, dict):
        return left
    return {**right, **{key: _joined(value, right.get(key)) for key, value in left.items()}}


def _named(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """The folders (and links to folders) in `folder` of such names, sorted; none if `folder` does not exist."""
    try:
        return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name) and path.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _unreadable(folder, error) from error


def _has_manifest(path: Path) -> bool:
    try:
        return (path / MANIFEST).is_file()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read ({error}); give yourself the right to read all that is in it.")


def _read_json(file: Path) -> Any:
    if file.stat().st_size > _JSON_LIMIT:
        raise ValueError(f"{file.name} has {file.stat().st_size} bytes")
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} is not JSON") from error
