"""The paged latent cache: writes new rows where they belong, reads the rows of sequences in order."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Shaped

from dsv3_kernels import dispatch
from dsv3_kernels.latent_cache import limits, reference, xla
from dsv3_kernels.latent_cache.fp8_rows import LATENT_DIM, ROPE_DIM, ROW_BYTES

PAGE_SIZE = 64
"""Tokens a page."""


def _pallas(*args: Any, **kwargs: Any) -> Array:
    """Imports the kernel when it is called: old versions of jax cannot."""
    from dsv3_kernels.latent_cache import pallas_sm90

    return pallas_sm90.write(*args, **kwargs)


NO_GRADIENT = (
    "{op} cannot be differentiated: the cache serves decoding; train through mla_prefill, as dsv3_jax.model does, and "
    "with the layers of dsv3_jax.precision."
)
WRITE = dispatch.Op(
    "cache_write",
    reference=reference.write,
    xla=xla.write,
    kernel=_pallas,
    refuses=limits.refuses,
    axes="nzw bt. . bt. bt. b. b b -> nzw",
    no_gradient=NO_GRADIENT,
)
READ = dispatch.Op("cache_read", reference=xla.read, xla=xla.read, axes=".z. b. b -> b..", no_gradient=NO_GRADIENT)


def cache_write(
    kv_pages: Shaped[Array | np.ndarray, "N _ W"],
    kv_down: Float[Array | np.ndarray, "B T X"],
    norm_scale: Float[Array | np.ndarray, "C"],
    cos: Float[Array | np.ndarray, "_ _ _"],
    sin: Float[Array | np.ndarray, "_ _ _"],
    page_table: Int[Array | np.ndarray, "_ P"],
    starts: Int[Array | np.ndarray, "_"],
    counts: Int[Array | np.ndarray, "_"],
    *,
    eps: float,
    fp8_scale: str = "float32",
    implementation: str | None = None,
) -> Shaped[Array, "N _ W"]:
    """The cache with T new rows a sequence: RMSNorm of the latent and rope of the key part, then scattered into pages.

    Row t of sequence b goes to position p = starts[b] + t: slot p % 64 of page page_table[b, p // 64]. Nothing is
    written for t >= counts[b], for a page id outside 0..N-1, and, where starts and counts are traced, for a position
    outside the table. Two rows must not share a slot. Donate `kv_pages` to the caller's jit, or carry it in a loop,
    and it is updated in place.

    Args:
        kv_pages: [N, 64, C + R] of any float type, or uint8 [N, 64, 656] (FP8 rows; C = 512, R = 64).
        kv_down: what W^DKV and W^KR give: the latent, C wide, and the key part before rope, R wide.
        norm_scale: of the latent's RMSNorm.
        cos: [B, T, R/2] float32, of the angles that rotate the interleaved pairs (2i, 2i + 1).
        sin: likewise.
        page_table: the pages of each sequence, in order.
        starts: tokens that each sequence has in the cache already.
        counts: new tokens of each sequence, at most T.
        eps: of the norm.
        fp8_scale: "float32" or "ue8m0"; how FP8 rows are scaled.
        implementation: None, "reference", "xla" or "pallas" (Hopper GPU; C = 512, R = 64; BF16 pages, or FP8 rows
            from a bfloat16 kv_down).
    Raises:
        ValueError: shapes or dtypes that do not fit together, or lengths beyond the page table.
        NotImplementedError: `implementation="pallas"` where it cannot run.
    """
    _check_pages(kv_pages, page_table, B=kv_down.shape[0])
    B, T, X = kv_down.shape
    C = norm_scale.shape[0]
    if C >= X:
        raise ValueError(f"kv_down is {X} wide, norm_scale {C}; the latent must leave room for the key part.")
    if kv_pages.dtype == jnp.uint8:
        if (C, X - C) != (LATENT_DIM, ROPE_DIM):
            raise ValueError(f"FP8 rows hold {LATENT_DIM} + {ROPE_DIM} elements, kv_down has {C} + {X - C}.")
    elif kv_pages.shape[2] != X:
        raise ValueError(f"kv_pages has rows of {kv_pages.shape[2]}, kv_down of {X}; they must be as wide.")
    for name, x in (("cos", cos), ("sin", sin)):
        if x.shape != (B, T, (X - C) // 2) or x.dtype != jnp.float32:
            raise ValueError(f"{name} is {x.dtype}{x.shape}; it must be float32{(B, T, (X - C) // 2)}.")
    for name, x in (("starts", starts), ("counts", counts)):
        if x.shape != (B,) or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{name} is {x.dtype}{x.shape}; give one integer a sequence, ({B},).")
    if fp8_scale not in ("float32", "ue8m0"):
        raise ValueError(f"fp8_scale={fp8_scale!r} is unknown; use 'float32' or 'ue8m0'.")
    if not isinstance(starts, Tracer) and not isinstance(counts, Tracer):
        ends = np.asarray(starts) + np.clip(np.asarray(counts), 0, T)
        _check_lengths("starts + counts", np.concatenate([np.asarray(starts), ends]), page_table.shape[1])
    arrays = map(jnp.asarray, (kv_pages, kv_down, norm_scale, cos, sin, page_table, starts, counts))
    return dispatch.run(WRITE, implementation, *arrays, eps=float(eps), fp8_scale=fp8_scale)


def cache_read(
    kv_pages: Shaped[Array | np.ndarray, "N _ W"],
    page_table: Int[Array | np.ndarray, "B P"],
    seq_lens: Int[Array | np.ndarray, "_"],
    *,
    dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, "B S X"]:
    """The rows of each sequence in order, S = 64 P of them, zeros from its length on: for prefill over a cached prefix.

    Args:
        kv_pages: as `cache_write` fills them.
        page_table: the pages of each sequence, in order; ids may be anything past the sequence's end.
        seq_lens: tokens each sequence has in the cache.
        dtype: of the result; default that of the pages, bfloat16 for FP8 rows.
    Raises: ValueError for shapes or dtypes that do not fit together, or lengths beyond the page table.
    """
    B, P = page_table.shape
    _check_pages(kv_pages, page_table, B=B)
    if seq_lens.shape != (B,) or not jnp.issubdtype(seq_lens.dtype, jnp.integer):
        raise ValueError(f"seq_lens is {seq_lens.dtype}{seq_lens.shape}; give one integer a sequence, ({B},).")
    if not isinstance(seq_lens, Tracer):
        _check_lengths("seq_lens", np.asarray(seq_lens), P)
    dtype = jnp.dtype(dtype or (jnp.bfloat16 if kv_pages.dtype == jnp.uint8 else kv_pages.dtype))
    return dispatch.run(READ, "xla", *map(jnp.asarray, (kv_pages, page_table, seq_lens)), dtype=dtype)


def _check_pages(kv_pages: Array | np.ndarray, page_table: Array | np.ndarray, *, B: int) -> None:
    if kv_pages.ndim != 3 or kv_pages.shape[1] != PAGE_SIZE:
        raise ValueError(
            f"kv_pages has shape {kv_pages.shape}; a page holds {PAGE_SIZE} tokens, [N, {PAGE_SIZE}, row]."
        )
    if kv_pages.dtype == jnp.uint8:
        if kv_pages.shape[2] != ROW_BYTES:
            raise ValueError(f"kv_pages is uint8 with rows of {kv_pages.shape[2]}; an FP8 row has {ROW_BYTES} bytes.")
    elif not jnp.issubdtype(kv_pages.dtype, jnp.floating):
        raise ValueError(f"kv_pages is {kv_pages.dtype}; it must be of a float type, or uint8 for FP8 rows.")
    if page_table.ndim != 2 or page_table.shape[0] != B or page_table.shape[1] < 1:
        raise ValueError(f"page_table has shape {page_table.shape}; it must list the pages of {B} sequences, [{B}, P].")
    if not jnp.issubdtype(page_table.dtype, jnp.integer):
        raise ValueError(f"page_table is {page_table.dtype}; page ids are integers.")


def _check_lengths(name: str, lengths: np.ndarray, num_pages: int) -> None:
    """Lengths that are known before the launch; traced ones are cut to the table."""
    if lengths.size and (lengths.min() < 0 or lengths.max() > num_pages * PAGE_SIZE):
        raise ValueError(
            f"{name} lie in {lengths.min()}..{lengths.max()}; a page table of {num_pages} pages of {PAGE_SIZE} holds"
            f" lengths from 0 to {num_pages * PAGE_SIZE}. Give it more pages."
        )
