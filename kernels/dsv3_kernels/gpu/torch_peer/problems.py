"""Problems that torch is timed at, beside the kernels, and how they travel between the two processes."""

from typing import Any, NamedTuple


class TorchGemm(NamedTuple):
    """A matmul of FP8 matrices, [m, k] and [n, k], one scale each, into bf16."""

    m: int
    n: int
    k: int


class TorchDecode(NamedTuple):
    """Absorbed MLA: S new tokens of each sequence over its cached rows; value = the first `latent_dim` of a row.

    The new tokens are the last S of a length and see each other causally.
    """

    num_queries: int
    num_heads: int
    lengths: tuple[int, ...]
    latent_dim: int
    rope_dim: int
    softmax_scale: float


class TorchPrefill(NamedTuple):
    """Causal attention of T queries at the end of S keys, forward or backward alone; `num_documents` 0 means one."""

    B: int
    T: int
    S: int
    H: int
    qk_dim: int
    v_dim: int
    num_documents: int
    softmax_scale: float
    is_backward: bool


TorchProblem = TorchGemm | TorchDecode | TorchPrefill

_KINDS: dict[str, type[TorchProblem]] = {"gemm": TorchGemm, "decode": TorchDecode, "prefill": TorchPrefill}


def to_json(problem: TorchProblem) -> dict[str, Any]:
    """Plain data, with the kind of the problem."""
    (kind,) = (kind for kind, known in _KINDS.items() if isinstance(problem, known))
    return {"kind": kind, **problem._asdict()}


def from_json(data: dict[str, Any]) -> TorchProblem:
    """The inverse of `to_json`."""
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    return _KINDS[fields.pop("kind")](**fields)
