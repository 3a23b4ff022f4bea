"""Opens a run: its folder, data and state, fresh or as the newest checkpoint left them."""

import contextlib
import dataclasses
import fcntl
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from dsv3_jax.config.check import UserError, check
from dsv3_jax.config.load import Difference, diff, to_dict
from dsv3_jax.config.mesh_rules import check_streams
from dsv3_jax.config.paths import user_path
from dsv3_jax.config.run import RunConfig
from dsv3_jax.config.stored import complete
from dsv3_jax.data.batch import Batch, stack
from dsv3_jax.data.build_folder import PreparedData, prepare
from dsv3_jax.data.loader import make_train_iterator
from dsv3_jax.data.row_streams import Part
from dsv3_jax.interop.hf_config import to_hf
from dsv3_jax.interrupt import Stop
from dsv3_jax.model.functions import Functions, functions_for
from dsv3_jax.parallel.axes import ROWS
from dsv3_jax.training import hosts
from dsv3_jax.training.batches import own_rows
from dsv3_jax.training.checkpoint import Checkpoint, CheckpointFolder, load
from dsv3_jax.training.checkpoint_files import HOST, CheckpointError
from dsv3_jax.training.ema import HostEMA
from dsv3_jax.training.metrics import Progress
from dsv3_jax.training.pipelined import PipelineStep
from dsv3_jax.training.replace import replace_file
from dsv3_jax.training.replaced import replaced
from dsv3_jax.training.schedules import num_micro_batches, rates_at
from dsv3_jax.training.sharded import used_axes
from dsv3_jax.training.state import TrainState, abstract_state, init_state, state_shardings
from dsv3_jax.training.step import Rates, Step, StepReport

CONFIG_NAME = "config.json"

HARMLESS = (
    "name",
    "data.cache_dir",
    "data.heldout_overlap",
    "data.prefetch_batches",
    "parallel.",
    "train.loss_chunk_size",
    "train.output.",
    "train.remat",
    "train.total_tokens",
)
"""Keys (or groups) that may change when a run is resumed: what it learns from each batch stays the same."""


class StepTaken(NamedTuple):
    """One optimizer step of a run, its report still on the device."""

    progress: Progress
    report: StepReport
    rates: Rates


@dataclasses.dataclass
class Run:
    """An open run. `state` is consumed by each step; `advance` puts the new one in its place."""

    cfg: RunConfig
    functions: Functions
    mesh: Mesh | None
    """The devices it trains on; None: the default one."""
    run_dir: Path
    data: PreparedData
    batches: grain.DatasetIterator
    checkpoints: CheckpointFolder
    progress: Progress
    state: TrainState
    average: HostEMA | None
    data_state: Any
    """Where `batches` was after the last finished step; batches read since then are not part of what `save` saves."""

    def next_batches(self, num: int) -> Batch:
        """The next `num` micro-batches, stacked on a leading axis; the iterator's state moves with them."""
        return stack([next(self.batches) for _ in range(num)])

    def advance(self, state: TrainState, progress: Progress) -> None:
        """Records a finished step on the batches read so far."""
        self.state, self.progress, self.data_state = state, progress, self.batches.get_state()

    def save(self) -> None:
        """Starts saving everything a resumed run needs to continue bit for bit."""
        average = None if self.average is None else self.average.average()
        host = {
            "config": to_dict(self.cfg),
            "functions": replaced(self.functions, self.cfg.precision),
            "digests": self.data.digest(),
            "tokens": self.progress.tokens,
            "data": self.data_state,
        }
        self.checkpoints.save(self.progress.step, self.state, average, host)


@contextlib.contextmanager
def open_run(
    cfg: RunConfig,
    run_dir: str | Path,
    *,
    functions: Functions | None = None,
    mesh: Mesh | None = None,
    log: Callable[[str], None] = print,
) -> Iterator[Run]:
    """Everything a run needs, resumed from the newest whole checkpoint in `run_dir` when there is one.

    Of several processes the first one locks, checks, prepares and tells; the others then open what it has left.

    Args:
        cfg: the run.
        run_dir: where everything of it goes; all processes see the same.
        functions: what a layer is made of; default: those that `cfg.precision` names.
        mesh: the devices to train on; default: the default one. A checkpoint of any mesh fits every other.
        log: takes lines of progress.

    Raises:
        UserError: the model has no official format, the folder belongs to another configuration (the difference is
            shown), other data or another process, the processes cannot share its rows, the data cannot be prepared,
            every checkpoint is corrupt, or the folder cannot be written.
    """
    run_dir, functions = user_path(run_dir).absolute(), functions or functions_for(cfg.precision)
    to_hf(cfg.model, "bfloat16")  # refuses here, not after training, what the export at the end cannot say
    part = _own_part(cfg, mesh)
    with contextlib.ExitStack() as opened:
        checkpoints = CheckpointFolder(run_dir / "checkpoints", keep=cfg.train.output.keep_checkpoints, log=log)

        def open_for_all() -> tuple[Checkpoint | None, PreparedData]:
            opened.enter_context(_locked(run_dir))
            found = _checked(cfg, functions, run_dir, checkpoints, log)
            _write_config(run_dir, to_dict(cfg))
            return found, prepare(cfg.data, cfg.model, run_dir, expected=_digests(found, log), log=log)

        found, data = hosts.lead(open_for_all) or (None, None)
        step = hosts.of_first(-1 if found is None else found.step)
        if data is None:
            found, data = _opened_by_first(cfg, run_dir, checkpoints, step)
        batches = make_train_iterator(
            cfg.data,
            data.tokenizer,
            data.train,
            batch_size=cfg.train.batch.micro,
            seq_len=cfg.train.seq_len,
            mtp_depth=cfg.model.mtp_depth,
            seed=cfg.seed,
            part=part,
        )
        opened.callback(batches.close)
        opened.callback(checkpoints.close)
        run = _restored(cfg, functions, mesh, run_dir, data, batches, checkpoints, found, log)
        if run.average is not None:
            opened.callback(run.average.close)
        yield run


def steps(
    run: Run,
    step: Step | PipelineStep,
    *,
    stop: Stop,
    compiling: Callable[[str], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Iterator[StepTaken]:
    """Takes steps on the run's own batches and schedules until it has seen its last token, and advances the run.

    What compiles is announced by `compiling(name)`, which is entered around it. Raises `Stopped` between two steps as
    soon as `stop` is requested.
    """
    cfg, compiled = run.cfg.train, set()
    while run.progress.tokens < cfg.total_tokens:
        batches = stop.run(run.next_batches, num_micro_batches(run.progress.tokens, cfg.batch))
        tokens = run.progress.tokens + len(batches.tokens) * cfg.batch.micro * cfg.seq_len
        rates = rates_at(tokens, cfg)
        name = "the step" if len(batches.tokens) == 1 else "the step of several micro-batches"
        if name not in compiled:
            with compiling(name):
                stop.run(step.compile, run.state, batches, rates)
            compiled.add(name)
        state, report = step(run.state, batches, rates)
        run.advance(state, Progress(run.progress.step + 1, tokens))
        if run.average is not None and run.progress.step % cfg.ema_every == 0:
            run.average.update(run.state.params)
        yield StepTaken(run.progress, report, rates)


def _restored(
    cfg: RunConfig,
    functions: Functions,
    mesh: Mesh | None,
    run_dir: Path,
    data: PreparedData,
    batches: grain.DatasetIterator,
    checkpoints: CheckpointFolder,
    found: Checkpoint | None,
    log: Callable[[str], None],
) -> Run:
    has_average = cfg.train.ema_decay > 0
    shardings = None if mesh is None else state_shardings(cfg, mesh)
    if found is None:
        state, progress = init_state(cfg, shardings), Progress(step=0, tokens=0)
        average = state.params
    else:
        abstract = abstract_state(cfg)
        if shardings is None:
            shapes = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), abstract.params)
        else:
            abstract = jax.tree.map(_on, abstract, shardings)
            shapes = jax.tree.map(lambda leaf: _on(leaf, leaf.sharding, np.float32), abstract.params)
        state, average = load(found, abstract, shapes if has_average else None)
        progress = _continued(batches, found, log)
        log(f"resuming after step {progress.step} ({progress.tokens:,} tokens).")
    num_updates = progress.step // cfg.train.ema_every
    ema = HostEMA(average, decay=cfg.train.ema_decay, num_updates=num_updates) if has_average else None
    return Run(cfg, functions, mesh, run_dir, data, batches, checkpoints, progress, state, ema, batches.get_state())


def _on(leaf: Any, sharding: Any, dtype: Any = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding)


def _own_part(cfg: RunConfig, mesh: Mesh | None) -> Part:
    """The rows of every batch that this process makes: those that its devices hold."""
    if mesh is None:
        return Part()
    num = cfg.train.batch.micro
    rows = own_rows(num, mesh, used_axes(mesh, ROWS))
    size = rows.stop - rows.start
    check(
        num % size == 0 and rows.start % size == 0,
        f"a process holds rows {rows.start} to {rows.stop - 1} of {num}, which are no equal part of a batch; give each "
        "process as many devices as divide parallel.data x expert, or are a multiple of it.",
    )
    check_streams(cfg.data.streams, num // size)
    return Part(rows.start // size, num // size)


def _checked(
    cfg: RunConfig, functions: Functions, run_dir: Path, checkpoints: CheckpointFolder, log: Callable[[str], None]
) -> Checkpoint | None:
    """The newest whole checkpoint, if there is any, which the run fits."""
    checkpoints.clean()
    found = checkpoints.newest()
    if found is not None:
        _check_configuration(cfg, run_dir, found, log)
        _check_functions(replaced(functions, cfg.precision), run_dir, found)
    return found


def _opened_by_first(
    cfg: RunConfig, run_dir: Path, checkpoints: CheckpointFolder, step: int
) -> tuple[Checkpoint | None, PreparedData]:
    """Checkpoint and data as the first process has left them; `step` < 0: there is no checkpoint."""
    path = run_dir / CONFIG_NAME
    if _why_not(path, to_dict(cfg)) is not None:
        raise UserError(f"{path} is not what process 0 has written; give a --run-dir that all processes see.")
    found = checkpoints.at(step) if step >= 0 else None
    return found, prepare(cfg.data, cfg.model, run_dir, log=lambda line: None)


def _continued(batches: grain.DatasetIterator, found: Checkpoint, log: Callable[[str], None]) -> Progress:
    """Puts the data where it was; how far the run was."""
    tokens: Any = found.host.get("tokens")
    state: Any = found.host.get("data")
    try:
        if isinstance(state, dict) and state.keys() != batches.get_state().keys():
            log(
                f"checkpoint {found.path.name} was written by a version that ordered the data otherwise: "
                "the run goes on with the first epoch of this version's order."
            )
        else:
            batches.set_state(state)
    except Exception as error:  # Grain does not say what it raises on a state that is none
        raise CheckpointError(f"{found.path / HOST} does not say where the data was ({error!r}).") from error
    if type(tokens) is not int or tokens < 0:
        raise CheckpointError(f"{found.path / HOST} does not say how many tokens were seen, but {tokens!r}.")
    return Progress(found.step, tokens)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[Difference], list[Difference]]:
    """What keeps a run of configuration `old` from going on with `new` (as `to_dict` gives them); what does not."""
    changes = diff(old, new)
    return [one for one in changes if not _is_harmless(one)], [one for one in changes if _is_harmless(one)]


def _is_harmless(change: Difference) -> bool:
    return any(change.key == key or (key.endswith(".") and change.key.startswith(key)) for key in HARMLESS)


def _check_configuration(cfg: RunConfig, run_dir: Path, found: Checkpoint, log: Callable[[str], None]) -> None:
    """Refuses a configuration that is not the checkpoint's; brings back a config.json that is not."""
    path, source = run_dir / CONFIG_NAME, found.path / HOST
    old = complete(found.host.get("config"), where=str(source))
    reason = _why_not(path, old)
    if reason is not None:
        _write_config(run_dir, old)
        log(f"{path} {reason}: restored from {source}.")
    serious, harmless = differences(old, to_dict(cfg))
    if serious:
        raise UserError(
            f"{run_dir} was trained with another configuration:\n"
            + "\n".join(f"  {change}" for change in serious)
            + "\nUse another --run-dir, or give the values on the left to continue this one."
        )
    for change in harmless:
        log(f"changed since the last checkpoint: {change}")


def _check_functions(now: Mapping[str, str], run_dir: Path, found: Checkpoint) -> None:
    """Refuses to continue with other functions than the run began with."""
    before = found.host.get("functions", {})
    if before != now:
        names = (", ".join(f"{field} by {name}" for field, name in side.items()) or "none" for side in (before, now))
        old, new = names
        raise UserError(
            f"{run_dir} was trained with other functions of its own (replaced then: {old}; now: {new}); give the "
            "--config file whose get_functions(cfg) it began with, or another --run-dir."
        )


def _why_not(path: Path, old: Mapping[str, Any]) -> str | None:
    """What is wrong with a config.json that should not differ from `old`."""
    try:
        stored = complete(json.loads(path.read_bytes()), where=str(path))
    except FileNotFoundError:
        return "was lost"
    except (OSError, ValueError, RecursionError) as error:  # a ConfigError is a ValueError
        return f"is damaged ({error})"
    return "belongs to another run" if differences(stored, old)[0] else None


def _digests(found: Checkpoint | None, log: Callable[[str], None]) -> dict[str, str]:
    """What the data must be; empty for a new run, and for a checkpoint that does not say."""
    if found is None:
        return {}
    digests = found.host.get("digests")
    if not isinstance(digests, dict):
        log(f"checkpoint {found.path.name} was written before checkpoints named their data: nothing compares it.")
        return {}
    return digests


def _write_config(run_dir: Path, tree: Mapping[str, Any]) -> None:
    path = run_dir / CONFIG_NAME
    try:
        replace_file(path, json.dumps(tree, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}; make room or choose another --run-dir.") from error


@contextlib.contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Locks a second process out of the folder; the lock goes with the process, however it ends."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        handle: TextIO = (run_dir / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write to {run_dir}: {error}; choose another --run-dir.") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process is training in {run_dir}; stop it or choose another --run-dir."
            ) from error
        except OSError as error:
            raise UserError(
                f"{run_dir} lies where no file can be locked ({error}); choose another --run-dir."
            ) from error
        yield
