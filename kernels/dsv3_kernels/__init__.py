"""Kernels of DeepSeek-V3: each op has a plain reference, an implementation in XLA, and one for Hopper GPUs.

The public names load when first used, so that importing the package costs nothing.

| letter | axis                        | letter | axis                                  |
|--------|-----------------------------|--------|---------------------------------------|
| M      | rows                        | N      | columns; tokens; pages of a pool      |
| K      | contraction; chosen experts | G      | groups of rows; work items of a plan  |
| A      | input of a weight           | Z      | its output; parts; slots of a page    |
| E      | experts                     | D      | model width                           |
| F      | feed-forward width          | F2     | gate and up together, 2·F             |
| B      | sequences                   | H      | attention heads                       |
| T      | queries                     | S      | keys; in decoding, queries            |
| C      | latent; columns             | R      | head dim with rope; rows              |
| J      | head dim of queries, keys   | W      | head dim of values; a stored row      |
| P      | pages of a sequence         | X      | a joined row                          |
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsv3_kernels.casts.api import cast_blocks, cast_tokens, requantize_transposed, swiglu_cast
    from dsv3_kernels.decode_attention.api import mla_decode, plan_decode
    from dsv3_kernels.gemm.api import fp8_gemm
    from dsv3_kernels.grouped_gemm.api import grouped_fp8_gemm, grouped_fp8_gemm_k, grouped_fp8_gemm_masked
    from dsv3_kernels.grouped_gemm_bf16.api import grouped_matmul, grouped_matmul_k
    from dsv3_kernels.latent_cache.api import cache_read, cache_write
    from dsv3_kernels.latent_cache.fp8_rows import pack_fp8_cache_rows, unpack_fp8_cache_rows
    from dsv3_kernels.prefill_attention.api import mla_prefill
    from dsv3_kernels.quantize import QTensor, dequantize_tiles, quantize_tiles
    from dsv3_kernels.routed_experts.api import expert_ffn
    from dsv3_kernels.routed_experts.plan import BlockPlan, plan_blocks, plan_few
    from dsv3_kernels.routed_experts.reference import expert_ffn_reference, grouped_linear
    from dsv3_kernels.routed_experts.rows import gather_rows, row_weights, sum_rows

__all__ = [
    "BlockPlan",
    "QTensor",
    "cache_read",
    "cache_write",
    "cast_blocks",
    "cast_tokens",
    "dequantize_tiles",
    "expert_ffn",
    "expert_ffn_reference",
    "fp8_gemm",
    "gather_rows",
    "grouped_fp8_gemm",
    "grouped_fp8_gemm_k",
    "grouped_fp8_gemm_masked",
    "grouped_linear",
    "grouped_matmul",
    "grouped_matmul_k",
    "mla_decode",
    "mla_prefill",
    "pack_fp8_cache_rows",
    "plan_blocks",
    "plan_decode",
    "plan_few",
    "quantize_tiles",
    "requantize_transposed",
    "row_weights",
    "sum_rows",
    "swiglu_cast",
    "unpack_fp8_cache_rows",
]

_HOME = {
    "BlockPlan": "routed_experts.plan",
    "QTensor": "quantize",
    "cache_read": "latent_cache.api",
    "cache_write": "latent_cache.api",
    "cast_blocks": "casts.api",
    "cast_tokens": "casts.api",
    "dequantize_tiles": "quantize",
    "expert_ffn": "routed_experts.api",
    "expert_ffn_reference": "routed_experts.reference",
    "fp8_gemm": "gemm.api",
    "gather_rows": "routed_experts.rows",
    "grouped_fp8_gemm": "grouped_gemm.api",
    "grouped_fp8_gemm_k": "grouped_gemm.api",
    "grouped_fp8_gemm_masked": "grouped_gemm.api",
    "grouped_linear": "routed_experts.reference",
    "grouped_matmul": "grouped_gemm_bf16.api",
    "grouped_matmul_k": "grouped_gemm_bf16.api",
    "mla_decode": "decode_attention.api",
    "mla_prefill": "prefill_attention.api",
    "pack_fp8_cache_rows": "latent_cache.fp8_rows",
    "plan_blocks": "routed_experts.plan",
    "plan_decode": "decode_attention.api",
    "plan_few": "routed_experts.plan",
    "quantize_tiles": "quantize",
    "requantize_transposed": "casts.api",
    "row_weights": "routed_experts.rows",
    "sum_rows": "routed_experts.rows",
    "swiglu_cast": "casts.api",
    "unpack_fp8_cache_rows": "latent_cache.fp8_rows",
}


def __getattr__(name: str) -> object:
    """Loads a public name from the module it lives in (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
