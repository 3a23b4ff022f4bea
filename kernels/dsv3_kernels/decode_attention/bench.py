"""What `mla_decode` is compared with on a GPU: float32 within FlashMLA's tolerances, XLA's and torch's speed."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dsv3_kernels.decode_attention.api import mla_decode, plan_decode
from dsv3_kernels.decode_attention.cases import (
    CHECKED_CASES,
    GARBAGE_PAGE,
    LATENT_DIM,
    PAGE_SIZE,
    ROPE_DIM,
    SMALL_CASES,
    SOFTMAX_SCALE,
    SPEED_CASES,
    DecodeCase,
)
from dsv3_kernels.decode_attention.planner import Plan
from dsv3_kernels.decode_attention.reference import mla_decode_reference, to_floats
from dsv3_kernels.gpu.case import BenchCase, CheckCase, Comparison, Published, diff
from dsv3_kernels.gpu.torch_peer.problems import TorchDecode
from dsv3_kernels.latent_cache.fp8_rows import pack_fp8_cache_rows

Inputs = tuple[Array, Array, Array, Array, Array]
"""The arguments of `mla_decode`, in its order."""

Planned = tuple[Inputs, Plan]
"""Those of a layer: the plan is made once a step, and outside what is measured, as in FlashMLA's benchmark."""

PLANNED_BATCHES = (1, 128, 300)

COMPUTE_BOUND = Published("FlashMLA, H800, its best of compute-bound shapes", tflops=660)
MEMORY_BOUND = Published("FlashMLA, H800, its best of memory-bound shapes", gbps=3000)
"""Of 2025-04-22 and 2025-02-24, with a BF16 cache; shapes are not published."""

BOUND_BY_PRODUCTS = 128
"""Query rows a key from which FlashMLA's authors call it compute-bound."""

WITHOUT_MULTICAST = (DecodeCase(128, 1, 128, 4096), DecodeCase(128, 1, 128, 32768))
"""Shapes at which the worth of sharing copies is measured."""

ONE_TILE = DecodeCase(1, 1, 64, 64)
"""A page for one thread block: probabilities times latents, without multicast and without parts to combine."""

GOAL_SHARE = 0.75
"""Of the rate of bf16 matmuls, where they bind."""

FP8_OF_FEW_HEADS = tuple(DecodeCase(128, s, 16, k, is_fp8=True) for s in (1, 2) for k in (4096, 32768))
"""Bound by memory, so that FP8 rows should pay most."""

MAX_DRAWN_PAGES = 8192
"""Pages of random values; a larger pool repeats them at other addresses, which no cache can tell."""


def bench_cases() -> list[BenchCase]:
    """FlashMLA's benchmark, flops counted without regard to the mask; FP8 beside BF16; without multicast; plans."""
    rows = [_bench_fp8(case) if case.is_fp8 else _bench_case(case) for case in (*SPEED_CASES, *FP8_OF_FEW_HEADS)]
    alone = [
        row._replace(
            name=f"{row.name} without multicast",
            kernel=functools.partial(_run_alone, case),
            others={},
            published=None,
            torch=None,
            is_quick=False,
        )
        for row, case in zip(rows, SPEED_CASES)
        if case in WITHOUT_MULTICAST
    ]
    plans = [
        BenchCase(
            op="plan_decode",
            name=f"b{num_seqs}",
            make_inputs=functools.partial(_drawn_lengths, num_seqs),
            kernel=functools.partial(_parts, implementation="pallas"),
            others={"XLA": functools.partial(_parts, implementation="xla")},
            flops=0.0,
            num_bytes=4.0 * num_seqs,
        )
        for num_seqs in PLANNED_BATCHES
    ]
    return rows + alone + plans


def _bench_case(case: DecodeCase) -> BenchCase:
    return BenchCase(
        op="mla_decode",
        name=case.name,
        make_inputs=lambda key: _planned(make_inputs(case, key)),
        kernel=functools.partial(_run_planned, case, implementation="pallas"),
        others={"XLA": functools.partial(_run_planned, case, implementation="xla")},
        flops=float(case.flops(case.lengths())),
        num_bytes=float(case.bytes_moved(case.lengths())),
        published=_published(case),
        torch=_torch(case),
        is_quick=case in SPEED_CASES[:1],
        is_bf16=True,
        goal_share=GOAL_SHARE,
        num_launches=2,
    )


def _bench_fp8(case: DecodeCase) -> BenchCase:
    """With the same rows in BF16 among the inputs, for the kernel that is to be no faster."""

    def of_bf16(inputs: tuple[Planned, Array]) -> tuple[Array, Array]:
        ((q_latent, q_rope, _, page_table, seq_lens), plan), kv_pages = inputs
        return _run_planned(case, ((q_latent, q_rope, kv_pages, page_table, seq_lens), plan), implementation="pallas")

    row = _bench_case(case)
    return row._replace(
        make_inputs=functools.partial(_make_both, case),
        kernel=lambda inputs: row.kernel(inputs[0]),
        others={"XLA": lambda inputs: row.others["XLA"](inputs[0]), "BF16 cache": of_bf16},
    )


def check_cases() -> list[CheckCase]:
    """Plans, which are exact; every case by FlashMLA's rule for outputs and for log-sum-exps."""
    plans = [
        CheckCase(
            op="plan_decode",
            name=f"b{num_seqs}",
            make_inputs=functools.partial(_drawn_lengths, num_seqs),
            run=_parts,
            comparisons=(
                Comparison("parts", lambda lens: _parts(lens, "reference"), lambda x, y: (x != y).sum(), 0.0),
            ),
            is_small=True,
        )
        for num_seqs in PLANNED_BATCHES
    ]
    return plans + [
        CheckCase(
            op="mla_decode",
            name=case.name,
            make_inputs=functools.partial(make_inputs, case),
            run=functools.partial(_run, case),
            comparisons=_comparisons(case),
            is_small=case is ONE_TILE or case in SMALL_CASES,
            path="left operand in registers" if case is ONE_TILE else "",
        )
        for case in (ONE_TILE, *SMALL_CASES, *CHECKED_CASES)
    ]


def make_inputs(case: DecodeCase, key: jax.Array) -> Inputs:
    """As `cases.make_inputs`, on the device; only the lengths are the same for every key."""
    q_latent, q_rope, pages, page_table, seq_lens = _drawn(case, key)
    return q_latent, q_rope, pages(case.is_fp8), page_table, seq_lens


def _planned(inputs: Inputs) -> Planned:
    _, num_queries, num_heads, _ = inputs[0].shape
    return inputs, plan_decode(inputs[4], num_queries=num_queries, num_heads=num_heads)


def _make_both(case: DecodeCase, key: jax.Array) -> tuple[Planned, Array]:
    """`make_inputs` with an FP8 cache, planned, and the same cache in BF16."""
    q_latent, q_rope, pages, page_table, seq_lens = _drawn(case, key)
    return _planned((q_latent, q_rope, pages(True), page_table, seq_lens)), pages(False)


def _drawn(case: DecodeCase, key: jax.Array) -> tuple[Array, Array, Callable[[bool], Array], Array, Array]:
    """The inputs, with a function of whether the pages are FP8."""
    lengths = case.lengths()
    pages_used = -(-lengths // PAGE_SIZE)
    num_pages = int(pages_used.sum()) + 1
    column = np.arange(max(int(pages_used.max()), 1) + 1, dtype=np.int32)
    in_line = (np.cumsum(pages_used, dtype=np.int32) - pages_used)[
        :, None
    ] + column  # page number if none were shuffled
    is_used = column < pages_used[:, None]
    tokens_in_line = np.append(np.clip(lengths[:, None] - column * PAGE_SIZE, 0, PAGE_SIZE)[is_used], 0)

    kv_key, query_key, order_key = jax.random.split(key, 3)
    ids = jax.random.permutation(order_key, num_pages).astype(jnp.int32)
    page_table = jnp.where(is_used, ids[np.where(is_used, in_line, 0)], GARBAGE_PAGE)
    tokens = jnp.zeros(num_pages, jnp.int32).at[ids].set(tokens_in_line.astype(np.int32))
    is_token = jnp.arange(PAGE_SIZE, dtype=jnp.int32)[None, :, None] < tokens[:, None, None]
    kv = _noise(kv_key, (min(num_pages, MAX_DRAWN_PAGES), PAGE_SIZE, LATENT_DIM + ROPE_DIM))

    def pages(is_fp8: bool) -> Array:
        rows = pack_fp8_cache_rows(kv[..., :LATENT_DIM], kv[..., LATENT_DIM:]) if is_fp8 else kv
        unused = jnp.asarray(0xFF if is_fp8 else jnp.nan, rows.dtype)  # bytes that are NaN in E4M3, float32 and BF16
        return jnp.where(is_token, rows[np.arange(num_pages, dtype=np.int32) % kv.shape[0]], unused)

    q = _noise(query_key, (case.num_seqs, case.num_queries, case.num_heads, LATENT_DIM + ROPE_DIM))
    return q[..., :LATENT_DIM], q[..., LATENT_DIM:], pages, page_table, jnp.asarray(lengths)


def excess(absolute: float, relative: float) -> Callable[[Array, Array], Array]:
    """FlashMLA's rule as a number: max |x - y| / max(absolute, relative |y|); NaN where only one is infinite or NaN."""

    def error(x: Array, y: Array) -> Array:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        allowed = jnp.maximum(absolute, relative * jnp.abs(y))
        ratio = jnp.where(x == y, 0.0, jnp.abs(x - y) / allowed)
        return jnp.where(jnp.isfinite(ratio).all(), jnp.max(ratio), jnp.float32(jnp.nan))

    return error


def finite_diff(x: Array, y: Array) -> Array:
    """`diff` of the elements that are finite in y."""
    return diff(jnp.where(jnp.isfinite(y), x, 0.0), jnp.where(jnp.isfinite(y), y, 0.0))


def _noise(key: jax.Array, shape: tuple[int, ...]) -> Array:
    return jnp.clip(jax.random.normal(key, shape) / 10, -1, 1).astype(jnp.bfloat16)


def _published(case: DecodeCase) -> Published | None:
    if case.is_fp8:
        return None
    return COMPUTE_BOUND if case.num_queries * case.num_heads >= BOUND_BY_PRODUCTS else MEMORY_BOUND


def _torch(case: DecodeCase) -> TorchDecode | None:
    """Of a BF16 cache: torch attends to no FP8 rows."""
    if case.is_fp8:
        return None
    return TorchDecode(
        num_queries=case.num_queries,
        num_heads=case.num_heads,
        lengths=tuple(case.lengths().tolist()),
        latent_dim=LATENT_DIM,
        rope_dim=ROPE_DIM,
        softmax_scale=SOFTMAX_SCALE,
    )


def _run(case: DecodeCase, inputs: Inputs, implementation: str) -> tuple[Array, Array]:
    return mla_decode(*inputs, softmax_scale=SOFTMAX_SCALE, causal=case.causal, implementation=implementation)


def _run_planned(case: DecodeCase, planned: Planned, implementation: str) -> tuple[Array, Array]:
    inputs, plan = planned
    options = {"softmax_scale": SOFTMAX_SCALE, "causal": case.causal, "implementation": implementation}
    return mla_decode(*inputs, plan=plan, **options)


def _drawn_lengths(num_seqs: int, key: jax.Array) -> Array:
    """Some below 0, which count as 0."""
    return jax.random.randint(key, (num_seqs,), -100, 9000, jnp.int32)


def _parts(seq_lens: Array, implementation: str) -> Array:
    return plan_decode(seq_lens, num_queries=1, num_heads=16, implementation=implementation).parts


def _run_alone(case: DecodeCase, planned: Planned) -> tuple[Array, Array]:
    """The kernel with no copy shared; imported when first used, as in `api`."""
    from dsv3_kernels.decode_attention.pallas_sm90 import mla_decode_pallas

    return mla_decode_pallas(*planned[0], planned[1], softmax_scale=SOFTMAX_SCALE, causal=case.causal, multicast=False)


def _in_float32(case: DecodeCase, inputs: Inputs) -> tuple[Array, Array]:
    q_latent, q_rope, kv_pages, page_table, seq_lens = inputs
    return mla_decode_reference(
        q_latent.astype(jnp.float32),
        q_rope.astype(jnp.float32),
        to_floats(kv_pages).astype(jnp.float32),
        page_table,
        seq_lens,
        softmax_scale=SOFTMAX_SCALE,
        causal=case.causal,
    )


def _comparisons(case: DecodeCase) -> tuple[Comparison, ...]:
    expected = jax.jit(functools.partial(_in_float32, case))
    out, lse = excess(8e-4, 2.01 / 128), excess(1e-6, 8.01 / 65536)
    return (
        Comparison("out", expected, lambda x, y: out(x[0], y[0]), 1.0),
        Comparison("out, cosine", expected, lambda x, y: diff(x[0], y[0]), 5e-6),
        Comparison("lse", expected, lambda x, y: lse(x[1], y[1]), 1.0),
        Comparison("lse, cosine", expected, lambda x, y: finite_diff(x[1], y[1]), 5e-6),
    )
