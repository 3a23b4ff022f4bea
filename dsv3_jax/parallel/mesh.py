"""The mesh of a run, made of the devices there are."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dsv3_jax.config.check import check
from dsv3_jax.config.parallel import ParallelConfig
from dsv3_jax.parallel.axes import AXES


def mesh_shape(parallel: ParallelConfig, num_devices: int) -> dict[str, int]:
    """Devices along each axis, `data` resolved.

    Raises:
        ConfigError: the axes do not multiply to the devices.
    """
    nodes = parallel.expert_nodes
    sizes = {"pipe": parallel.pipe, "data": 1, "node": nodes, "expert": parallel.expert // nodes}
    sizes["tensor"] = parallel.tensor
    used, data = math.prod(sizes.values()), parallel.data
    given = {name: getattr(parallel, name) for name in ("pipe", "expert", "tensor") if getattr(parallel, name) > 1}
    told = " x ".join(f"{name} {size}" for name, size in given.items()) or "no axis"
    if data == -1:
        check(num_devices % used == 0, f"parallel: {told} = {used} does not divide {num_devices} devices; {_choices()}")
        data = num_devices // used
    check(
        used * data == num_devices,
        f"parallel: {told} x data {data} = {used * data}, but there are {num_devices} devices; set parallel.data=-1 "
        "for what is left, or start as many devices.",
    )
    sizes["data"] = data
    return {axis: sizes[axis] for axis in AXES}


def make_mesh(parallel: ParallelConfig, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """All of `devices` (default: all that jax sees) as a mesh of the axes in `AXES`, neighbours innermost.

    Raises:
        ConfigError: the axes do not multiply to the devices.
    """
    found = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(parallel, len(found))
    grid = np.array(found, dtype=object).reshape(tuple(shape.values()))
    return jax.sharding.Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def size_of(mesh: Any, axes: Sequence[str]) -> int:
    """Devices along `axes` together; `mesh` is anything whose `shape` maps axes to sizes."""
    shape: Mapping[str, int] = mesh.shape
    return math.prod(shape[axis] for axis in axes)


def _choices() -> str:
    return "use sizes whose product does."
