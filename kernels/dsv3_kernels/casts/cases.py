"""The shapes the casts are tested, compiled and timed with: those of DeepSeek-V3, and ugly ones."""

from collections.abc import Container
from typing import NamedTuple


class Case(NamedTuple):
    """rows x columns of the input; for `swiglu_cast` the columns are gate and up, 2 F."""

    op: str
    rows: int
    columns: int
    dtype: str = "bfloat16"


# Rows: tokens of a micro-batch, of a decoding batch. Columns: hidden 7168, q latent 1536, the attention's output 16384,
# gate and up of an expert 2 * 2048 and of a dense layer 2 * 18432.
REAL = [
    Case("cast_tokens", 4096, 7168),
    Case("cast_tokens", 128, 7168),
    Case("cast_tokens", 4096, 1536),
    Case("cast_tokens", 4096, 16384),
    Case("cast_tokens", 4096, 7168, "float32"),
    Case("swiglu_cast", 8192, 4096),
    Case("swiglu_cast", 128, 4096),
    Case("swiglu_cast", 4096, 36864),
    Case("requantize_transposed", 4096, 7168),
    Case("requantize_transposed", 8192, 2048),
    Case("cast_blocks", 7168, 2048, "float32"),
    Case("cast_blocks", 2048, 7168),
]

UGLY = [
    Case("cast_tokens", 1, 128),
    Case("cast_tokens", 1, 7168),
    Case("cast_tokens", 1025, 1024),
    Case("cast_tokens", 97, 384),
    Case("cast_tokens", 5, 1025),
    Case("swiglu_cast", 1, 256),
    Case("swiglu_cast", 97, 260),
    Case("swiglu_cast", 97, 2048),
    Case("swiglu_cast", 3, 2),
    Case("requantize_transposed", 1, 128),
    Case("requantize_transposed", 128, 128),
    Case("requantize_transposed", 97, 300),
    Case("requantize_transposed", 1025, 1),
    Case("cast_blocks", 1, 1),
    Case("cast_blocks", 128, 128, "float32"),
    Case("cast_blocks", 97, 1025),
    Case("cast_blocks", 576, 200),
]


def compiled(ops: Container[str]) -> list[tuple[Case, str]]:
    """Real cases of `ops` with their scales, one for each code: other rows and columns change the grid only."""
    real = [case for case in REAL if case.op in ops]
    of_dtype = {(case.op, case.dtype): case for case in reversed(real)}
    of_op = {case.op: case for case in reversed(real)}
    return [
        *((case, "float32") for case in real if case in of_dtype.values()),
        *((case, "ue8m0") for case in real if case in of_op.values()),
    ]
