"""The mesh of a run, made of the devices there are."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dsv3_jax.config.check import check, divisors, one_of
from dsv3_jax.config.parallel import ParallelConfig
from dsv3_jax.parallel.axes import AXES, DATA, EXPERT, NODE, PIPE, TENSOR


def mesh_shape(parallel: ParallelConfig, num_devices: int) -> dict[str, int]:
    """Devices along each axis, `data` resolved.

    Raises:
        ConfigError: the axes do not multiply to the devices.
    """
    nodes, data = parallel.expert_nodes, parallel.data
    sizes = {PIPE: parallel.pipe, DATA: data, NODE: nodes, EXPERT: parallel.expert // nodes, TENSOR: parallel.tensor}
    used = math.prod(size for size in sizes.values() if size > 0)
    if data > 0:
        check(used == num_devices, _refusal(parallel, used, num_devices, lambda left: [left]))
        return sizes
    check(num_devices % used == 0, _refusal(parallel, used, num_devices, divisors))
    return {**sizes, DATA: num_devices // used}


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


def _refusal(parallel: ParallelConfig, used: int, num_devices: int, sizes_for: Callable[[int], list[int]]) -> str:
    """Which axes do not multiply to the devices, and what each may be if the others stay.

    `sizes_for(left)`: what an axis may be where the others leave it `left` devices.
    """
    sizes = {name: getattr(parallel, name) for name in ("pipe", "data", "expert", "tensor")}
    given = {name: size for name, size in sizes.items() if size > 1 or (name, size) == ("data", 1)}
    choices = []
    for name, size in given.items():
        left, too_many = divmod(num_devices, used // size)
        each = parallel.expert_nodes if name == "expert" else 1
        fitting = [] if too_many else [one for one in sizes_for(left) if one % each == 0 and one]
        choices += [f"{name} may be {one_of(fitting, near=size)}"] if fitting else []
    told = " x ".join(f"{name} {size}" for name, size in given.items()) + (f" = {used}" if len(given) > 1 else "")
    devices = "one device" if num_devices == 1 else f"{num_devices} devices"
    rule = f"does not divide {devices}" if parallel.data == -1 else f"is not the {devices} there are"
    choices = choices or [f"the product may be {one_of(sizes_for(num_devices), near=used)}"]
    more = " (train.py --simulate-devices lets a CPU stand for more)" if num_devices == 1 else ""
    return f"parallel: {told} {rule}; {' or '.join(choices)}{more}."
