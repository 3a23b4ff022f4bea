"""How rows travel between the peers along one axis of a mesh: out in a wire's bytes, home as they are.

Gradients take the same ways back: home in the wire's bytes, out as they are. Inside `jax.shard_map` only.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax

from dsv3_jax.precision.gradient_tiles import gradient_rows
from dsv3_jax.precision.residuals import named
from dsv3_jax.precision.wire import TILE, from_payload, pack, to_payload
from dsv3_jax.typing import Array, DType, Float

RECEIVED = "experts_received"
"""The name of all that a device received, for a remat policy: what is saved is not sent again."""


class Wire(NamedTuple):
    """What is sent of rows [M, D], of their gradients, and how both are read: a tree of arrays with M rows each."""

    encode: Callable[[Array], Any]
    encode_gradient: Callable[[Array], Any]
    decode: Callable[[Any, DType], Array]


def _as_they_are(rows: Float[Array, "M D"]) -> Float[Array, "M D"]:
    return rows


def _gradient_payload(d_rows: Float[Array, "M D"]) -> Any:
    return pack(gradient_rows(d_rows, tile=TILE, scale="ue8m0"))


PLAIN = Wire(_as_they_are, _as_they_are, lambda rows, dtype: rows)
FP8 = Wire(to_payload, _gradient_payload, lambda payload, dtype: from_payload(payload, dtype=dtype))
"""E4M3 with a byte of exponent for 128 features, D + ⌈D/128⌉ bytes a row; home in the dtype of rows."""


def to_peers(tree: Any, axis: str) -> Any:
    """AllToAll_axis: of the P·C rows of each array, slab p goes to peer p; peer p's slab takes its place."""
    return jax.tree.map(lambda rows: lax.all_to_all(rows, axis, 0, 0, tiled=True), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def send_out(rows: Float[Array, "M D"], axis: str, wire: Wire) -> Float[Array, "M D"]:
    """Rows of all peers, in the dtype of rows; exact where the wire has bits enough for that."""
    return _send_out_forward(rows, axis, wire)[0]


def _send_out_forward(rows, axis, wire):
    received = named(to_peers(wire.encode(rows), axis), RECEIVED)
    return wire.decode(received, rows.dtype), None


def _send_out_backward(axis, wire, _, d_rows):
    return (to_peers(d_rows, axis),)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def bring_home(rows: Float[Array, "M D"], axis: str, wire: Wire) -> Float[Array, "M D"]:
    """What peers made of the rows that were sent to them, in the same places."""
    return to_peers(rows, axis)


def _bring_home_forward(rows, axis, wire):
    return to_peers(rows, axis), None


def _bring_home_backward(axis, wire, _, d_rows):
    return (wire.decode(to_peers(wire.encode_gradient(d_rows), axis), d_rows.dtype),)


send_out.defvjp(_send_out_forward, _send_out_backward)
bring_home.defvjp(_bring_home_forward, _bring_home_backward)
