"""MLA decoding on Hopper: rows packed, work planned, attention to each part, the parts of split sequences combined."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Shaped

from dsv3_kernels.aot.case import BF16_MMA, AotCase
from dsv3_kernels.decode_attention.cases import COMPILED_CASES, SOFTMAX_SCALE
from dsv3_kernels.decode_attention.pallas_attend import attend
from dsv3_kernels.decode_attention.pallas_combine import combine_parts
from dsv3_kernels.decode_attention.pallas_layout import ROWS
from dsv3_kernels.decode_attention.planner import plan_splits

MULTICAST = r"UTMALDG\.\dD\.MULTICAST"
"""A copy into the shared memory of several thread blocks."""

NUM_SMS = 132
"""Of an H100 or H200 SXM; used where the device does not tell."""


def mla_decode_pallas(
    q_latent: Float[Array, "B S H C"],
    q_rope: Float[Array, "B S H R"],
    kv_pages: Shaped[Array, "N 64 W"],
    page_table: Int32[Array, "B P"],
    seq_lens: Int32[Array, "B"],
    *,
    softmax_scale: float,
    causal: bool = True,
    num_parts: int | None = None,
    multicast: bool = True,
    interpret: Any = None,
) -> tuple[Float[Array, "B S H C"], Float32[Array, "B H S"]]:
    """Twin of `mla_decode_reference` for latent 512, rotary 64, BF16 queries.

    Args:
        num_parts: into how many parts the keys are divided; by default as many as fill the GPU once.
        multicast: whether pairs of thread blocks share copies, where they can: BF16 pages, rows in an even number of
            blocks of 64.
        interpret: None to compile; `plgpu.InterpretGPUParams()` to run on a CPU.
    """
    B, S, H, C = q_latent.shape
    num_rows = _num_rows(S, H)
    num_sms = getattr(jax.devices()[0], "core_count", NUM_SMS)
    plan = plan_splits(seq_lens, num_parts=num_parts or max(1, num_sms // (num_rows // ROWS)))
    partials = attend(
        _pack(q_latent, num_rows),
        _pack(q_rope, num_rows),
        kv_pages,
        page_table,
        seq_lens,
        plan.parts,
        num_queries=S,
        num_heads=H,
        softmax_scale=softmax_scale,
        causal=causal,
        multicast=multicast and _can_multicast(num_rows, is_fp8=kv_pages.dtype == jnp.uint8),
        interpret=interpret,
    )
    out, lse = combine_parts(*partials, plan, interpret=interpret)
    return (
        out[:, : S * H].reshape(B, S, H, C),
        lse[:, : S * H].reshape(B, S, H).transpose(0, 2, 1),
    )


def aot_cases() -> list[AotCase]:
    """BF16 and FP8 caches, one and several queries, all and few heads."""
    return [
        AotCase(
            f"mla_decode{'_fp8' * case.is_fp8} {case.name.removesuffix('-fp8')}",
            functools.partial(mla_decode_pallas, softmax_scale=SOFTMAX_SCALE, causal=case.causal),
            case.shapes(),
            (BF16_MMA, *[MULTICAST] * _can_multicast(_num_rows(case.num_queries, case.num_heads), is_fp8=case.is_fp8)),
        )
        for case in COMPILED_CASES
    ]


def _num_rows(num_queries: int, num_heads: int) -> int:
    """Rows s H + h, filled up to whole thread blocks."""
    return -(-num_queries * num_heads // ROWS) * ROWS


def _can_multicast(num_rows: int, *, is_fp8: bool) -> bool:
    return not is_fp8 and num_rows % (2 * ROWS) == 0


def _pack(q: Float[Array, "B S H D"], num_rows: int) -> Float[Array, "B R D"]:
    """[B, S, H, D] -> [B, num_rows, D], filled up with zeros."""
    B, S, H, D = q.shape
    return jnp.pad(q.reshape(B, S * H, D), ((0, 0), (0, num_rows - S * H), (0, 0)))
