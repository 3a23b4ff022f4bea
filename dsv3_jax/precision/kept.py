"""What an FP8 layer keeps of its activations for the backward pass: bytes, and nothing wider beside them.

E4M3 is kept as uint8 because XLA on CPU holds E4M3 arrays as float16 between its kernels, which would double them.
"""

from typing import TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

from dsv3_kernels.quantize import E4M3, QTensor

Tensor = TypeVar("Tensor")


def keep(tensor: Tensor) -> Tensor:
    """Marks every array of a pytree as kept under `remat="paper"`."""
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, "kept"), tensor)


def to_bytes(q: QTensor) -> QTensor:
    """The same tensor with its values as uint8."""
    return QTensor(jax.lax.bitcast_convert_type(q.values, "uint8"), q.scales)


def from_bytes(q: QTensor) -> QTensor:
    """The inverse of `to_bytes`."""
    return QTensor(jax.lax.bitcast_convert_type(q.values, E4M3), q.scales)
