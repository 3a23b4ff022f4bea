"""Named shapes of `mla_decode`, FlashMLA's own and the ugly ones, and the data it is tested with.

The data is as FlashMLA's: N(0, 1) / 10 clipped to +-1, pages shuffled over the pool, NaN in every slot that no
sequence uses, and the page id 2147480000 past each sequence's end.
"""

import dataclasses
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np

from dsv3_kernels.latent_cache.fp8_rows import ROW_BYTES, pack_fp8_cache_rows

LATENT_DIM, ROPE_DIM, PAGE_SIZE = 512, 64, 64
SOFTMAX_SCALE = 192**-0.5
"""DeepSeek-V3's scale without YaRN: (128 + 64) ** -0.5, the head dim before absorption."""

GARBAGE_PAGE = 2147480000


@dataclasses.dataclass(frozen=True)
class DecodeCase:
    """One shape: B sequences of up to `seq_len` cached tokens, S queries each, H heads."""

    num_seqs: int
    num_queries: int
    num_heads: int
    seq_len: int
    is_varlen: bool = False
    causal: bool = True
    is_fp8: bool = False
    given_lengths: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """A label such as b128-s2-h16-k4096-var-fp8."""
        given = bool(self.given_lengths)
        marks = {"given": given, "var": self.is_varlen, "full": not self.causal, "fp8": self.is_fp8}
        shape = f"b{self.num_seqs}-s{self.num_queries}-h{self.num_heads}-k{self.seq_len}"
        return "-".join([shape, *(mark for mark, is_on in marks.items() if is_on)])

    def lengths(self, seed: int = 0) -> np.ndarray:
        """int32 [B]: `given_lengths` over and over; else all `seq_len`, or N(seq_len, seq_len / 2) not below S."""
        if self.given_lengths:
            return np.resize(self.given_lengths, self.num_seqs).astype(np.int32)
        if not self.is_varlen:
            return np.full(self.num_seqs, self.seq_len, np.int32)
        drawn = np.random.default_rng(seed).normal(self.seq_len, self.seq_len / 2, self.num_seqs)
        return np.maximum(drawn, self.num_queries).astype(np.int32)

    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of the arguments with a cache that just holds the longest sequences."""
        pages_per_seq = -(-self.seq_len // PAGE_SIZE)
        row = (ROW_BYTES, np.uint8) if self.is_fp8 else (LATENT_DIM + ROPE_DIM, ml_dtypes.bfloat16)
        query = (self.num_seqs, self.num_queries, self.num_heads)
        return (
            jax.ShapeDtypeStruct((*query, LATENT_DIM), ml_dtypes.bfloat16),
            jax.ShapeDtypeStruct((*query, ROPE_DIM), ml_dtypes.bfloat16),
            jax.ShapeDtypeStruct((self.num_seqs * pages_per_seq, PAGE_SIZE, row[0]), row[1]),
            jax.ShapeDtypeStruct((self.num_seqs, pages_per_seq), np.int32),
            jax.ShapeDtypeStruct((self.num_seqs,), np.int32),
        )

    def flops(self, lengths: np.ndarray) -> int:
        """FlashMLA's count, 2 B S H Σ len (576 + 512), without regard to the mask."""
        return 2 * self.num_queries * self.num_heads * int(lengths.sum(dtype=np.int64)) * (2 * LATENT_DIM + ROPE_DIM)

    def bytes_moved(self, lengths: np.ndarray) -> int:
        """What must be read and written once: cached rows, queries, outputs."""
        row = ROW_BYTES if self.is_fp8 else 2 * (LATENT_DIM + ROPE_DIM)
        per_query = 2 * (2 * LATENT_DIM + ROPE_DIM) + 4
        return int(lengths.sum(dtype=np.int64)) * row + self.num_seqs * self.num_queries * self.num_heads * per_query


class DecodeInputs(NamedTuple):
    """NumPy arguments of `mla_decode`, in its order."""

    q_latent: np.ndarray
    q_rope: np.ndarray
    kv_pages: np.ndarray
    page_table: np.ndarray
    seq_lens: np.ndarray


def make_inputs(case: DecodeCase, seed: int = 0) -> DecodeInputs:
    """Random inputs of a case."""
    rng = np.random.default_rng(seed)
    seq_lens = case.lengths(seed)
    pages_used = -(-seq_lens // PAGE_SIZE)
    num_pages, table_width = max(int(pages_used.sum()), 1) + 1, max(int(pages_used.max()), 1) + 1
    ids = rng.permutation(num_pages).astype(np.int32)
    page_table = np.full((case.num_seqs, table_width), GARBAGE_PAGE, np.int32)
    is_used = np.zeros((num_pages, PAGE_SIZE), bool)
    start = 0
    for b, (length, count) in enumerate(zip(seq_lens.tolist(), pages_used.tolist())):
        own = ids[start : start + count]
        page_table[b, :count] = own
        is_used[own] = (np.arange(count * PAGE_SIZE) < length).reshape(count, PAGE_SIZE)
        start += count
    kv = _noise(rng, (num_pages, PAGE_SIZE, LATENT_DIM + ROPE_DIM))
    if case.is_fp8:
        rows = pack_fp8_cache_rows(kv[..., :LATENT_DIM], kv[..., LATENT_DIM:])
        kv_pages = np.where(is_used[..., None], rows, np.uint8(0xFF))  # NaN in E4M3, float32 and BF16 alike
    else:
        kv_pages = np.where(is_used[..., None], kv, ml_dtypes.bfloat16("nan"))
    q = _noise(rng, (case.num_seqs, case.num_queries, case.num_heads, LATENT_DIM + ROPE_DIM))
    return DecodeInputs(q[..., :LATENT_DIM], q[..., LATENT_DIM:], kv_pages, page_table, seq_lens)


def _noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    drawn = rng.standard_normal(shape, np.float32) / 10
    return np.clip(drawn, -1, 1).astype(ml_dtypes.bfloat16)


HEADS = (1, 3, 9, 63, 64, 65, 126, 128)
LENGTHS = (0, 1, 20, 63, 64, 65, 140)


def _of_all_lengths(num_queries: int, num_heads: int, **options: bool) -> DecodeCase:
    return DecodeCase(len(LENGTHS), num_queries, num_heads, max(LENGTHS), given_lengths=LENGTHS, **options)


SMALL_CASES = (
    _of_all_lengths(1, 1),
    _of_all_lengths(2, 65),
    _of_all_lengths(4, 3),
    _of_all_lengths(4, 9, causal=False),
    _of_all_lengths(2, 3, is_fp8=True),
    DecodeCase(3, 1, 9, 1500, is_varlen=True),
)
"""A second each on a CPU."""

LARGE_CASES = (
    *(_of_all_lengths(s, h) for s in (1, 2, 4) for h in HEADS),
    *(_of_all_lengths(s, 64, is_fp8=True) for s in (1, 4)),
    *(DecodeCase(1, s, h, 4096) for s, h in ((1, 128), (2, 9), (4, 64))),
    DecodeCase(2, 4, 126, 4096, is_varlen=True),
    DecodeCase(6, 2, 63, 4096, is_varlen=True),
    DecodeCase(2, 2, 128, 4096, is_varlen=True, is_fp8=True),
    DecodeCase(2, 2, 65, 4096, is_varlen=True, causal=False),
    DecodeCase(128, 2, 16, 140, is_varlen=True, given_lengths=(0, 140, 0, 3)),
    DecodeCase(64, 1, 16, 140, is_varlen=True),
)
"""FlashMLA's batches, heads and lengths: a minute on a CPU."""

COMPILED_CASES = (
    *(DecodeCase(128, s, h, 4096, is_fp8=f) for f in (False, True) for s in (1, 2) for h in (128, 64, 16)),
    DecodeCase(128, 4, 128, 4096, causal=False),
)
"""What is compiled without a GPU."""

CHECKED_CASES = (
    *(_of_all_lengths(1, h) for h in HEADS[1:]),
    *(_of_all_lengths(4, h, is_fp8=True) for h in (9, 128)),
    _of_all_lengths(2, 128, causal=False),
    DecodeCase(128, 2, 16, 140, is_varlen=True, given_lengths=(0, 140, 0, 3)),
    DecodeCase(1, 1, 128, 20000),
    *(DecodeCase(6, s, 128, 4096, is_varlen=True, is_fp8=f) for s in (1, 2) for f in (False, True)),
)
"""What is compared on a GPU besides: many splits of one sequence, many sequences in one part."""

SPEED_CASES = (
    *(
        DecodeCase(128, s, 128, k, is_varlen=v)
        for s in (1, 2)
        for k in (4096, 8192, 16384, 32768)
        for v in (False, True)
    ),
    *(DecodeCase(128, s, 16, k) for s in (1, 2) for k in (4096, 32768)),
    *(DecodeCase(128, s, 128, k, is_fp8=True) for s in (1, 2) for k in (4096, 32768)),
)
"""Batch 128: FlashMLA's benchmark of all 128 heads; an eighth of them, which memory bounds; the FP8 cache."""
