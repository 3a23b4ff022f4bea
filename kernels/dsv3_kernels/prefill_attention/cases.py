"""The shapes that prefill attention is tested, compiled and timed at."""

from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    """One problem: T queries over S keys; `num_documents` 0 means without segment ids, else packed in a row."""

    name: str
    B: int
    T: int
    S: int
    H: int
    num_documents: int = 0
    qk_dim: int = 192
    v_dim: int = 128


CASES = (
    Case("train_4k", B=1, T=4096, S=4096, H=128),
    Case("train_4k_packed", B=1, T=4096, S=4096, H=128, num_documents=8),
    Case("prefill_16k", B=1, T=16384, S=16384, H=128),
    Case("chunk_2k_over_32k", B=1, T=2048, S=32768, H=128),
)
"""What V3 runs: 4K training rows, a long prompt, a chunk over a cached prefix."""

UGLY = (
    Case("one", B=1, T=1, S=1, H=1),
    Case("short", B=2, T=97, S=97, H=3, num_documents=4, qk_dim=12, v_dim=8),
    Case("chunked", B=2, T=97, S=300, H=2, num_documents=3, qk_dim=24, v_dim=16),
    Case("odd", B=1, T=1025, S=1025, H=2, num_documents=5, qk_dim=24, v_dim=16),
    Case("many_spans", B=1, T=2500, S=2600, H=1, num_documents=7, qk_dim=8, v_dim=8),
)
"""Small and unaligned: for tests."""


def make(case: Case, dtype: np.typing.DTypeLike = np.float32, seed: int = 0) -> dict[str, np.ndarray | None]:
    """q, k, v, cotangents, and sorted segment ids whose queries are the last T of the S keys."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(dtype)

    B, T, S, H = case.B, case.T, case.S, case.H
    kv_segment_ids = None
    if case.num_documents:
        kv_segment_ids = np.sort(rng.integers(1, case.num_documents + 1, (B, S)), axis=1).astype(np.int32)
    return {
        "q": normal(B, T, H, case.qk_dim),
        "k": normal(B, S, H, case.qk_dim),
        "v": normal(B, S, H, case.v_dim),
        "d_out": normal(B, T, H, case.v_dim),
        "d_lse": normal(B, H, T),
        "q_segment_ids": None if kv_segment_ids is None else kv_segment_ids[:, S - T :],
        "kv_segment_ids": kv_segment_ids,
    }


def num_operations(case: Case, *, backward: bool = False) -> int:
    """Multiplications and additions of the causal matmuls: q kᵀ and P v; backward 5 matmuls of the same kind.

    Counts whole rows of keys up to the query's own, documents ignored.
    """
    pairs = case.B * case.H * (case.T * (case.S - case.T) + case.T * (case.T + 1) // 2)
    widths = 3 * case.qk_dim + 2 * case.v_dim if backward else case.qk_dim + case.v_dim
    return 2 * pairs * widths
