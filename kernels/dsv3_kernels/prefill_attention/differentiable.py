"""Attention with a gradient of its own, from a function for the results and one for the gradients."""

from collections.abc import Callable
from typing import Any

import jax

REVERSE_ONLY = "{op} has its first derivative in reverse mode only; take it with jax.grad or jax.vjp."


def differentiable(forward: Callable[..., Any], gradients: Callable[..., Any], arrays: tuple[Any, ...]) -> Any:
    """out, lse = forward(*arrays) where arrays are q, k, v, two segment ids (or None) and starts (or None).

    Inside `jax.shard_map` all of them vary over the same axes (`varying.varying_alike`). The backward pass calls
    gradients(*arrays, out, lse, d_out, d_lse) -> d_q, d_k, d_v, and nothing else is saved for it.

    Raises: TypeError in forward mode, which such a function does not have.
    """

    def forward_and_save(*arrays: Any) -> Any:
        out, lse = forward(*arrays)
        return (out, lse), (arrays, out, lse)

    def backward(saved: Any, cotangents: Any) -> Any:
        arrays, out, lse = saved
        return *gradients(*arrays, out, lse, *cotangents), None, None, None

    attend = jax.custom_vjp(lambda *arrays: forward(*arrays))
    attend.defvjp(forward_and_save, backward)
    try:
        return attend(*arrays)
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise TypeError(REVERSE_ONLY.format(op="mla_prefill")) from error
