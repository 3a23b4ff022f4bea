"""Checkpoints that survive a kill at any moment.

Orbax writes the arrays in the background; what makes a checkpoint of them is added when it has finished
(`checkpoint_files`). Old checkpoints go only when a newer one is complete. Of several processes each writes its arrays
and notes what it wrote; the first makes a checkpoint of it when all have.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from dsv3_jax.config.load import from_dict
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.stored import complete
from dsv3_jax.data.folder import TOKENIZER_NAME, file_sha256
from dsv3_jax.interop.json_file import shorten
from dsv3_jax.model.functions import functions_for
from dsv3_jax.model.params import init
from dsv3_jax.training import checkpoint_files as files
from dsv3_jax.training import hosts
from dsv3_jax.training.checkpoint_files import AVERAGE, HOST, MANIFEST, CheckpointError
from dsv3_jax.training.replace import replace_file
from dsv3_jax.training.state import TrainState


class Checkpoint(NamedTuple):
    """A whole checkpoint; `host` is what `save` was given."""

    path: Path
    step: int
    host: dict[str, Any]


class CheckpointFolder:
    """The checkpoints of one run: `folder/<step>/`. One writer at a time; the processes of a run save together.

    `log` receives one line for whatever the user should know (unfinished or corrupt checkpoints found).
    """

    def __init__(self, folder: Path, *, keep: int, log: Callable[[str], None] = print) -> None:
        self.folder = folder.absolute()
        self._keep = keep
        self._log = log
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._saving: tuple[int, Future[None]] | None = None

    def save(self, step: int, state: TrainState, average: Any, host: Mapping[str, Any]) -> None:
        """Starts saving and returns once the arrays have left the device; the caller may overwrite them.

        Waits for the save before this one, and raises its failure. Of several processes each may give a `host` with
        keys of its own, in objects at any depth: they are joined.
        """
        self.wait()
        items: dict[str, Any] = dict(state._asdict())
        if average is not None:
            items[AVERAGE] = average
        target = files.step_path(self.folder, step)
        if hosts.is_first() and (target.exists() or target.is_symlink()):
            raise CheckpointError(
                f"{target} is where the checkpoint of step {step} belongs; move away what lies there."
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            response = ocp.save_checkpointables_async(str(target), _without_empty(items))
        except Exception as error:  # Orbax and tensorstore do not say what they raise
            raise self._failed(step, error) from error
        self._saving = step, self._thread.submit(self._finish, target, response, dict(host))

    def wait(self) -> None:
        """Returns when no save is under way; raises `CheckpointError` if the last one failed."""
        if self._saving is None:
            return
        (step, future), self._saving = self._saving, None
        try:
            future.result()
        except Exception as error:  # as above
            raise self._failed(step, error) from error

    def close(self) -> None:
        """Waits for a save that is under way; its failure is told, not raised, as this runs when a run ends."""
        try:
            self.wait()
        except CheckpointError as error:
            self._log(str(error))

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first, corrupt ones included."""
        return [int(path.name) for path in files.finished(self.folder)]

    def clean(self) -> None:
        """Removes what interrupted saves left behind, and names what it leaves."""
        for path in files.unfinished(self.folder):
            reason = files.remove(path)
            done = "removed" if reason is None else f"left, as {reason}"
            self._log(f"checkpoint {path.name} was never finished (the run was stopped while saving): {done}.")
        for path in files.set_aside(self.folder):
            self._log(f"{path} is a corrupt checkpoint set aside earlier; delete it when you do not need it.")

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose every file is whole; None when there is none at all.

        A corrupt one is set aside as `<step>.corrupt` and the one before is taken.

        Raises:
            CheckpointError: there are checkpoints, but all are corrupt, or one cannot be read.
        """
        found = files.finished(self.folder)
        for path in reversed(found):
            reason = files.find_damage(path)
            if reason is None:
                return Checkpoint(path, int(path.name), files.read_host(path))
            aside = files.aside(path)
            try:
                path.rename(aside)
            except OSError as error:
                raise CheckpointError(
                    f"checkpoint {path} is corrupt ({reason}); it cannot be renamed: {error}."
                ) from error
            self._log(
                f"checkpoint {path.name} is corrupt ({reason}): set aside as {aside.name}, taking the one before."
            )
        if found or files.set_aside(self.folder):
            raise CheckpointError(
                f"every checkpoint in {self.folder} is corrupt; bring one back from a copy, or start again in another "
                "run dir."
            )
        return None

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of `step`, which another process has found whole."""
        path = files.step_path(self.folder, step)
        return Checkpoint(path, step, files.read_host(path))

    def _finish(self, target: Path, response: Any, host: dict[str, Any]) -> None:
        response.result()
        known: dict[str, list[int]] = {}
        if hosts.count() > 1:
            part = {"host": host, "files": files.own_inventory(target, jax.process_index())}
            replace_file(target / files.part_name(jax.process_index()), json.dumps(part))
            hosts.barrier(f"all parts of {target.name} are written")
        if hosts.is_first():
            if hosts.count() > 1:
                host, known = files.read_parts(target, hosts.count())
            replace_file(target / HOST, json.dumps(host))
            replace_file(target / MANIFEST, json.dumps(files.inventory(target, known)))
            self._remove_old()
        hosts.barrier(f"{target.name} is whole")

    def _remove_old(self) -> None:
        for old in files.finished(self.folder)[: -self._keep]:
            try:
                reason = files.remove(old)
            except CheckpointError as error:
                reason = str(error)
            if reason is not None:
                self._log(f"checkpoint {old.name} is left beyond train.output.keep_checkpoints: {reason}.")

    def _failed(self, step: int, error: Exception) -> CheckpointError:
        good = self.steps()
        rest = f"the checkpoint of step {good[-1]} is untouched" if good else "no earlier checkpoint exists"
        return CheckpointError(
            f"saving the checkpoint of step {step} in {self.folder} failed: {_first_line(error)}; {rest}. "
            f"{_free(self.folder)} Make room (or lower train.output.keep_checkpoints; or see to the right to "
            "write there) and start the same command again."
        )


def load(checkpoint: Checkpoint, abstract: TrainState, average: Any = None) -> tuple[TrainState, Any]:
    """The state and the average in a checkpoint; no average when none is asked for.

    Args:
        abstract: shapes, dtypes (and shardings) to restore into.
        average: NumPy arrays of the average's shapes, or shapes with shardings, or None.

    Raises:
        CheckpointError: it holds something else.
    """
    wanted: dict[str, Any] = {name: _with_sharding(tree) for name, tree in _without_empty(abstract._asdict()).items()}
    if average is not None:
        wanted[AVERAGE] = average
    loaded = _load(checkpoint.path, wanted)
    return TrainState(**{name: loaded.get(name, {}) for name in TrainState._fields}), loaded.get(AVERAGE)


def load_variables(
    run_dir: Path, *, use_average: bool = False, log: Callable[[str], None] = print
) -> tuple[dict, dict]:
    """The newest whole checkpoint of a run as (resolved configuration, variables), for serving and export.

    Returns NumPy arrays: `{"params", "router_state"}`; `use_average` takes the moving average of the parameters.
    Writes nothing. `log` receives one line for a corrupt checkpoint, and one for functions that the run had replaced.

    Raises:
        CheckpointError: `run_dir` holds no checkpoint, or none that is whole, or no average, or a tokenizer.json of
            another run.
        ConfigError: a newer version of dsv3_jax wrote it.
    """
    for path in reversed(files.finished(run_dir / "checkpoints")):
        reason = files.find_damage(path)
        if reason is not None:
            log(f"checkpoint {path.name} is corrupt ({reason}): taking the one before.")
            continue
        return _variables(path, run_dir, use_average, log)
    raise CheckpointError(f"{run_dir} holds no whole checkpoint; train with --run-dir {run_dir} first.")


def _variables(path: Path, run_dir: Path, use_average: bool, log: Callable[[str], None]) -> tuple[dict, dict]:
    name = AVERAGE if use_average else "params"
    if not (path / name).is_dir():
        raise CheckpointError(f"checkpoint {path} has no {name}; it was trained with ema_decay=0.")
    host = files.read_host(path)
    config = complete(host.get("config"), where=str(path / HOST))
    _check_tokenizer(run_dir, host.get("digests"))
    if host.get("functions"):
        names = ", ".join(f"{field} by {name}" for field, name in host["functions"].items())
        log(
            f"{run_dir} was trained with functions of its own ({names}); what uses its parameters needs the same ones "
            "(functions=, or serve.py --config)."
        )
    cfg: ModelConfig = from_dict(config["model"], ModelConfig)
    dtype = functions_for(str(config["precision"])).param_dtype
    variables = jax.eval_shape(lambda key: init(cfg, key, dtype), jax.random.key(0))
    wanted = {
        name: _empty(variables["params"], np.float32 if use_average else None),
        "router_state": _empty(variables["router_state"]),
    }
    with _alone():
        loaded = _load(path, _without_empty(wanted))
    return config, {"params": loaded[name], "router_state": loaded.get("router_state", {})}


def _load(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    try:
        return ocp.load_checkpointables(str(path.absolute()), wanted)  # a relative path is not found to hold arrays
    except Exception as error:  # Orbax and tensorstore do not say what they raise
        raise CheckpointError(
            f"checkpoint {path} is whole but cannot be loaded ({_first_line(error)}): it holds other arrays than its "
            f"configuration says, or another version of dsv3_jax or Orbax wrote it; use that version."
        ) from error


def _alone() -> Any:
    """Within it Orbax waits for no other process of this run."""
    me = jax.process_index()
    options = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    return ocp.Context(multiprocessing_options=options) if hosts.count() > 1 else contextlib.nullcontext()


def _check_tokenizer(run_dir: Path, digests: Any) -> None:
    tokenizer = run_dir / TOKENIZER_NAME
    if isinstance(digests, Mapping) and tokenizer.is_file() and file_sha256(tokenizer) != digests.get("tokenizer"):
        raise CheckpointError(
            f"{tokenizer} is not the tokenizer that this run has learned with; copy it from the run's data folder "
            f"({run_dir / 'data'}, or data.cache_dir)."
        )


def _without_empty(items: dict[str, Any]) -> dict[str, Any]:
    return {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}


def _with_sharding(tree: Any) -> Any:
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or default)

    return jax.tree.map(place, tree)


def _empty(tree: Any, dtype: Any = None) -> Any:
    return jax.tree.map(lambda leaf: np.empty(leaf.shape, dtype or leaf.dtype), tree)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {shorten(str(error).splitlines()[0]) if str(error) else '(no message)'}"


def _free(folder: Path) -> str:
    if not folder.exists():
        return ""
    return f"{shutil.disk_usage(folder).free / 1e9:.2f} GB are free there."
