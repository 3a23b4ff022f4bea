"""`mla_decode`: attention of a few new tokens a sequence over the paged latent cache."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Float32, Shaped

from dsv3_kernels import dispatch
from dsv3_kernels.decode_attention import limits
from dsv3_kernels.decode_attention.reference import mla_decode_reference
from dsv3_kernels.decode_attention.xla import mla_decode_xla
from dsv3_kernels.latent_cache.fp8_rows import LATENT_DIM, ROPE_DIM, ROW_BYTES

PAGE_SIZE = 64
"""Tokens a page."""


def _pallas(*args: Any, **kwargs: Any) -> tuple[Array, Array]:
    """Imports the kernel when it is called: old versions of jax cannot."""
    from dsv3_kernels.decode_attention import pallas_sm90

    return pallas_sm90.mla_decode_pallas(*args, **kwargs)


OP = dispatch.Op(
    "mla_decode",
    reference=mla_decode_reference,
    xla=mla_decode_xla,
    kernel=_pallas,
    refuses=limits.refuses,
    axes="bshc bshr .z. b. b -> bshc bhs",
    no_gradient="{op} cannot be differentiated: it serves decoding; train through mla_prefill, as dsv3_jax.model does, "
    "and with the layers of dsv3_jax.precision.",
)


def mla_decode(
    q_latent: Float[Array, "B S H C"],
    q_rope: Float[Array, "_ _ _ R"],
    kv_pages: Shaped[Array, "N _ W"],
    page_table: Shaped[Array, "_ P"],
    seq_lens: Shaped[Array, "_"],
    *,
    softmax_scale: float,
    causal: bool = True,
    implementation: str | None = None,
) -> tuple[Float[Array, "B S H C"], Float32[Array, "B H S"]]:
    """Multi-head latent attention in its absorbed form, for decoding (FlashMLA's counterpart).

    All H heads attend to one row a token, [latent | rotary], and the values are the latent itself. The S queries of a
    sequence are its last S tokens, which the cache already holds: with `causal`, query i sees keys up to
    seq_len - S + i. Unused slots of a page may hold anything, NaN too, and so may page ids past a sequence's end.

    Args:
        q_latent: queries carried into the latent space through W_UK; DeepSeek-V3 has C = 512.
        q_rope: rotary part of the queries; R = 64.
        kv_pages: [N, 64, C + R] in the queries' dtype, or uint8 [N, 64, 656], the FP8 cache (C = 512, R = 64).
        page_table: int32; the pages of each sequence, in order.
        seq_lens: int32; tokens the cache holds, from 0 to 64 P. Traced lengths beyond are cut to 64 P.
        softmax_scale: factor of the scores.
        implementation: None, "reference" (float32), "xla" or "pallas" (Hopper GPU; C = 512, R = 64, BF16).
    Returns:
        out in the queries' dtype, and lse, the natural logarithm of the sum of exponentials. A query that sees no key
        has out = 0 and lse = +inf.
    Raises:
        ValueError: shapes or dtypes that do not fit together, or lengths beyond the page table.
        NotImplementedError: `implementation="pallas"` where it cannot run.
    """
    _check(q_latent, q_rope, kv_pages, page_table, seq_lens)
    q_latent, q_rope, kv_pages, page_table, seq_lens = map(
        jnp.asarray, (q_latent, q_rope, kv_pages, page_table, seq_lens)
    )
    num_keys = page_table.shape[1] * PAGE_SIZE
    return dispatch.run(
        OP,
        implementation,
        q_latent,
        q_rope,
        kv_pages,
        page_table,
        jnp.clip(seq_lens, 0, num_keys),
        softmax_scale=float(softmax_scale),
        causal=bool(causal),
    )


def _check(q_latent: Array, q_rope: Array, kv_pages: Array, page_table: Array, seq_lens: Array) -> None:
    B, S, H, C = q_latent.shape
    R = q_rope.shape[3]
    if q_rope.shape[:3] != (B, S, H):
        raise ValueError(f"q_rope {q_rope.shape} must have the first three axes of q_latent {q_latent.shape}.")
    if q_rope.dtype != q_latent.dtype:
        raise ValueError(f"q_rope is {q_rope.dtype} and q_latent {q_latent.dtype}; cast one to the other's dtype.")
    if kv_pages.shape[1] != PAGE_SIZE:
        raise ValueError(
            f"kv_pages {kv_pages.shape} has pages of {kv_pages.shape[1]} tokens; a page holds {PAGE_SIZE}."
        )
    if kv_pages.dtype == jnp.uint8:
        if kv_pages.shape[2] != ROW_BYTES or (C, R) != (LATENT_DIM, ROPE_DIM):
            raise ValueError(
                f"an FP8 cache has rows of {ROW_BYTES} bytes for heads of {LATENT_DIM} + {ROPE_DIM}; kv_pages is"
                f" {kv_pages.shape}, the queries have {C} + {R}. Pack rows with pack_fp8_cache_rows."
            )
    elif kv_pages.dtype != q_latent.dtype:
        raise ValueError(
            f"kv_pages is {kv_pages.dtype}; it must have the queries' dtype {q_latent.dtype}, or be uint8 (FP8 rows)."
        )
    elif kv_pages.shape[2] != C + R:
        raise ValueError(
            f"kv_pages {kv_pages.shape} must have rows of {C} + {R} = {C + R}, as the queries' heads have."
        )
    for name, array in (("page_table", page_table), ("seq_lens", seq_lens)):
        if array.dtype != jnp.int32:
            raise ValueError(f"{name} is {array.dtype}; it must be int32.")
        if array.shape[0] != B:
            raise ValueError(f"{name} {array.shape} must have one row for each of the {B} sequences of q_latent.")
    if min(B, S, H, page_table.shape[1], kv_pages.shape[0]) < 1:
        raise ValueError(
            f"q_latent {q_latent.shape}, page_table {page_table.shape} and kv_pages {kv_pages.shape} must not be empty."
        )
    if not isinstance(seq_lens, Tracer):
        lengths, num_keys = np.asarray(seq_lens), page_table.shape[1] * PAGE_SIZE
        if lengths.min() < 0 or lengths.max() > num_keys:
            raise ValueError(
                f"seq_lens lie in {lengths.min()}..{lengths.max()}; a page table of {page_table.shape[1]} pages of"
                f" {PAGE_SIZE} holds lengths from 0 to {num_keys}. Give it more pages."
            )
