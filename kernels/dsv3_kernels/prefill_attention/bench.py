"""What prefill attention is compared with on a GPU: XLA's and torch's speed, and float32."""

import functools
import importlib
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dsv3_kernels import dispatch
from dsv3_kernels.gpu.case import BenchCase, CheckCase, Comparison
from dsv3_kernels.gpu.torch_peer.problems import TorchPrefill
from dsv3_kernels.prefill_attention import api
from dsv3_kernels.prefill_attention.cases import CASES, UGLY, Case, num_operations

OP = "mla_prefill"
GOAL_SHARES = {False: 0.7, True: 0.6}
"""Of the rate of bf16 matmuls, forward and backward."""
LIMITS = {"out": 4e-3, "lse": 1e-5, "d_q": 6e-3, "d_k": 6e-3, "d_v": 6e-3}
"""Norm of the error against float32, over the norm: bfloat16 rounds by 2^-9 of each factor and result."""
ROW_LIMIT = 2e-2
"""The same of any single row of `out`: one tile gone wrong is far above."""
ONE_TILE = Case("one_tile", B=1, T=128, S=128, H=1)
"""One thread block of each pass; the backward pass starts its sums at -lse and -delta."""
MOST_HEADS = 8
"""Of a comparison with float32."""


def bench_cases() -> list[BenchCase]:
    """Forward, and backward from what forward saved, at every real shape.

    tokamax's forward pass stands beside torch's where it is installed; nothing here needs it.
    """
    has_tokamax = importlib.util.find_spec("tokamax") is not None
    cases = []
    for case in CASES:
        for name, run, make, is_backward in (
            ("forward", _forward, make_inputs, False),
            ("backward", _backward, make_saved, True),
        ):
            cases.append(
                BenchCase(
                    op=OP,
                    name=f"{case.name} {name}",
                    make_inputs=functools.partial(make, case),
                    kernel=functools.partial(run, case, implementation="pallas"),
                    others={"XLA": functools.partial(run, case, implementation="xla")}
                    | ({"tokamax": functools.partial(_tokamax, case)} if has_tokamax and not is_backward else {}),
                    flops=float(num_operations(case, backward=is_backward)),
                    num_bytes=float(num_bytes(case, backward=is_backward)),
                    torch=_torch(case, is_backward=is_backward),
                    is_quick=case is CASES[0],
                    is_bf16=True,
                    goal_share=GOAL_SHARES[is_backward],
                )
            )
    return cases


def check_cases() -> list[CheckCase]:
    """Values and gradients against the reference in float32 where it fits, else against XLA's in float32."""
    of_v3 = {"qk_dim": 192, "v_dim": 128}
    ugly = [case._replace(**of_v3) for case in UGLY]
    real = [case._replace(H=MOST_HEADS) for case in CASES]
    return [
        CheckCase(
            op=OP,
            name=case.name,
            make_inputs=functools.partial(make_inputs, case),
            run=functools.partial(_values_and_gradients, case),
            comparisons=(_comparison(case, "xla" if case in real else "reference"),),
            is_small=case is ONE_TILE or case in ugly[:3],
            path="accumulator with a start value" if case is ONE_TILE else "",
        )
        for case in (ONE_TILE, *ugly, *real)
    ]


def make_inputs(case: Case, key: jax.Array) -> dict[str, Array | None]:
    """As `cases.make`, in bfloat16 on the device."""
    names = ("q", "k", "v", "d_out", "d_lse", "ids")
    keys: dict[str, Array] = dict(zip(names, jax.random.split(key, len(names)), strict=True))
    B, T, S, H = case.B, case.T, case.S, case.H

    def normal(name: str, *shape: int) -> Array:
        return jax.random.normal(keys[name], shape, jnp.bfloat16)

    ids = None
    if case.num_documents:
        ids = jnp.sort(jax.random.randint(keys["ids"], (B, S), 1, case.num_documents + 1), axis=1)
    return {
        "q": normal("q", B, T, H, case.qk_dim),
        "k": normal("k", B, S, H, case.qk_dim),
        "v": normal("v", B, S, H, case.v_dim),
        "d_out": normal("d_out", B, T, H, case.v_dim),
        "d_lse": normal("d_lse", B, H, T).astype(jnp.float32),
        "q_segment_ids": None if ids is None else ids[:, S - T :],
        "kv_segment_ids": ids,
    }


def make_saved(case: Case, key: jax.Array) -> dict[str, Array | None]:
    """`make_inputs` and the results of the forward pass."""
    inputs = make_inputs(case, key)
    out, lse = _forward(case, inputs, "xla")
    return inputs | {"out": out, "lse": lse}


def num_bytes(case: Case, *, backward: bool = False) -> int:
    """q, k, v read and out, lse written; backward, those and d_out read and three gradients written."""
    of_queries, of_keys = case.B * case.T * case.H, case.B * case.S * case.H
    qkv = 2 * (of_queries * case.qk_dim + of_keys * (case.qk_dim + case.v_dim))
    out, lse = 2 * of_queries * case.v_dim, 4 * of_queries
    return 2 * qkv + 2 * out + lse if backward else qkv + out + lse


def _torch(case: Case, *, is_backward: bool) -> TorchPrefill:
    shape = {name: getattr(case, name) for name in ("B", "T", "S", "H", "qk_dim", "v_dim", "num_documents")}
    return TorchPrefill(**shape, softmax_scale=case.qk_dim**-0.5, is_backward=is_backward)


def _forward(case: Case, inputs: dict[str, Any], implementation: str) -> tuple[Array, Array]:
    names = ("q", "k", "v", "q_segment_ids", "kv_segment_ids")
    return api.mla_prefill(
        *(inputs[name] for name in names), softmax_scale=case.qk_dim**-0.5, implementation=implementation
    )


def _tokamax(case: Case, inputs: dict[str, Any]) -> Array:
    """tokamax's kernel for Hopper, which knows neither documents nor queries behind keys: it gets a mask of them."""
    tokamax: Any = importlib.import_module("tokamax")
    mask = None
    if case.num_documents or case.T != case.S:
        queries, keys = jnp.arange(case.S - case.T, case.S)[:, None], jnp.arange(case.S)[None, :]
        mask = (queries >= keys)[None, None]
        if case.num_documents:
            mask &= inputs["q_segment_ids"][:, None, :, None] == inputs["kv_segment_ids"][:, None, None, :]
    arrays = (inputs[name] for name in ("q", "k", "v"))
    return tokamax.dot_product_attention(
        *arrays, mask=mask, is_causal=mask is None, scale=case.qk_dim**-0.5, implementation="mosaic"
    )


def _backward(case: Case, inputs: dict[str, Any], implementation: str) -> tuple[Array, Array, Array]:
    names = ("q", "k", "v", "q_segment_ids", "kv_segment_ids", "q_starts", "out", "lse", "d_out", "d_lse")
    arrays = [inputs.get(name) for name in names]
    return dispatch.run(api.GRADIENTS, implementation, *arrays, softmax_scale=case.qk_dim**-0.5)


def _values_and_gradients(case: Case, inputs: dict[str, Any], implementation: str) -> dict[str, Array]:
    def attend(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        return _forward(case, inputs | {"q": q, "k": k, "v": v}, implementation)

    results, backward = jax.vjp(attend, inputs["q"], inputs["k"], inputs["v"])
    found = (*results, *backward((inputs["d_out"].astype(results[0].dtype), inputs["d_lse"])))
    return dict(zip(LIMITS, found, strict=True))


def _comparison(case: Case, form: str) -> Comparison:
    def expected(inputs: dict[str, Any]) -> dict[str, Array]:
        wide = {name: inputs[name].astype(jnp.float32) for name in ("q", "k", "v", "d_out")}
        with jax.default_matmul_precision("highest"):
            return jax.jit(functools.partial(_values_and_gradients, case, implementation=form))(inputs | wide)

    return Comparison(f"share of the limits from {form}", expected, share_of_limits, 1.0)


def share_of_limits(found: dict[str, Array], expected: dict[str, Array]) -> Array:
    """The largest error, over what it may be; NaN where there is one."""
    shares = [_norm(found[name], expected[name], None) / limit for name, limit in LIMITS.items()]
    row = _norm(found["out"], expected["out"], -1) / ROW_LIMIT
    shares = jnp.stack([*shares, jnp.where(jnp.isnan(row).any(), jnp.nan, row.max())])
    return jnp.where(jnp.isnan(shares).any(), jnp.nan, shares.max())


def _norm(x: Array, y: Array, axis: int | None) -> Array:
    """|x - y| / |y|, the error itself where |y| is tiny (the gradient of a query with one key is 0)."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    size = jnp.sqrt(jnp.sum(y * y, axis=axis))
    return jnp.sqrt(jnp.sum((x - y) ** 2, axis=axis)) / jnp.maximum(size, 1.0 if axis is None else 1e-30)
