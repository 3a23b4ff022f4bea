"""Over which axes of a mesh values vary inside `jax.shard_map`.

jax joins the axes of the operands of its own operations. It does not where it compares types: the carry of a loop,
the branches of a condition, the gradients of a `jax.custom_vjp`. Outside `jax.shard_map` nothing varies, and these
functions return their arguments.
"""

from typing import Any

import jax


def varying_axes(*trees: Any) -> tuple[str, ...]:
    """The axes over which any array of `trees` varies, in an order that all processes agree on."""
    return tuple(sorted(set().union(*(_axes(leaf) for leaf in jax.tree.leaves(trees)))))


def varying_as(tree: Any, *others: Any) -> Any:
    """`tree` with its arrays typed as varying over all axes of any array of `tree` or `others`.

    The gradient of such an array is summed over the axes it gained.
    """
    return varying_over(tree, varying_axes(tree, others))


def varying_over(tree: Any, axes: tuple[str, ...]) -> Any:
    """`tree` with its arrays typed as varying over `axes`, too."""

    def cast(array: Any) -> Any:
        gained = tuple(axis for axis in axes if axis not in _axes(array))
        return jax.lax.pcast(array, gained, to="varying") if gained else array

    return jax.tree.map(cast, tree)


def varying_alike(*trees: Any) -> tuple[Any, ...]:
    """Each of `trees` as varying over all axes of any of them: arguments that a `jax.custom_vjp` can differentiate.

    Gradients then vary as the arguments do. Where devices share an argument, the transpose of the cast adds up theirs.
    """
    return tuple(varying_as(tree, trees) for tree in trees)


def _axes(array: Any) -> frozenset[str]:
    return jax.typeof(array).manual_axis_type.varying
