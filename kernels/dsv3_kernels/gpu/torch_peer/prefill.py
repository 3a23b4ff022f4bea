"""MLA's prefill attention by torch, forward or backward alone, from what forward saved.

torch is spared the log-sum-exps, which ours returns and takes a gradient for, and masks, plans of blocks and the zeros
that flash attention wants behind the values (it knows one width only) are made before the clock runs. Memory is
[B, T, H, I], as a model has it.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from dsv3_kernels.gpu.torch_peer.problems import TorchPrefill
from dsv3_kernels.gpu.torch_peer.sdpa import BACKENDS, additive, attend, flex
from dsv3_kernels.gpu.torch_peer.way import Prepared, Way, relative_error

LIMIT = 3e-2
"""bf16 errs by a few thousandths; a wrong mask by most of the result."""


class Inputs(NamedTuple):
    """[B, H, T, I], [B, H, S, I], [B, H, S, W], the gradient of the result, document ids [B, S] or None."""

    q: Any
    k: Any
    v: Any
    d_out: Any
    ids: Any


def ways(torch: Any, problem: TorchPrefill, device: str) -> list[Way]:
    """Each backend of the fused function, flash attention of documents one by one, flex."""
    attentions = {f"sdpa {backend}": _sdpa(backend) for backend in BACKENDS if _knows_mask(problem, backend)}
    if problem.num_documents and problem.T == problem.S:
        attentions["varlen flash"] = _varlen
    attentions["flex"] = _flex

    def prepare(make: Any, is_padded: bool) -> Callable[[int], Prepared]:
        return lambda sets: _prepared(torch, problem, device, sets, make, is_padded)

    return [
        Way("torch", name, prepare(make, name.endswith("flash")), LIMIT, is_compiled=name == "flex")
        for name, make in attentions.items()
    ]


def visible(torch: Any, problem: TorchPrefill, ids: Any, device: str) -> Any:
    """[B or 1, T, S]: which keys a query sees."""
    queries = torch.arange(problem.S - problem.T, problem.S, device=device)
    is_visible = (torch.arange(problem.S, device=device) <= queries[:, None])[None]
    if ids is None:
        return is_visible
    return is_visible & (ids[:, problem.S - problem.T :, None] == ids[:, None, :])


def _knows_mask(problem: TorchPrefill, backend: str) -> bool:
    """Flash attention takes no mask."""
    return backend != "flash" or not problem.num_documents


def _prepared(torch: Any, problem: TorchPrefill, device: str, sets: int, make: Any, is_padded: bool) -> Prepared:
    ids = _document_ids(torch, problem, device)
    inputs = [_inputs(torch, problem, device, ids) for _ in range(sets)]
    attention = make(torch, problem, ids, device)
    calls = [_call(torch, problem, attention, each, is_padded) for each in inputs]
    return Prepared(calls, lambda results: _error(torch, problem, inputs[0], results))


def _call(torch: Any, problem: TorchPrefill, attention: Any, inputs: Inputs, is_padded: bool) -> Callable[[], Any]:
    """A launch; of the backward pass from a forward pass that ran before."""
    wider = problem.qk_dim - problem.v_dim if is_padded else 0

    def widened(x: Any) -> Any:
        return torch.nn.functional.pad(x.transpose(1, 2), (0, wider)).transpose(1, 2)  # the order in memory stays

    v, d_out = widened(inputs.v), widened(inputs.d_out)
    if not problem.is_backward:
        return lambda: (attention(inputs.q, inputs.k, v)[..., : problem.v_dim],)
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, v)]
    out = attention(*leaves)

    def call() -> Any:
        d_q, d_k, d_v = torch.autograd.grad(out, leaves, d_out, retain_graph=True)
        return d_q, d_k, d_v[..., : problem.v_dim]

    return call


def _sdpa(backend: str) -> Any:
    def make(torch: Any, problem: TorchPrefill, ids: Any, device: str) -> Any:
        options: dict[str, Any] = {"scale": problem.softmax_scale}
        if ids is None and problem.T == problem.S:
            options["is_causal"] = True
        elif ids is None and backend in ("flash", "efficient"):
            bias = importlib.import_module("torch.nn.attention.bias")
            options["attn_mask"] = bias.causal_lower_right(problem.T, problem.S)
        else:
            mask = additive(torch, visible(torch, problem, ids, device))
            options["attn_mask"] = mask[:, None].expand(problem.B, problem.H, -1, -1)
        return lambda q, k, v: attend(torch, backend, q, k, v, **options)

    return make


def _varlen(torch: Any, problem: TorchPrefill, ids: Any, device: str) -> Any:
    """Documents of all rows one behind the other, each a causal sequence of its own."""
    module = importlib.import_module("torch.nn.attention.varlen")
    starts = document_starts(torch, ids)
    longest, scale = int(starts.diff().max()), problem.softmax_scale

    def attention(q: Any, k: Any, v: Any) -> Any:
        rows = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
        out = module.varlen_attn(*rows, starts, starts, longest, longest, scale=scale, window_size=(-1, 0))
        return out.unflatten(0, (problem.B, problem.T)).transpose(1, 2)

    return attention


def document_starts(torch: Any, ids: Any) -> Any:
    """Sorted ids [B, S] -> where documents start among the B S tokens, and B S; int32."""
    is_first = torch.ones_like(ids, dtype=torch.bool)
    is_first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = is_first.flatten().nonzero().flatten().int()
    return torch.nn.functional.pad(starts, (0, 1), value=ids.numel())


def _flex(torch: Any, problem: TorchPrefill, ids: Any, device: str) -> Any:
    start, shape = problem.S - problem.T, (problem.B, problem.T, problem.S)
    if ids is None:
        run = flex(torch, lambda b, h, q, kv: kv <= q + start, shape, device)
    else:
        run = flex(torch, lambda b, h, q, kv: (kv <= q + start) & (ids[b, q + start] == ids[b, kv]), shape, device)
    return lambda q, k, v: run(q, k, v, scale=problem.softmax_scale)


def _document_ids(torch: Any, problem: TorchPrefill, device: str) -> Any:
    if not problem.num_documents:
        return None
    return torch.randint(1, problem.num_documents + 1, (problem.B, problem.S), device=device).sort(dim=1).values


def _inputs(torch: Any, problem: TorchPrefill, device: str, ids: Any) -> Inputs:
    B, T, S, H = problem.B, problem.T, problem.S, problem.H

    def normal(length: int, width: int) -> Any:
        return torch.randn(B, length, H, width, dtype=torch.bfloat16, device=device).transpose(1, 2)

    return Inputs(
        normal(T, problem.qk_dim), normal(S, problem.qk_dim), normal(S, problem.v_dim), normal(T, problem.v_dim), ids
    )


def _error(torch: Any, problem: TorchPrefill, inputs: Inputs, results: Any) -> float:
    """The largest of the last head of the last row: of its result, or of its three gradients."""
    *leaves, d_out = (x[-1, -1].float() for x in (inputs.q, inputs.k, inputs.v, inputs.d_out))
    q, k, v = (x.requires_grad_() for x in leaves)
    is_visible = visible(torch, problem, inputs.ids, str(q.device))[-1]
    scores = (torch.einsum("ti,si->ts", q, k) * problem.softmax_scale).masked_fill(~is_visible, float("-inf"))
    out = torch.einsum("ts,sw->tw", scores.softmax(-1), v)
    expected = torch.autograd.grad(out, (q, k, v), d_out) if problem.is_backward else (out.detach(),)
    return max(relative_error(found[-1, -1], right) for found, right in zip(results, expected, strict=True))
