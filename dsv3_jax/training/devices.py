"""The devices that a run trains on, and what can be seen of their programs."""

import contextlib
import os
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from dsv3_jax.config.check import check
from dsv3_jax.config.mesh_rules import check_rows
from dsv3_jax.config.run import RunConfig
from dsv3_jax.parallel.mesh import make_mesh

WARM_UP = 5
"""Steps before a trace, which are slower than those that follow."""


def simulate(num_devices: int) -> None:
    """Lets the CPU stand for so many devices; without effect once jax has found its devices."""
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", num_devices)


def mesh_of(cfg: RunConfig, *, simulated: int | None = None) -> Mesh | None:
    """All devices, or the first `simulated`, as `cfg.parallel` lays them; None: the one there is.

    A single process has one CPU unless several are simulated.

    Raises:
        ConfigError: the run does not fit the devices.
    """
    devices, is_cpu = jax.devices(), jax.default_backend() == "cpu"
    check(
        jax.process_count() == 1 or not is_cpu or jax.local_device_count() == 1,
        f"{jax.local_device_count()} CPU devices in each of {jax.process_count()} processes would wait for each other; "
        "set JAX_NUM_CPU_DEVICES=1 and start more processes, or simulate devices in one.",
    )
    if jax.process_count() == 1 and (simulated or is_cpu):
        num = simulated or 1
        check(
            len(devices) >= num,
            f"--simulate-devices {num}, but this process began with {len(devices)} devices; start another.",
        )
        devices = devices[:num]
    mesh = make_mesh(cfg.parallel, devices)
    check_rows(cfg.train.batch, data=mesh.shape["data"], expert=cfg.parallel.expert)
    return mesh if mesh.size > 1 else None


def num_shares(mesh: Mesh | None) -> int:
    """How many times the matmul rate of one device a mesh has; CPU devices of one process share its cores."""
    if mesh is None or jax.default_backend() == "cpu":
        return jax.process_count()
    return mesh.size


def dump_programs(folder: Path) -> None:
    """Has XLA write every program it compiles from now on to `folder`, before and after its optimisations."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder} --xla_dump_hlo_as_text"
    jax.config.update("jax_enable_compilation_cache", False)  # what is found there is not compiled


class Trace:
    """A trace of `num_steps` steps for Perfetto or TensorBoard, after `WARM_UP` others."""

    def __init__(self, folder: Path, *, num_steps: int) -> None:
        self._folder, self._num_steps, self._taken, self._is_running = folder, num_steps, 0, False

    def step(self, result: Any) -> bool:
        """Notes that a step was started; whether it was the last in the trace, which waits for its `result`."""
        self._taken += 1
        if self._num_steps and self._taken == WARM_UP:
            jax.profiler.start_trace(str(self._folder))
            self._is_running = True
        elif self._is_running and self._taken == WARM_UP + self._num_steps:
            jax.block_until_ready(result)
            self.close()
            return True
        return False

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self._is_running:
            self._is_running = False
            jax.profiler.stop_trace()
