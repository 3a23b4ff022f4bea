"""MLA decoding by torch: every way gets the cached rows of a sequence in one piece, for nothing.

So torch is spared the pages that the kernel follows; plans and masks are made before the clock runs. Nothing in torch
knows that values are a part of the keys. As all heads share the keys, a fused kernel gets heads as rows and new tokens
as heads: q [B, S, H, 576] over one [B, 1, L, 576] that it sees S times.

Varied lengths: sequences are sorted by length into groups, each padded to its longest and done by a call of its own;
`flex_attention` skips padding by its plan of blocks and needs no groups.
"""

import math
from typing import Any, NamedTuple

from dsv3_kernels.gpu.torch_peer.problems import TorchDecode
from dsv3_kernels.gpu.torch_peer.sdpa import BACKENDS, additive, attend, flex
from dsv3_kernels.gpu.torch_peer.way import Prepared, Way, relative_error

LIMIT = 4e-2
"""Scores rounded to bf16 err by a hundredth, one missing key by a third (see `_inputs`)."""

GROUPS = 8
"""Of sequences of varied lengths: a fifth of padding at the lengths of the bench."""

LENGTH_MULTIPLE = 64

QUERY_SIGN = 8.0

FLEX_TILES = (
    {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
    {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
)
"""The first that runs is taken. Rows of 576 count as 1024 in Triton's tiles: torch's own choice needs more shared
memory than there is, and 64 queries a tile spill registers (a kernel of the same loop, compiled for sm_90)."""


class Group(NamedTuple):
    """Sequences that one call does."""

    q: Any
    """[b, S, H, I]"""
    k: Any
    """[b, L, I]"""
    is_visible: Any
    """[b, S, L]"""
    first_hidden: int
    """Keys before this one are seen by every query of the group; L if all are."""
    lengths: tuple[int, ...]


def ways(torch: Any, problem: TorchDecode, device: str) -> list[Way]:
    """Two plain matmuls with a softmax in between, each backend of the fused function, flex."""
    names = {"bmm": _by_products, **{f"sdpa {backend}": _by_sdpa(backend) for backend in BACKENDS}}

    def grouped(launch: Any) -> Any:
        return lambda sets: _prepared(torch, problem, device, sets, launch)

    return [
        *(Way("torch", name, grouped(launch), LIMIT) for name, launch in names.items()),
        Way("torch", "flex", lambda sets: _prepared_flex(torch, problem, device, sets), LIMIT, is_compiled=True),
    ]


def group_lengths(lengths: tuple[int, ...], groups: int) -> list[tuple[int, ...]]:
    """Sorted and split into equal parts; one part if all are equal."""
    if len(set(lengths)) == 1:
        return [lengths]
    ordered, size = sorted(lengths), -(-len(lengths) // groups)
    return [tuple(ordered[start : start + size]) for start in range(0, len(ordered), size)]


def _prepared(torch: Any, problem: TorchDecode, device: str, sets: int, launch: Any) -> Prepared:
    inputs = [_inputs(torch, problem, device, GROUPS) for _ in range(sets)]
    calls = [[launch(torch, problem, group) for group in groups] for groups in inputs]
    return Prepared(
        [lambda each=each: [call() for call in each] for each in calls],
        lambda results: _error(torch, problem, inputs[0], results),
    )


def _by_products(torch: Any, problem: TorchDecode, group: Group) -> Any:
    """bf16 throughout, the softmax's sums excepted; the mask is added only to the keys that it may hide."""
    b, S, H, _ = group.q.shape
    rows = (group.q * problem.softmax_scale).flatten(1, 2)
    keys, values = group.k.transpose(1, 2), group.k[..., : problem.latent_dim]
    hidden = slice(group.first_hidden, None)
    mask = additive(torch, group.is_visible[:, :, None, hidden])

    def call() -> Any:
        scores = torch.bmm(rows, keys)
        if mask.shape[-1]:
            scores.view(b, S, H, -1)[..., hidden].add_(mask)
        return torch.bmm(torch.softmax(scores, -1), values).view(b, S, H, -1)

    return call


def _by_sdpa(backend: str) -> Any:
    def launch(torch: Any, problem: TorchDecode, group: Group) -> Any:
        _, S, H, _ = group.q.shape
        k = group.k[:, None].expand(-1, S, -1, -1)
        v = k[..., : problem.latent_dim]
        mask = None
        if group.first_hidden < group.k.shape[1]:
            mask = additive(torch, group.is_visible)[:, :, None].expand(-1, -1, H, -1)
        return lambda: attend(torch, backend, group.q, k, v, attn_mask=mask, scale=problem.softmax_scale)

    return launch


def _prepared_flex(torch: Any, problem: TorchDecode, device: str, sets: int) -> Prepared:
    """All heads and new tokens are rows of one head: torch's kernel for decoding wants a tile to hold all heads."""
    inputs = [_inputs(torch, problem, device, 1) for _ in range(sets)]
    (first,) = inputs[0]
    B, S, H, _ = first.q.shape
    lengths = torch.tensor(first.lengths, device=device)
    run = flex(torch, lambda b, h, q, kv: kv <= lengths[b] - S + q // H, (B, S * H, first.k.shape[1]), device)

    def call(group: Group, tiles: dict[str, int]) -> Any:
        q, k = group.q.view(B, 1, S * H, -1), group.k[:, None]
        v = k[..., : problem.latent_dim]
        return run(q, k, v, scale=problem.softmax_scale, kernel_options=tiles).view(B, S, H, -1)

    tiles = _first_that_runs(lambda tiles: call(first, tiles))
    return Prepared(
        [lambda group=group: [call(group, tiles)] for (group,) in inputs],
        lambda results: _error(torch, problem, inputs[0], results),
    )


def _first_that_runs(call: Any) -> dict[str, int]:
    for tiles in FLEX_TILES[:-1]:
        try:
            call(tiles)
        except Exception:  # noqa: BLE001  what torch's compilers raise has no common base
            continue
        return tiles
    return FLEX_TILES[-1]


def _inputs(torch: Any, problem: TorchDecode, device: str, groups: int) -> list[Group]:
    """Normal values; the last element of a row is no value, and marks whether the key is one of the newest.

    Those, and the padding behind them, get a score higher by log(L) / 2, so that each counts as much as all older keys
    together in the result's norm: a way that hides or shows one too many is far off.
    """
    result, S = [], problem.num_queries
    width = problem.latent_dim + problem.rope_dim
    for lengths in group_lengths(problem.lengths, groups):
        longest = -(-max(lengths) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        ends = torch.tensor(lengths, device=device)[:, None]
        places = torch.arange(longest, device=device)
        q = torch.randn(len(lengths), S, problem.num_heads, width, dtype=torch.bfloat16, device=device)
        k = torch.randn(len(lengths), longest, width, dtype=torch.bfloat16, device=device)
        q *= 0.3
        q[..., -1] = QUERY_SIGN
        bonus = 0.5 * math.log(longest) / (QUERY_SIGN * problem.softmax_scale)
        k[..., -1] = torch.where(places >= ends - 2 * S, bonus, 0.0)
        last_seen = ends - S + torch.arange(S, device=device)
        is_visible = places <= last_seen[:, :, None]
        result.append(Group(q, k, is_visible, min(lengths) - S + 1, lengths))
    return result


def _error(torch: Any, problem: TorchDecode, groups: list[Group], results: list[Any]) -> float:
    """The largest of each group's shortest, longest and last sequence (its keys may lie behind 2^31 elements).

    A result is [b, S, H, W].
    """
    errors = []
    for group, result in zip(groups, results, strict=True):
        order = sorted(range(len(group.lengths)), key=group.lengths.__getitem__)
        errors += [
            relative_error(result[b], _plain(torch, problem, group.q[b], group.k[b], group.is_visible[b]))
            for b in {order[0], order[-1], len(order) - 1}
        ]
    return max(errors)


def _plain(torch: Any, problem: TorchDecode, q: Any, k: Any, is_visible: Any) -> Any:
    """[S, H, I], [L, I], [S, L] -> [S, H, W], in float32."""
    q, k = q.float(), k.float()
    scores = torch.einsum("shi,li->shl", q, k) * problem.softmax_scale
    weights = scores.masked_fill(~is_visible[:, None], float("-inf")).softmax(-1)
    return torch.einsum("shl,lw->shw", weights, k[:, : problem.latent_dim])
