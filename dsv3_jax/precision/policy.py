"""Which dtype each tensor of a forward pass has, and in which arithmetic its projections are multiplied."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from dsv3_jax.config.check import check
from dsv3_jax.precision import fp8_experts, fp8_linear, plain_linear, wire
from dsv3_jax.precision.gradient_tiles import Tile
from dsv3_jax.typing import Array, DType, Float

Projection = Callable[..., Array]
"""(x [..., A], w [A, Z], *, dtype) -> [..., Z]: one of `plain_linear`, or one of `fp8_linear`."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """Dtypes of parameters and of the arithmetic between them, and the functions that multiply.

    Whatever the policy, norms, softmax, router and loss reduce in float32, and the router's bias is float32.
    `routed_experts`: (x, params, weights, plan of 128-row blocks, *, dtype) in place of the model's own routed
    feed-forward; None keeps that, in the compute dtype.
    """

    name: str
    param_dtype: DType
    compute_dtype: DType
    project: Projection = plain_linear.linear
    project_swiglu: Projection = plain_linear.swiglu_linear
    project_attention: Projection = plain_linear.attention_linear
    routed_experts: Callable[..., Array] | None = None

    def linear(self, x: Float[Array, "... A"], w: Float[Array, "A Z"]) -> Float[Array, "... Z"]:
        """x·w: what every projection of the model goes through, but for those below."""
        return self.project(x, w, dtype=self.compute_dtype)

    def swiglu_linear(self, gate_up: Float[Array, "... F2"], w: Float[Array, "F Z"]) -> Float[Array, "... Z"]:
        """swiglu(gate_up)·w: the down projection of a feed-forward."""
        return self.project_swiglu(gate_up, w, dtype=self.compute_dtype)

    def attention_linear(self, x: Float[Array, "... A"], w: Float[Array, "A Z"]) -> Float[Array, "... Z"]:
        """x·w, where x is what attention put out."""
        return self.project_attention(x, w, dtype=self.compute_dtype)

    def plain_linear(self, x: Float[Array, "... A"], w: Float[Array, "A Z"]) -> Float[Array, "... Z"]:
        """x·w in the compute dtype under every policy: the projections that FP8 leaves out."""
        return plain_linear.linear(x, w, dtype=self.compute_dtype)


def make_fp8_policy(*, gradient_tile: Tile = (1, 128), name: str = "fp8_dsv3") -> Policy:
    """DeepSeek-V3's FP8 training: projections and experts in FP8, bfloat16 between them, float32 parameters.

    `gradient_tile`: rows and columns of an activation's gradient that share a scale. (128, 128) is what the report
    tried and gave up, because a model diverged (appendix B.2).
    """
    fp8 = functools.partial(functools.partial, gradient_tile=gradient_tile)
    return Policy(
        name,
        jnp.float32,
        jnp.bfloat16,
        project=fp8(fp8_linear.linear),
        project_swiglu=fp8(fp8_linear.swiglu_linear),
        project_attention=fp8(fp8_linear.attention_linear),
        routed_experts=fp8(_routed_experts),
    )


def _routed_experts(
    x: Array, params: Mapping[str, Array], weights: Array, plan: Any, *, dtype: DType, gradient_tile: Tile
) -> Array:
    """Σ_k weight · FFN_expert(x) for the pairs that `plan` laid out in blocks of 128 rows."""
    rows = wire.gather_payload(x.astype(dtype), plan)
    weights = weights.astype(jnp.float32).reshape(-1).at[plan.pair_of].get(mode="fill", fill_value=0)
    rows = fp8_experts.expert_ffn(
        rows, params["gate_up"], params["down"], weights, plan.block_expert, gradient_tile=gradient_tile
    )
    return wire.sum_payload_rows(rows, plan, gradient_tile=gradient_tile)


FLOAT32 = Policy("float32", jnp.float32, jnp.float32)
BFLOAT16 = Policy("bfloat16", jnp.bfloat16, jnp.bfloat16)
MIXED = Policy("mixed", jnp.float32, jnp.bfloat16)
FP8_DSV3 = make_fp8_policy()

_POLICIES = {policy.name: policy for policy in (FLOAT32, BFLOAT16, MIXED, FP8_DSV3)}


def get_policy(name: str) -> Policy:
    """The policy called `name`: float32, bfloat16, mixed (float32 parameters, bfloat16 arithmetic), or fp8_dsv3."""
    check(name in _POLICIES, f"precision={name!r} is unknown; use one of {', '.join(_POLICIES)} (RunConfig.precision).")
    return _POLICIES[name]


def policy_of(dtype: DType) -> Policy:
    """The policy that computes in the dtype the parameters already have."""
    return BFLOAT16 if jnp.dtype(dtype) == jnp.dtype(jnp.bfloat16) else FLOAT32
