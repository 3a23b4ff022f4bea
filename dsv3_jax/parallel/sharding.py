"""How the arrays of a state lie on a mesh: one table from logical axes to mesh axes, and what is split beyond it."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jax.sharding import PartitionSpec

from dsv3_jax.parallel.axes import COPIES, EXPERTS, TENSOR

RULES: Mapping[str, tuple[str, ...]] = {"expert": EXPERTS, "heads": (TENSOR,), "ffn": (TENSOR,)}
"""Which mesh axes split a logical axis of a parameter wherever it is used. All other axes are whole in use."""


class Stored(NamedTuple):
    """How one leaf of the state lies between steps.

    `spec` is the state's; `used` what of it stays split in use. `gathers` undoes the difference: dimensions, each with
    the mesh axes it is gathered over, the outermost first.
    """

    spec: PartitionSpec
    used: PartitionSpec
    gathers: tuple[tuple[int, tuple[str, ...]], ...]


def store(spec: Any, mesh: Any) -> Stored:
    """Splits a parameter over all devices of `COPIES` that its dimensions allow.

    A dimension with a rule lies as it is used. The axes that would then have copies are put on one dimension if that
    divides it, else on as few as possible: 7168 is no multiple of 2048. An axis that fits nowhere has copies. Layers
    are never split, so that a slice of them is a layer on every device.

    Args:
        spec: with `shape` and `axes`, such as `ParamSpec`.
        mesh: anything whose `shape` maps axes to sizes.
    """
    used = [_used(axis, length, mesh) for axis, length in zip(spec.axes, spec.shape, strict=True)]
    taken = {axis for axes in used for axis in axes}
    free = [axis for axis in COPIES if axis not in taken and mesh.shape[axis] > 1]
    open_dims = [dim for dim, axis in enumerate(spec.axes) if axis != "layers" and not used[dim]]
    split: dict[int, tuple[str, ...]] = {}
    for axes in _groupings(free):
        dims = [dim for dim in open_dims if dim not in split]
        fits = [dim for dim in dims if spec.shape[dim] % math.prod(mesh.shape[axis] for axis in axes) == 0]
        if fits and all(axis not in found for found in split.values() for axis in axes):
            split[max(fits, key=lambda dim: spec.shape[dim])] = axes
    return Stored(
        PartitionSpec(*[split.get(dim) or used[dim] or None for dim in range(len(spec.shape))]),
        PartitionSpec(*[axes or None for axes in used]),
        tuple(sorted(split.items())),
    )


def _used(axis: str | None, length: int, mesh: Any) -> tuple[str, ...]:
    """Mesh axes that split this dimension in use."""
    return tuple(name for name in RULES.get(axis or "", ()) if mesh.shape[name] > 1)


def _groupings(axes: list[str]) -> Iterator[tuple[str, ...]]:
    """Groups of neighbouring axes, the largest first: all of them, then all but one, down to each alone."""
    for length in range(len(axes), 0, -1):
        for first in range(len(axes) - length + 1):
            yield tuple(axes[first : first + length])
