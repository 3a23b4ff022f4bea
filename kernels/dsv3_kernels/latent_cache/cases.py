"""The problems that the latent cache is tested, compiled and timed at."""

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

PAGE_SIZE = 64


class Case(NamedTuple):
    """B sequences that hold `before` tokens and get T more each; `fp8`: rows of 656 bytes, scaled by `fp8_scale`."""

    name: str
    B: int
    T: int
    before: tuple[int, ...]
    C: int = 512
    R: int = 64
    fp8: bool = False
    fp8_scale: str = "float32"


CASES = (
    Case("decode_128", B=128, T=1, before=(4096,)),
    Case("drafts_128", B=128, T=2, before=(4096,)),
    Case("prefill_4x4k", B=4, T=4096, before=(0,)),
    Case("decode_128_fp8", B=128, T=1, before=(4096,), fp8=True),
    Case("drafts_128_fp8", B=128, T=2, before=(4096,), fp8=True),
    Case("prefill_4x4k_fp8", B=4, T=4096, before=(0,), fp8=True),
    Case("decode_128_ue8m0", B=128, T=1, before=(4096,), fp8=True, fp8_scale="ue8m0"),
)
"""What V3 writes a layer."""

UGLY = (
    Case("one", B=1, T=1, before=(0,), C=16, R=8),
    Case("page_ends", B=5, T=3, before=(0, 61, 62, 63, 64), C=12, R=4),
    Case("long", B=2, T=200, before=(1, 127), C=16, R=8),
    Case("fp8", B=3, T=5, before=(0, 62, 190), fp8=True),
    Case("ue8m0", B=1, T=2, before=(63,), fp8=True, fp8_scale="ue8m0"),
    Case("v3_widths", B=5, T=3, before=(0, 61, 62, 63, 64)),
)
"""Small and unaligned: for tests."""


def make(case: Case, dtype: np.typing.DTypeLike = np.float32, seed: int = 0) -> dict[str, Any]:
    """The arguments of `cache_write`: shuffled pages twice as many as needed, each sequence with its own length."""
    rng = np.random.default_rng(seed)
    B, T = case.B, case.T
    starts = np.resize(np.asarray(case.before, np.int32), B)
    num_columns = -(-(int(starts.max()) + T) // PAGE_SIZE)
    num_pages = 2 * B * num_columns
    angles = rng.uniform(0, 6, (B, T, case.R // 2)).astype(np.float32)
    shape = (num_pages, PAGE_SIZE, 656 if case.fp8 else case.C + case.R)
    if case.fp8:
        pages = rng.integers(0, 256, shape, np.uint8)
    else:
        pages = rng.standard_normal(shape, np.float32).astype(dtype)
    return {
        "kv_pages": pages,
        "kv_down": rng.standard_normal((B, T, case.C + case.R), np.float32).astype(dtype),
        "norm_scale": rng.uniform(0.5, 1.5, case.C).astype(np.float32),
        "cos": np.cos(angles),
        "sin": np.sin(angles),
        "page_table": rng.permutation(num_pages)[: B * num_columns].reshape(B, num_columns).astype(np.int32),
        "starts": starts,
        "counts": np.full(B, T, np.int32),
    }


def shapes(case: Case, *, num_pages: int) -> dict[str, tuple[tuple[int, ...], np.typing.DTypeLike]]:
    """Shape and dtype of each argument of `cache_write` as serving has them, in order."""
    B, T, columns = case.B, case.T, -(-(max(case.before) + case.T) // PAGE_SIZE)
    bfloat16 = ml_dtypes.bfloat16
    return {
        "kv_pages": ((num_pages, PAGE_SIZE, 656), np.uint8) if case.fp8 else ((num_pages, PAGE_SIZE, 576), bfloat16),
        "kv_down": ((B, T, case.C + case.R), bfloat16),
        "norm_scale": ((case.C,), np.float32),
        "cos": ((B, T, case.R // 2), np.float32),
        "sin": ((B, T, case.R // 2), np.float32),
        "page_table": ((B, columns), np.int32),
        "starts": ((B,), np.int32),
        "counts": ((B,), np.int32),
    }
