"""What chooses the tile of an FP8 matmul: a table for this GPU, or a model of an H100."""

from dsv3_kernels.tiles.choice import (
    CONTIGUOUS,
    CONTRACTION,
    DENSE,
    FILES,
    MASKED,
    choose,
    contiguous,
    contraction,
    dense,
    masked,
    table,
    tuned_tiles,
)
from dsv3_kernels.tiles.model import Problem

__all__ = [
    "CONTIGUOUS",
    "CONTRACTION",
    "DENSE",
    "FILES",
    "MASKED",
    "Problem",
    "choose",
    "contiguous",
    "contraction",
    "dense",
    "masked",
    "table",
    "tuned_tiles",
]
