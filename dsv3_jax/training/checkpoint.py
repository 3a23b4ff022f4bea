"""Checkpoints that survive a kill at any moment.

Orbax writes the arrays in the background; when it has finished, `host.json` and last of all `MANIFEST.json` (size and
CRC-32 of every file) are added. A folder without a manifest was never finished; one that disagrees with its manifest
is corrupt. Old checkpoints go only when a newer one is complete.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from dsv3_jax.config.check import UserError
from dsv3_jax.config.load import from_dict
from dsv3_jax.training.state import TrainState, abstract_state

MANIFEST = "MANIFEST.json"
HOST = "host.json"


# What Orbax and tensorstore raise when a file cannot be written.
_WRITE_ERRORS = (OSError, ValueError, RuntimeError)


class CheckpointError(UserError):
    """A checkpoint could not be written, or none can be read."""


class Restored(NamedTuple):
    """`host` is what `save` was given; `average` None when the run keeps none."""

    step: int
    state: TrainState
    average: Any
    host: dict[str, Any]


class CheckpointFolder:
    """The checkpoints of one run: `folder/<step>/`. One writer at a time; not for several processes.

    `say` receives one line for whatever the user should know (unfinished or corrupt checkpoints found).
    """

    def __init__(self, folder: Path, *, keep: int, say: Callable[[str], None] = print) -> None:
        self.folder = folder.absolute()
        self._keep = keep
        self._say = say
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._saving: tuple[int, Future[None]] | None = None

    def save(self, step: int, state: TrainState, average: Any, host: Mapping[str, Any]) -> None:
        """Starts saving and returns once the arrays have left the device; the caller may overwrite them.

        Waits for the save before this one, and raises its failure.
        """
        self.wait()
        items: dict[str, Any] = dict(state._asdict())
        if average is not None:
            items["average"] = average
        target = self.folder / f"{step:012d}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            response = ocp.save_checkpointables_async(str(target), _without_empty(items))
        except _WRITE_ERRORS as error:
            raise self._failed(step, error) from error
        self._saving = step, self._thread.submit(self._finish, target, response, dict(host))

    def wait(self) -> None:
        """Returns when no save is under way; raises `CheckpointError` if the last one failed."""
        if self._saving is None:
            return
        (step, future), self._saving = self._saving, None
        try:
            future.result()
        except _WRITE_ERRORS as error:
            raise self._failed(step, error) from error

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first, corrupt ones included."""
        return sorted(_step_of(path) for path in self._finished())

    def clean(self) -> None:
        """Removes what an interrupted save left behind."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.is_dir() and not path.name.endswith(".corrupt") and not (path / MANIFEST).exists():
                self._say(f"checkpoint {path.name} was never finished (the run was stopped while saving): removed.")
                shutil.rmtree(path)

    def restore_newest(self, abstract: TrainState, average: Any = None) -> Restored | None:
        """The newest checkpoint whose every file is whole; None when there is none at all.

        A corrupt one is set aside as `<step>.corrupt` and the one before is taken.

        Args:
            abstract: shapes, dtypes (and shardings) to restore into.
            average: NumPy arrays of the average's shapes, or None.

        Raises:
            CheckpointError: there are checkpoints, but all are corrupt.
        """
        found = sorted(self._finished(), key=_step_of, reverse=True)
        for path in found:
            reason = find_damage(path)
            if reason is None:
                return self._load(path, abstract, average)
            aside = path.with_name(path.name + ".corrupt")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            self._say(
                f"checkpoint {path.name} is corrupt ({reason}): set aside as {aside.name}, taking the one before."
            )
        if found or any(self.folder.glob("*.corrupt")):
            raise CheckpointError(
                f"every checkpoint in {self.folder} is corrupt; bring one back from a copy, or start anew in another "
                "run dir."
            )
        return None

    def _load(self, path: Path, abstract: TrainState, average: Any) -> Restored:
        host = json.loads((path / HOST).read_text())
        wanted: dict[str, Any] = {
            name: _with_sharding(tree) for name, tree in _without_empty(abstract._asdict()).items()
        }
        if average is not None:
            wanted["average"] = average
        loaded = ocp.load_checkpointables(str(path), wanted)
        state = TrainState(**{name: loaded.get(name, {}) for name in TrainState._fields})
        return Restored(_step_of(path), state, loaded.get("average"), host)

    def _finished(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [path for path in self.folder.iterdir() if path.name.isdigit() and (path / MANIFEST).exists()]

    def _finish(self, target: Path, response: Any, host: dict[str, Any]) -> None:
        response.result()
        _write(target / HOST, json.dumps(host))
        _write(target / MANIFEST, json.dumps(_inventory(target)))
        for old in self.steps()[: -self._keep]:
            _remove(self.folder / f"{old:012d}")

    def _failed(self, step: int, error: Exception) -> CheckpointError:
        kept = self.steps()
        good = f"the checkpoint of step {kept[-1]} is untouched" if kept else "no earlier checkpoint exists"
        return CheckpointError(
            f"saving the checkpoint of step {step} in {self.folder} failed: {_first_line(error)}; {good}. "
            f"{_free(self.folder)} Make room (or lower train.output.keep_checkpoints) and start the same command again."
        )


def find_damage(path: Path) -> str | None:
    """Why the checkpoint at `path` cannot be trusted, or None: every file is read and compared with the manifest."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"{MANIFEST} is unreadable"
    if not isinstance(manifest, dict) or HOST not in manifest:
        return f"{MANIFEST} is incomplete"
    for name, recorded in manifest.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _fingerprint(path / name) != recorded:
            return f"{name} is not as it was written"
    return None


def load_variables(
    run_dir: Path, *, use_average: bool = False, say: Callable[[str], None] = print
) -> tuple[dict, dict]:
    """The newest whole checkpoint of a run as (resolved configuration, variables), for serving and export.

    Returns NumPy arrays: `{"params", "router_state"}`; `use_average` takes the moving average of the parameters.

    Raises:
        CheckpointError: `run_dir` holds no checkpoint, or none that is whole, or no average.
    """
    folder = CheckpointFolder(run_dir / "checkpoints", keep=1, say=say)
    for step in reversed(folder.steps()):
        path = folder.folder / f"{step:012d}"
        reason = find_damage(path)
        if reason is not None:
            say(f"checkpoint {path.name} is corrupt ({reason}): taking the one before.")
            continue
        name = "average" if use_average else "params"
        if not (path / name).is_dir():
            raise CheckpointError(f"checkpoint {path} has no {name}; it was trained with ema_decay=0.")
        config = json.loads((path / HOST).read_text())["config"]
        abstract = abstract_state(from_dict(config))
        wanted = {
            name: _empty(abstract.params, np.float32 if use_average else None),
            "router_state": _empty(abstract.router_state),
        }
        loaded = ocp.load_checkpointables(str(path), _without_empty(wanted))
        return config, {"params": loaded[name], "router_state": loaded.get("router_state", {})}
    raise CheckpointError(f"{run_dir} holds no whole checkpoint; train with --run-dir {run_dir} first.")


def _without_empty(items: dict[str, Any]) -> dict[str, Any]:
    return {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}


def _inventory(path: Path) -> dict[str, list[int]]:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): _fingerprint(file) for file in files}


def _fingerprint(file: Path) -> list[int]:
    size, crc = 0, 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def _write(path: Path, text: str) -> None:
    """Writes all of `path` or nothing, and has it on the disk before returning."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(path)


def _remove(path: Path) -> None:
    """Deletes a checkpoint, its manifest first: interrupted, it is an unfinished one."""
    (path / MANIFEST).unlink()
    shutil.rmtree(path)


def _step_of(path: Path) -> int:
    return int(path.name)


def _with_sharding(tree: Any) -> Any:
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or default)

    return jax.tree.map(place, tree)


def _empty(tree: Any, dtype: Any = None) -> Any:
    return jax.tree.map(lambda leaf: np.empty(leaf.shape, dtype or leaf.dtype), tree)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else '(no message)'}"


def _free(folder: Path) -> str:
    if not folder.exists():
        return ""
    return f"{shutil.disk_usage(folder).free / 1e9:.2f} GB are free there."
