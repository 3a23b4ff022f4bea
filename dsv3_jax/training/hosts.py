"""What several processes that train one run together do in step: start, wait, agree, leave.

A process that cannot go on leaves at once, without waiting for the others; jax's coordination service, whose heartbeats
it no longer answers, then ends them. Only what all have agreed on ends with all of them present.
"""

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint.multihost import get_barrier_sync_fn

from dsv3_jax.config.check import UserError, check
from dsv3_jax.interrupt import Stop, Stopped, leave

P = ParamSpec("P")
T = TypeVar("T")

HEARTBEAT_S = 60
"""Seconds after which a process that does not answer counts as dead, and ends the others."""

_EXIT_USER_ERROR = 2

_PATIENCE_S = 7 * 24 * 3600
"""How long one process waits for another that lives: as long as the first may take to prepare data."""

_LAUNCHED = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
"""Variables that `srun` and `mpirun` set for a process, first how many there are and which this is."""


class AgreedError(UserError):
    """An error of the user's that every process has been told of."""


def initialize(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> int:
    """Joins the other processes of this run, if there are any, and returns which of them this is.

    Call it before anything else asks for devices.

    SLURM and Open MPI tell who they are; elsewhere the arguments do.

    Args:
        coordinator: HOST:PORT where process 0 listens.
        processes: how many there are.
        process: which of them this is, from 0.

    Raises:
        ConfigError: some of the arguments are missing or wrong.
        UserError: the others are not to be reached.
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    launched = [names for names in _LAUNCHED if all(name in os.environ for name in names)]
    launched = [names for names in launched if int(os.environ[names[0]]) > 1]
    if len(missing) == len(given) and not launched:
        return 0
    if len(missing) < len(given):
        check(not missing, f"{', '.join(missing)} missing; give --coordinator HOST:PORT --processes N --process I.")
        assert coordinator is not None
        assert processes is not None
        assert process is not None
        host, _, port = coordinator.rpartition(":")
        check(bool(host) and port.isdecimal(), f"--coordinator {coordinator} is no HOST:PORT, such as node1:9876.")
        check(
            0 <= process < processes,
            f"--process {process} is none of --processes {processes}; they count from 0 to {processes - 1}.",
        )
    # Else a signal would reach jax's own notifier and not `StopRequest`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=HEARTBEAT_S,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the processes of this run did not find each other ({reason}); start as many as announced, all with one "
            "--coordinator that each can reach."
        ) from error
    return int(os.environ[launched[0][1]]) if process is None else process


def count() -> int:
    """How many processes train together."""
    return jax.process_count()


def is_first() -> bool:
    """Whether this process locks, prepares, logs, shows and finishes for all."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when every process has called it with this name, which no other call has; in any thread."""
    if count() > 1:
        get_barrier_sync_fn()(key=name, timeout_ms=1000 * _PATIENCE_S)


def lead(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """The result of `function` on the first process, for which the others wait; None on these.

    Raises:
        AgreedError: on all, where the first raised a `UserError`.
    """
    if count() == 1:
        return function(*args, **kwargs)
    result, told = None, ""
    if is_first():
        try:
            result = function(*args, **kwargs)
        except UserError as error:
            told = str(error) or type(error).__name__
    barrier(f"{function.__qualname__} is done")
    told = _texts(told)[0]
    if told:
        raise AgreedError(told)
    return result


def of_first(value: int) -> int:
    """What `value` is on the first process."""
    return int(_texts(str(value))[0])


def check_same(what: Mapping[str, Any]) -> None:
    """Refuses processes that differ in `what`, anything that JSON holds.

    Raises:
        AgreedError: on all, with the differences.
    """
    if count() == 1:
        return
    first, *others = (json.loads(text) for text in _texts(json.dumps(dict(what))))
    for number, other in enumerate(others, start=1):
        differing = [key for key in {**first, **other} if first.get(key) != other.get(key)]
        if differing:
            lines = [f"  {key}: {first.get(key)!r}, there {other.get(key)!r}" for key in differing]
            raise AgreedError(
                f"process {number} was started otherwise than process 0:\n" + "\n".join(lines) + "\nStart all of them "
                "with one command, configuration and version."
            )


@contextlib.contextmanager
def leaving_alone() -> Iterator[None]:
    """Ends this process at once on whatever error the others do not know of: they may be waiting for it.

    On the way out nothing may wait for them in turn. One process that trains alone just raises.
    """
    try:
        yield
    except AgreedError:
        raise
    except BaseException as error:
        if count() == 1:
            raise
        if isinstance(error, Stopped):
            leave(error.exit_code)
        if isinstance(error, UserError):
            print(f"error: process {jax.process_index()}: {error}", file=sys.stderr)
            leave(_EXIT_USER_ERROR)
        traceback.print_exc()
        leave(1)


def is_mine(error: UserError) -> bool:
    """Whether it is for this process to print an error."""
    return not isinstance(error, AgreedError) or is_first()


def leave_together() -> None:
    """Waits for all processes to be done, and parts with them."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


class AgreedStop:
    """A `Stop` at which all processes stop together: each must make the same calls in the same order.

    A signal to any one counts. Each call sends off what this process knows and reads what all knew at the call before,
    so that no device waits: the stop comes one call late.
    """

    def __init__(self, own: Any) -> None:
        """`own` is this process's `StopRequest`."""
        self._own = own
        mesh = Mesh(np.array(jax.devices(), dtype=object), ("all",), axis_types=(AxisType.Auto,))
        self._lies = NamedSharding(mesh, PartitionSpec("all"))
        self._highest = jax.jit(lambda flags: flags.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._sent: Any = None

    def check(self) -> None:
        """Raises `Stopped` on all processes if any knew of a signal at the call before."""
        before = 0 if self._sent is None else int(self._sent)
        if before:
            raise Stopped(before)
        flags = np.full(jax.local_device_count(), self._own.number, np.int32)
        self._sent = self._highest(jax.make_array_from_process_local_data(self._lies, flags))

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of `function`, which no signal cuts short: the others would wait for this process in vain."""
        self.check()
        return function(*args, **kwargs)


def agreed(stop: Any) -> Stop:
    """`stop`, a `StopRequest`, or what several processes agree on about theirs."""
    return stop if count() == 1 else AgreedStop(stop)


def _texts(text: str) -> list[str]:
    """The text of each process; called by all, in the main line of each."""
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.array([len(data)], np.int32)))
    padded = np.zeros(max(1, sizes.max()), np.uint8)
    padded[: len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]
