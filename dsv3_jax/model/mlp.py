"""SwiGLU feed-forward, used by dense layers and by the shared experts."""

import flax.linen as nn
import jax.numpy as jnp

from dsv3_jax.precision.policy import Policy
from dsv3_jax.typing import Array, Float, Params


def mlp(params: Params, x: Float[Array, "... D"], *, policy: Policy) -> Float[Array, "... D"]:
    """W_down·(silu(W_gate·x) · W_up·x); gate and up are one multiplication."""
    gate_up = params["gate_up"]
    return policy.swiglu_linear(policy.linear(x, gate_up.reshape(gate_up.shape[0], -1)), params["down"])


class MLP(nn.Module):
    """Declares a feed-forward of width `ffn_dim`."""

    dim: int
    ffn_dim: int
    init_std: float

    @nn.compact
    def weights(self) -> dict:
        normal = nn.initializers.normal(self.init_std)
        return {
            "gate_up": self.param(
                "gate_up",
                nn.with_partitioning(normal, ("embed", None, "ffn")),
                (self.dim, 2, self.ffn_dim),
                jnp.float32,
            ),
            "down": self.param(
                "down", nn.with_partitioning(normal, ("ffn", "embed")), (self.ffn_dim, self.dim), jnp.float32
            ),
        }

    def __call__(self, x: Float[Array, "... D"], *, policy: Policy) -> Float[Array, "... D"]:
        return mlp(self.weights(), x, policy=policy)
