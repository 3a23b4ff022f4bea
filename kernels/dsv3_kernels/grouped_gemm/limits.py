"""What the Hopper kernels of the grouped matmuls do not take."""

from typing import Any

from dsv3_kernels.quantize import QTensor


def refuses(a: QTensor, b: QTensor, *arrays: Any, **static: Any) -> str | None:
    """The reason, or None: an empty operand."""
    sizes = (*a.values.shape, *b.values.shape)
    return None if min(sizes) else f"has an empty operand, a {a.values.shape} or b {b.values.shape}: skip the call"
