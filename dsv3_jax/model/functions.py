"""The functions that a layer is made of: each can be replaced without touching the rest."""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp

from dsv3_jax.config.check import check
from dsv3_jax.model.attention import attend
from dsv3_jax.model.moe import experts
from dsv3_jax.model.moe.router import route
from dsv3_jax.precision import fp8_experts, fp8_linear, plain_linear, wire
from dsv3_jax.precision.gradient_tiles import Tile
from dsv3_jax.typing import Array, DType
from dsv3_kernels import sum_rows


@dataclasses.dataclass(frozen=True)
class Functions:
    """Dtypes, and one function for each step of a layer; hashable, so that jit takes it as a static argument.

    To change an equation, write a function with the same signature and put it in with `dataclasses.replace`. Whatever
    stands here, norms, softmax, router and loss reduce in float32, and the router's bias is float32.

    - `project(x [..., A], w [A, Z])`: every projection but those below.
    - `project_attended(x, w)`: W^O (eq. 11), whose input is what attention gives.
    - `project_swiglu(gate_up [..., 2F], w [F, Z])`: swiglu(gate_up)·w, the second half of a dense feed-forward.
    - `attend(q, k, v, q_segment_ids, kv_segment_ids, *, scale, q_starts)`: the attention core (eq. 10), see
      `attention.attend`; decoding calls it with latents as keys and values, one head of them for all queries.
    - `route(logits [N, E], bias [E] | None, **settings)` -> weights [N, K], ids [N, K] (eq. 13-16).
    - `dispatch(x [B, T, D], ids [B, T, K], weights [B, T, K], *, num_experts)` -> `experts.Dispatched`.
    - `expert_ffn(gate_up [E, D, 2, F], down [E, F, D], dispatched)` -> rows [M, D]: the experts themselves, each row
      times its weight. `dispatched.block_expert` says whose a row is.
    - `combine(rows [M, D], dispatched.plan)` -> [N, D]: the sum of each token's rows (eq. 12).
    - `routed_experts`: these three in turn, see `experts.routed_experts`; on many devices with an exchange around them.
    """

    name: str
    param_dtype: DType
    compute_dtype: DType
    project: Callable[..., Array]
    project_attended: Callable[..., Array]
    project_swiglu: Callable[..., Array]
    expert_ffn: Callable[..., Array]
    dispatch: Callable[..., Any] = experts.dispatch
    combine: Callable[..., Array] = sum_rows
    routed_experts: Callable[..., tuple[Array, Array]] = experts.routed_experts
    attend: Callable[..., Array] = attend
    route: Callable[..., tuple[Array, Array]] = route


@functools.cache
def functions_for(precision: str) -> Functions:
    """Those of a precision's name: float32, bfloat16, mixed (float32 parameters, bfloat16 between them), fp8_dsv3.

    The same object each time, so that what jit compiled for it is found again.

    Raises:
        ConfigError: another name.
    """
    dtypes = {"float32": (jnp.float32, jnp.float32), "bfloat16": (jnp.bfloat16, jnp.bfloat16)}
    dtypes |= {"mixed": (jnp.float32, jnp.bfloat16)}
    known = [*dtypes, "fp8_dsv3"]
    check(
        precision in known, f"precision={precision!r} is unknown; use one of {', '.join(known)} (RunConfig.precision)."
    )
    return fp8_functions() if precision == "fp8_dsv3" else _in_one_dtype(precision, *dtypes[precision])


def functions_of(dtype: DType) -> Functions:
    """Those that compute in the dtype the parameters already have."""
    return functions_for("bfloat16" if jnp.dtype(dtype) == jnp.dtype(jnp.bfloat16) else "float32")


@functools.cache
def fp8_functions(*, gradient_tile: Tile = (1, 128)) -> Functions:
    """DeepSeek-V3's FP8 training: projections and experts in FP8, bfloat16 between them, float32 parameters.

    `gradient_tile`: rows and columns of an activation's gradient that share a scale. (128, 128) is what the report
    tried and gave up, because a model diverged (appendix B.2).
    """
    settings: Any = {"dtype": jnp.bfloat16, "gradient_tile": gradient_tile}
    return Functions(
        "fp8_dsv3",
        jnp.float32,
        jnp.bfloat16,
        project=partial(fp8_linear.linear, **settings),
        project_attended=partial(fp8_linear.attention_linear, **settings),
        project_swiglu=partial(fp8_linear.swiglu_linear, **settings),
        dispatch=partial(experts.dispatch, gather=wire.gather_payload, block_size=fp8_experts.BLOCK_ROWS),
        expert_ffn=partial(fp8_experts.dispatched_ffn, gradient_tile=gradient_tile),
        combine=partial(wire.sum_payload_rows, gradient_tile=gradient_tile),
    )


def _in_one_dtype(name: str, param_dtype: DType, compute_dtype: DType) -> Functions:
    return Functions(
        name,
        param_dtype,
        compute_dtype,
        project=partial(plain_linear.linear, dtype=compute_dtype),
        project_attended=partial(plain_linear.attention_linear, dtype=compute_dtype),
        project_swiglu=partial(plain_linear.swiglu_linear, dtype=compute_dtype),
        expert_ffn=experts.expert_ffn,
    )
