"""Functions without a derivative: jax would give one of an FP8 rounding, and lose it in the next."""

import functools
from typing import Any

import jax

NO_GRADIENT = (
    "{op} cannot be differentiated: FP8 rounding has no useful derivative; use the layers of dsv3_jax.precision, "
    "which have gradients of their own."
)


def without_gradient(op: str, tree: Any) -> Any:
    """The same arrays, of which a derivative is refused in the name of `op`; NumPy arrays are left alone."""
    return jax.tree.map(lambda x: _undifferentiated(op, x) if isinstance(x, jax.Array) else x, tree)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _undifferentiated(op: str, x: jax.Array) -> jax.Array:
    return x


@_undifferentiated.defjvp
def _refuse(op: str, primals: Any, tangents: Any) -> Any:
    raise TypeError(NO_GRADIENT.format(op=op))
