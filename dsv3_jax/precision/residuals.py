"""What an FP8 layer saves of its activations for the backward pass: bytes, and nothing wider beside them.

E4M3 is saved as uint8 because XLA on CPU holds E4M3 arrays as float16 between its kernels, which would double them.
"""

from typing import TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

from dsv3_kernels.quantize import E4M3, QTensor

Tensor = TypeVar("Tensor")


def named(tensor: Tensor, name: str) -> Tensor:
    """Names every array of a pytree, for a remat policy that saves what is so called."""
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, name), tensor)


def to_bytes(q: QTensor) -> QTensor:
    """The same tensor with its values as uint8."""
    return QTensor(jax.lax.bitcast_convert_type(q.values, "uint8"), q.scales)


def from_bytes(q: QTensor) -> QTensor:
    """The inverse of `to_bytes`."""
    return QTensor(jax.lax.bitcast_convert_type(q.values, E4M3), q.scales)
