"""Casts to E4M3 in tiles that share one scale, fused with the step before (report sections 3.3 and 3.5.2).

Activations are cast in tiles of 1x128, weights in blocks of 128x128; Wgrad takes tiles of 1x128 along the tokens, for
which the stored activation is dequantised, transposed and cast again. All implementations give the bits of
`quantize_tiles`, but for the exponential function of `swiglu_cast` and the sign of a NaN, which are the backend's.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dsv3_kernels import dispatch
from dsv3_kernels.casts import limits, reference
from dsv3_kernels.quantize import E4M3, QTensor

FLOATS = (jnp.bfloat16, jnp.float32)


def cast_tokens(
    x: Float[Array | np.ndarray, "*batch M K"],
    *,
    scale: str = "float32",
    num_sms: int | None = None,
    implementation: str | None = None,
) -> QTensor:
    """Casts each token in tiles of 128 channels.

    Args:
        x: bfloat16 or float32.
        scale: "float32", or "ue8m0" for scales that are powers of two.
        num_sms: multiprocessors that the kernel may use, to leave others to communication; None for all.
        implementation: None for the best that can run, else "reference", "xla" or "pallas".
    Returns: values [..., M, K], scales [..., M, ceil(K / 128)]. A NaN or infinity makes one tile's scale non-finite.
    Raises:
        ValueError: another dtype, fewer than two axes, an unknown `scale` or `implementation`.
        NotImplementedError: "pallas" where it cannot run, or for shapes it does not take: K must be a multiple of 128,
            and M K / 128 of 8.
    """
    _check_floats("cast_tokens", "x", x)
    _check_scale(scale)
    return dispatch.run(TOKENS, implementation, jnp.asarray(x), num_sms=num_sms, scale=scale)


def swiglu_cast(
    gate_up: Float[Array | np.ndarray, "*batch M F2"],
    *,
    scale: str = "float32",
    num_sms: int | None = None,
    implementation: str | None = None,
) -> QTensor:
    """Casts silu(gate) * up, computed in float32, in tiles of 128 channels: the input of a down projection.

    Args:
        gate_up: bfloat16 or float32 [..., M, 2 F], the gate before the up projection.
        scale, num_sms, implementation: as in `cast_tokens`.
    Returns: values [..., M, F], scales [..., M, ceil(F / 128)].
    Raises: as `cast_tokens`, and ValueError for an odd last axis.
    """
    _check_floats("swiglu_cast", "gate_up", gate_up)
    if gate_up.shape[-1] % 2:
        raise ValueError(
            f"gate_up {gate_up.shape} of swiglu_cast has an odd last axis; it must be gate and up side by side, 2 F."
        )
    _check_scale(scale)
    return dispatch.run(SWIGLU, implementation, jnp.asarray(gate_up), num_sms=num_sms, scale=scale)


def requantize_transposed(
    q: QTensor, *, scale: str = "float32", num_sms: int | None = None, implementation: str | None = None
) -> QTensor:
    """Quantises again: from tiles of 1x128 along the channels to tiles of 1x128 along the tokens, of the transpose.

    With scales that are powers of two, before and after, a value changes only where it is below 2^-6 of its new scale,
    among the subnormal numbers of E4M3, and then by 2^-10 of the scale at most. With float32 scales every value is
    rounded a second time.

    Args:
        q: E4M3 values [M, K] with float32 scales [M, ceil(K / 128)], as of `cast_tokens`.
        scale, num_sms, implementation: as in `cast_tokens`; `scale` is that of the result.
    Returns: values [K, M], scales [K, ceil(M / 128)].
    Raises: ValueError for values that are no E4M3 matrix or scales that are not one a tile; else as `cast_tokens`.
    """
    if q.values.ndim != 2 or q.values.dtype != E4M3:
        raise ValueError(
            f"q.values of requantize_transposed is {q.values.dtype}{list(q.values.shape)}; it must be a float8_e4m3fn "
            "matrix [M, K] (vmap over a batch)."
        )
    M, K = q.values.shape
    if q.scales.shape != (M, -(-K // 128)) or q.scales.dtype != jnp.float32:
        raise ValueError(
            f"q.scales of requantize_transposed is {q.scales.dtype}{list(q.scales.shape)}; values [{M}, {K}] in tiles "
            f"of 1x128 have float32[{M}, {-(-K // 128)}], as cast_tokens makes them."
        )
    _check_scale(scale)
    return dispatch.run(TRANSPOSED, implementation, jax.tree.map(jnp.asarray, q), num_sms=num_sms, scale=scale)


def cast_blocks(
    w: Float[Array | np.ndarray, "*batch N K"],
    *,
    scale: str = "float32",
    num_sms: int | None = None,
    implementation: str | None = None,
) -> QTensor:
    """Casts a weight in blocks of 128x128.

    Args:
        w: bfloat16 or float32.
        scale, num_sms, implementation: as in `cast_tokens`.
    Returns: values [..., N, K], scales [..., ceil(N / 128), ceil(K / 128)].
    Raises: as `cast_tokens`.
    """
    _check_floats("cast_blocks", "w", w)
    _check_scale(scale)
    return dispatch.run(BLOCKS, implementation, jnp.asarray(w), num_sms=num_sms, scale=scale)


def _op(name: str, refuses: Callable[..., str | None], axes: str) -> dispatch.Op:
    """XLA fuses the reference as it stands, so that both names mean one implementation."""
    plain = getattr(reference, name)
    return dispatch.Op(
        name, reference=plain, xla=plain, kernel=functools.partial(_pallas, name), refuses=refuses, axes=axes
    )


def _pallas(name: str, *args, **kwargs) -> QTensor:
    """Loads Pallas when it is needed: older jax lacks what the kernels use."""
    from dsv3_kernels.casts import pallas_sm90, pallas_sm90_transpose

    module = pallas_sm90_transpose if name == "requantize_transposed" else pallas_sm90
    return getattr(module, name)(*args, **kwargs)


TOKENS = _op("cast_tokens", limits.of_tokens, "...k -> ...k ...k")
SWIGLU = _op("swiglu_cast", limits.of_swiglu, "...x -> ...f ...f")
TRANSPOSED = _op("requantize_transposed", limits.of_transposed, "mk mk -> km km")
BLOCKS = _op("cast_blocks", limits.of_blocks, "...nk -> ...nk ...nk")


def _check_floats(op: str, name: str, x: Array | np.ndarray) -> None:
    if x.ndim < 2 or x.dtype not in FLOATS:
        raise ValueError(
            f"{name} of {op} is {x.dtype}{list(x.shape)}; it must be bfloat16 or float32 with two axes or more "
            "(for one token, x[None])."
        )


def _check_scale(scale: str) -> None:
    if scale not in ("float32", "ue8m0"):
        raise ValueError(f"scale={scale!r} is unknown; use 'float32' or 'ue8m0'.")
