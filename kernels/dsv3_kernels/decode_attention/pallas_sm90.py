"""MLA decoding on Hopper: rows packed, work planned, attention to each part, the parts of split sequences combined."""

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Shaped

from dsv3_kernels import launch
from dsv3_kernels.aot.case import BF16_MMA, AotCase
from dsv3_kernels.decode_attention.cases import COMPILED_CASES, SOFTMAX_SCALE
from dsv3_kernels.decode_attention.pallas_attend import attend
from dsv3_kernels.decode_attention.pallas_combine import combine_parts
from dsv3_kernels.decode_attention.pallas_layout import ROWS
from dsv3_kernels.decode_attention.pallas_plan import plan_parts
from dsv3_kernels.decode_attention.planner import Plan, num_parts

MULTICAST = r"UTMALDG\.\dD\.MULTICAST"
"""A copy into the shared memory of several thread blocks."""

TILE_ROWS = 8
"""The copy engine takes queries in tiles of so many rows."""


def mla_decode_pallas(
    q_latent: Float[Array, "B S H C"],
    q_rope: Float[Array, "B S H R"],
    kv_pages: Shaped[Array, "N 64 W"],
    page_table: Int32[Array, "B P"],
    seq_lens: Int32[Array, "B"],
    plan: Plan | None = None,
    *,
    softmax_scale: float,
    causal: bool = True,
    num_sms: int | None = None,
    multicast: bool = True,
    interpret: Any = None,
) -> tuple[Float[Array, "B S H C"], Float32[Array, "B H S"]]:
    """Twin of `mla_decode_reference` for latent 512, rotary 64, BF16 queries.

    Args:
        plan: of `plan_parts`; without one it is made here, for `num_sms` multiprocessors (None for all).
        multicast: whether pairs of thread blocks share copies, where they can: BF16 pages, rows in an even number of
            blocks of 64.
        interpret: None to compile; `plgpu.InterpretGPUParams()` to run on a CPU.
    """
    B, S, H, C = q_latent.shape
    if plan is None:
        count = num_parts(launch.num_sms(num_sms), num_queries=S, num_heads=H)
        plan = plan_parts(seq_lens, num_parts=count, interpret=interpret)
    partials = attend(
        _pack(q_latent),
        _pack(q_rope),
        kv_pages,
        page_table,
        plan.seq_lens,
        plan.parts,
        num_queries=S,
        num_heads=H,
        softmax_scale=softmax_scale,
        causal=causal,
        multicast=multicast and _can_multicast(S * H, is_fp8=kv_pages.dtype == jnp.uint8),
        interpret=interpret,
    )
    out, lse = combine_parts(partials, plan.parts, num_queries=S, num_heads=H, interpret=interpret)
    out = out if out.shape[1] == S * H else out[:, : S * H]
    return out.reshape(B, S, H, C), lse


def aot_cases() -> list[AotCase]:
    """BF16 and FP8 caches, one and several queries, all and few heads."""
    return [
        AotCase(
            f"mla_decode{'_fp8' * case.is_fp8} {case.name.removesuffix('-fp8')}",
            functools.partial(mla_decode_pallas, softmax_scale=SOFTMAX_SCALE, causal=case.causal),
            case.shapes(),
            (BF16_MMA, *[MULTICAST] * _can_multicast(case.num_queries * case.num_heads, is_fp8=case.is_fp8)),
        )
        for case in COMPILED_CASES
    ]


def _can_multicast(num_rows: int, *, is_fp8: bool) -> bool:
    """Whether rows s H + h make an even number of thread blocks, whose pages are copied as they are."""
    return not is_fp8 and -(-num_rows // ROWS) % 2 == 0


def _pack(q: Float[Array, "B S H D"]) -> Float[Array, "B R D"]:
    """Rows s H + h, which costs nothing; where they are no multiple of 8 they are filled up with zeros."""
    B, S, H, D = q.shape
    rows = q.reshape(B, S * H, D)
    rest = -(S * H) % TILE_ROWS
    return jnp.pad(rows, ((0, 0), (0, rest), (0, 0))) if rest else rows
