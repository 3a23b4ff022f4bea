"""Ops on meshes whose axes are of type Explicit, as `jax.make_mesh` makes them: how results are sharded.

On such a mesh the sharding of a value is part of its type, and jax refuses a reshape or a gather whose result could be
sharded in several ways. An op tells which axes of its arguments and results are the same, and runs with XLA's own
propagation in between.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec


def partitioned(function: Callable[..., Any], axes: str, arrays: tuple[Any, ...]) -> Callable[..., Any]:
    """The function with results sharded as its arguments are; the function itself where no argument is on such a mesh.

    Args:
        axes: a letter for each axis of each array, such as "mk mk nk nk -> mn" (None counts as an array): a result's
            axis is sharded as the first argument's axis of that letter, where its size allows it. A dot is an axis that
            is sharded in no result, and "..." any number of leading axes.
        arrays: the arguments, and trees of them.
    """
    leaves = jax.tree.leaves(arrays, is_leaf=lambda x: x is None)
    mesh = next((mesh for x in leaves if x is not None and (mesh := _explicit_mesh(x)) is not None), None)
    if mesh is None:
        return function
    sources, _, results = axes.partition("->")
    given: dict[str, Any] = {}
    for x, letters in zip(leaves, sources.split(), strict=False):
        names = () if x is None else jax.typeof(x).sharding.spec
        for letter, name in zip(_expanded(letters, len(names)), names, strict=x is not None):
            if name is not None and letter != ".":
                given.setdefault(letter, name)

    def spec(shape: Any, letters: str) -> PartitionSpec:
        names: list[Any] = []
        for letter, size in zip(_expanded(letters, len(shape.shape)), shape.shape, strict=True):
            wanted = _tuple(given.get(letter))
            is_free = not any(name in _tuple(other) for name in wanted for other in names)
            names.append(given.get(letter) if is_free and size % _devices(mesh, wanted) == 0 else None)
        return PartitionSpec(*names)

    shapes = jax.eval_shape(function, *jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays))
    flat, tree = jax.tree.flatten(shapes)
    specs = [spec(shape, letters) for shape, letters in zip(flat, results.split(), strict=True)]
    return jax.sharding.auto_axes(function, out_sharding=jax.tree.unflatten(tree, specs))


def _expanded(letters: str, rank: int) -> list[str]:
    """The letter of each axis; leading ones are named by their place where "..." stands for them."""
    if not letters.startswith("..."):
        return list(letters)
    rest = list(letters[3:])
    return [f"lead {i}" for i in range(rank - len(rest))] + rest


def _explicit_mesh(x: Any) -> Any | None:
    mesh = jax.typeof(x).sharding.mesh
    return mesh if not mesh.empty and AxisType.Explicit in mesh.axis_types else None


def _tuple(names: Any) -> tuple[str, ...]:
    """What a PartitionSpec holds for an axis: None, a name, or several."""
    return () if names is None else names if isinstance(names, tuple) else (names,)


def _devices(mesh: Any, names: tuple[str, ...]) -> int:
    count = 1
    for name in names:
        count *= mesh.shape[name]
    return count
