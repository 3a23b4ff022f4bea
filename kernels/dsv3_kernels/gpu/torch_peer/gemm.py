"""torch's scaled FP8 matmul, one scale an operand; "fast" lets the tensor cores add without promotion."""

from typing import Any

from dsv3_kernels.gpu.torch_peer.problems import TorchGemm
from dsv3_kernels.gpu.torch_peer.way import Prepared, Way, relative_error

CHECKED_ROWS = 64
LIMIT = 5e-2
"""What a wrong matmul exceeds by far, and no rounding reaches."""


def ways(torch: Any, problem: TorchGemm, device: str) -> list[Way]:
    """Two columns, as the two do not add with the same precision."""

    def way(column: str, is_fast: bool) -> Way:
        return Way(
            column,
            "scaled_mm, fast" if is_fast else "scaled_mm",
            lambda sets: _prepared(torch, problem, device, sets, is_fast),
            limit=LIMIT,
        )

    return [way("torch", False), way("torch fast", True)]


def _prepared(torch: Any, problem: TorchGemm, device: str, sets: int, is_fast: bool) -> Prepared:
    def operand(rows: int) -> Any:
        return torch.randn(rows, problem.k, device=device).to(torch.float8_e4m3fn)

    one = torch.ones((), device=device)
    pairs = [(operand(problem.m), operand(problem.n).t()) for _ in range(sets)]

    def launch(a: Any, b: Any) -> Any:
        return torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=is_fast)

    def error(result: Any) -> float:
        a, b = pairs[0]
        return relative_error(result[:CHECKED_ROWS], a[:CHECKED_ROWS].float() @ b.float())

    return Prepared([lambda a=a, b=b: launch(a, b) for a, b in pairs], error)
