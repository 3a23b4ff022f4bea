"""SwiGLU feed-forward, used by dense layers and by the shared experts."""

from dsv3_jax.precision.policy import Policy
from dsv3_jax.typing import Array, Float, Params


def mlp(params: Params, x: Float[Array, "... D"], *, policy: Policy) -> Float[Array, "... D"]:
    """W_down·(silu(W_gate·x) · W_up·x); gate and up are one multiplication."""
    gate_up = params["gate_up"]
    return policy.swiglu_linear(policy.linear(x, gate_up.reshape(gate_up.shape[0], -1)), params["down"])
