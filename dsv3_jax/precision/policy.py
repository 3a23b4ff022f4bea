"""Which dtype each tensor of a forward pass has."""

import dataclasses

import jax
import jax.numpy as jnp

from dsv3_jax.config.check import check
from dsv3_jax.typing import Array, DType, Float


@dataclasses.dataclass(frozen=True)
class Policy:
    """Dtypes of parameters and of the arithmetic between them.

    Whatever the policy, norms, softmax, router and loss reduce in float32, and the router's bias is float32.
    """

    name: str
    param_dtype: DType
    compute_dtype: DType

    def linear(self, x: Float[Array, "... A"], w: Float[Array, "A Z"]) -> Float[Array, "... Z"]:
        """x·w in the compute dtype; the one multiplication that every projection of the model goes through."""
        return jax.lax.dot_general(
            x.astype(self.compute_dtype), w.astype(self.compute_dtype), (((x.ndim - 1,), (0,)), ((), ()))
        )


FLOAT32 = Policy("float32", jnp.float32, jnp.float32)
BFLOAT16 = Policy("bfloat16", jnp.bfloat16, jnp.bfloat16)
MIXED = Policy("mixed", jnp.float32, jnp.bfloat16)

_POLICIES = {policy.name: policy for policy in (FLOAT32, BFLOAT16, MIXED)}


def get_policy(name: str) -> Policy:
    """The policy called `name`: float32, bfloat16, or mixed (float32 parameters, bfloat16 arithmetic)."""
    check(name in _POLICIES, f"precision={name!r} is unknown; use one of {', '.join(_POLICIES)} (RunConfig.precision).")
    return _POLICIES[name]


def policy_of(dtype: DType) -> Policy:
    """The policy that computes in the dtype the parameters already have."""
    return BFLOAT16 if jnp.dtype(dtype) == jnp.dtype(jnp.bfloat16) else FLOAT32
