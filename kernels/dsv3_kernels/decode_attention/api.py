"""`mla_decode`: attention of a few new tokens a sequence over the paged latent cache, planned by `plan_decode`."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Float32, Shaped

from dsv3_kernels import dispatch, target
from dsv3_kernels.decode_attention import limits
from dsv3_kernels.decode_attention.loops import mla_decode_loops
from dsv3_kernels.decode_attention.planner import Plan, num_parts, plan_splits
from dsv3_kernels.decode_attention.reference import mla_decode_reference
from dsv3_kernels.decode_attention.xla import mla_decode_xla
from dsv3_kernels.latent_cache.fp8_rows import LATENT_DIM, ROPE_DIM, ROW_BYTES

PAGE_SIZE = 64
"""Tokens a page."""


def _pallas(*args: Any, **kwargs: Any) -> tuple[Array, Array]:
    """Imports the kernel when it is called: old versions of jax cannot."""
    from dsv3_kernels.decode_attention import pallas_sm90

    return pallas_sm90.mla_decode_pallas(*args, **kwargs)


def _plan_pallas(*args: Any, **kwargs: Any) -> Plan:
    """As `_pallas`."""
    from dsv3_kernels.decode_attention import pallas_plan

    return pallas_plan.plan_parts(*args, **kwargs)


def _of_lengths(implementation: Callable[..., tuple[Array, Array]]) -> Callable[..., tuple[Array, Array]]:
    """An implementation that needs no plan, with the lengths of one if given, cut to what the page table holds."""

    def run(q_latent, q_rope, kv_pages, page_table, seq_lens, plan=None, **static):
        lengths = seq_lens if plan is None else plan.seq_lens
        lengths = jnp.clip(lengths, 0, page_table.shape[1] * PAGE_SIZE)
        return implementation(q_latent, q_rope, kv_pages, page_table, lengths, **static)

    return run


NO_GRADIENT = (
    "{op} cannot be differentiated: it serves decoding; train through mla_prefill, as dsv3_jax.model does, "
    "and with the layers of dsv3_jax.precision."
)

OP = dispatch.Op(
    "mla_decode",
    reference=_of_lengths(mla_decode_reference),
    xla=_of_lengths(mla_decode_loops),
    kernel=_pallas,
    xla_gpu=_of_lengths(mla_decode_xla),
    refuses=limits.refuses,
    axes="bshc bshr .z. b. b b .. -> bshc bhs",
    no_gradient=NO_GRADIENT,
)

PLAN = dispatch.Op(
    "plan_decode",
    reference=plan_splits,
    xla=plan_splits,
    kernel=_plan_pallas,
    axes="b -> b ..",
    no_gradient=NO_GRADIENT,
)


def mla_decode(
    q_latent: Float[Array | np.ndarray, "B S H C"],
    q_rope: Float[Array | np.ndarray, "_ _ _ R"],
    kv_pages: Shaped[Array | np.ndarray, "N _ W"],
    page_table: Shaped[Array | np.ndarray, "_ P"],
    seq_lens: Shaped[Array | np.ndarray, "_"],
    *,
    softmax_scale: float,
    causal: bool = True,
    plan: Plan | None = None,
    num_sms: int | None = None,
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
        plan: of `plan_decode` for these lengths, made once for all layers of a step. Its lengths are what counts then:
            traced ones are not compared. Without a plan every call makes its own.
        num_sms: multiprocessors that the kernel may use, to leave others to communication; None for all. With a plan
            its parts decide, and `num_sms` must be what the plan was made with, or None.
        implementation: None, "reference" (float32), "xla" or "pallas" (Hopper GPU; C = 512, R = 64, BF16).
    Returns:
        out in the queries' dtype, and lse, the natural logarithm of the sum of exponentials. A query that sees no key
        has out = 0 and lse = +inf.
    Raises:
        ValueError: shapes or dtypes that do not fit together, lengths beyond the page table, or a plan that is not one
            of these lengths and queries.
        NotImplementedError: `implementation="pallas"` where it cannot run.
    """
    _check(q_latent, q_rope, kv_pages, page_table, seq_lens)
    if plan is not None:
        _check_plan(plan, q_latent, seq_lens, num_sms)
    arrays = map(jnp.asarray, (q_latent, q_rope, kv_pages, page_table, seq_lens))
    return dispatch.run(
        OP,
        implementation,
        *arrays,
        plan,
        num_sms=num_sms,
        softmax_scale=float(softmax_scale),
        causal=bool(causal),
    )


def plan_decode(
    seq_lens: Shaped[Array | np.ndarray, "B"],
    *,
    num_queries: int,
    num_heads: int,
    num_sms: int | None = None,
    implementation: str | None = None,
) -> Plan:
    """Divides the keys of a batch among the multiprocessors of a GPU (FlashMLA's `get_mla_metadata`).

    A decoding step makes it once and gives it to `mla_decode` of every layer, which then computes nothing from the
    lengths. It costs one launch. Its sizes do not depend on the lengths, so it passes through `jax.jit`, `jax.lax.scan`
    and donation. It belongs to one device: for `jax.shard_map` make it inside, of that device's sequences and heads.

    Args:
        seq_lens: int32; tokens of each sequence, as `mla_decode` gets them. Below 0 counts as 0.
        num_queries: S of the queries, new tokens a sequence.
        num_heads: H of the queries.
        num_sms: multiprocessors that the kernel may use; None for all of the target.
        implementation: None, "reference" or "xla" (plain jnp), or "pallas" (Hopper GPU); all give the same integers.
    Raises:
        ValueError: lengths that are no int32 vector, or a number that is not a positive integer.
        NotImplementedError: `implementation="pallas"` where it cannot run.
    """
    if seq_lens.ndim != 1 or seq_lens.dtype != jnp.int32 or not seq_lens.shape[0]:
        raise ValueError(
            f"seq_lens is {seq_lens.dtype}{list(seq_lens.shape)}; it must be int32 [B], a length for each sequence."
        )
    count = num_parts(target.num_sms(num_sms), num_queries=num_queries, num_heads=num_heads)
    return dispatch.run(PLAN, implementation, jnp.asarray(seq_lens), num_parts=count)


def _check(
    q_latent: Array | np.ndarray,
    q_rope: Array | np.ndarray,
    kv_pages: Array | np.ndarray,
    page_table: Array | np.ndarray,
    seq_lens: Array | np.ndarray,
) -> None:
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


def _check_plan(plan: Plan, q_latent: Array | np.ndarray, seq_lens: Array | np.ndarray, num_sms: int | None) -> None:
    B, S, H, _ = q_latent.shape
    make = f"make it with plan_decode(seq_lens, num_queries={S}, num_heads={H})"
    if not isinstance(plan, Plan):
        raise ValueError(f"plan is a {type(plan).__name__}; {make}.")
    if plan.seq_lens.shape != (B,):
        raise ValueError(f"plan is of {plan.seq_lens.shape[0]} sequences, and q_latent has {B}; {make}.")
    count, sms = plan.parts.shape[0], target.num_sms(num_sms)
    fitting = num_parts(sms, num_queries=S, num_heads=H)
    if count > fitting or (num_sms is not None and count != fitting):
        raise ValueError(
            f"plan has {count} parts, but {S} x {H} query rows a sequence have {fitting} on num_sms={sms}; {make}"
            + (f" and num_sms={sms}." if num_sms is not None else ".")
        )
    if isinstance(plan.seq_lens, Tracer) or isinstance(seq_lens, Tracer):
        return
    if not np.array_equal(plan.seq_lens, seq_lens):
        raise ValueError(f"plan was made for other lengths than seq_lens; {make} in every step.")
