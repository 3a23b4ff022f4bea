"""The rules of cuTensorMapEncodeTiled, which a GPU's driver checks only when the kernel is launched.

From the CUDA driver API, "Tensor Map Object Management", for tiles that are not interleaved.
"""

from typing import NamedTuple

MAX_RANK = 5
MAX_BOX = 256
ALIGNMENT = 16
"""Bytes of which bases, strides and rows of a box must be multiples."""
NO_SWIZZLE = 16
"""What Mosaic gives for no swizzle."""


class Descriptor(NamedTuple):
    """A tiled view of global memory, dimensions from the slowest to the fastest, all but bytes in elements."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    """What one copy moves."""
    dtype: str
    item_bytes: int
    swizzle: int
    """Bytes; `NO_SWIZZLE` is none."""
    offset: int
    """From the start of the array, which XLA aligns."""


def broken_rules(descriptor: Descriptor) -> list[str]:
    """Which rules a descriptor breaks, with what to change; empty for one that the driver takes."""
    sizes, strides, box, dtype, item_bytes, swizzle, offset = descriptor
    view = f"a TMA descriptor of {_listed(sizes)} {dtype} in boxes of {_listed(box)}"
    row_bytes = box[-1] * item_bytes
    stride_bytes = [stride * item_bytes for stride in strides[:-1]]
    rules = []
    if not 1 <= len(sizes) <= MAX_RANK:
        rules.append(f"has {len(sizes)} dimensions, over {MAX_RANK}; merge some or index them away")
    if any(not 1 <= size <= MAX_BOX for size in box):
        rules.append(f"has a side of the box outside 1 to {MAX_BOX}; copy in several boxes")
    if any(not 1 <= size <= 2**32 for size in sizes):
        rules.append("has a dimension outside 1 to 2^32; split it")
    if strides[-1] != 1:
        rules.append(f"has elements {strides[-1]} apart in its last dimension; put the contiguous one last")
    if bad := [stride for stride in stride_bytes if stride % ALIGNMENT]:
        rules.append(f"has strides of {bad} bytes, no multiples of {ALIGNMENT}; pad the rows")
    if bad := [stride for stride in stride_bytes if stride >= 2**40]:
        rules.append(f"has strides of {bad} bytes, 2^40 or more; split the array")
    if row_bytes % ALIGNMENT:
        rules.append(f"has rows of {row_bytes} bytes in its box, no multiple of {ALIGNMENT}; widen them")
    if swizzle != NO_SWIZZLE and row_bytes > swizzle:
        rules.append(f"has rows of {row_bytes} bytes in its box, over its swizzle of {swizzle}; tile them")
    if offset * item_bytes % ALIGNMENT:
        rules.append(f"starts {offset * item_bytes} bytes into its array, no multiple of {ALIGNMENT}; align it")
    return [f"{view} {rule}" for rule in rules]


def _listed(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))
