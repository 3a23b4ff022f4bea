"""A linear layer whose three matmuls are in FP8 (report section 3.3.2, figure 6).

forward          y = x·w      x in tiles of 1x128 (a token, 128 features), w in blocks of 128x128
input gradient   dx = dy·wᵀ   dy in tiles of 1x128, w in the same blocks
weight gradient  dw = xᵀ·dy   both in tiles of 128 tokens of one feature, float32 out

A weight is rounded to the dtype of activations before it is quantised, so that devices which gather it in that dtype
quantise the same. Scales are computed from the tensor itself (online). Of the activations the backward pass has x in
FP8, nothing else; it dequantises, transposes and quantises that again. A non-finite element of a token stays in its
tile: its row of y, or of dx, is lost and no other; of dw its feature's row is lost and at most the 127 others of that
tile of x, or the column of its feature of dy.
"""

import functools

import jax
import jax.numpy as jnp

from dsv3_jax.precision import e5m6
from dsv3_jax.precision.gradient_tiles import Tile, gradient_columns, gradient_rows
from dsv3_jax.precision.residuals import from_bytes, named, to_bytes
from dsv3_jax.typing import Array, DType, Float
from dsv3_kernels import QTensor, cast_blocks, cast_tokens, fp8_gemm, requantize_transposed, swiglu_cast
from dsv3_kernels.quantize import dequantize_tiles
from dsv3_kernels.routed_experts.reference import swiglu
from dsv3_kernels.varying import varying_alike


def linear(
    x: Float[Array, "... A"], w: Float[Array, "A Z"], *, dtype: DType, gradient_tile: Tile = (1, 128)
) -> Float[Array, "... Z"]:
    """x·w in `dtype`, multiplied in FP8 in all three directions."""
    rows, w = varying_alike(x.astype(dtype).reshape(-1, x.shape[-1]), w)
    return _linear(rows, w, gradient_tile).reshape(*x.shape[:-1], -1)


def swiglu_linear(
    gate_up: Float[Array, "... F2"], w: Float[Array, "F Z"], *, dtype: DType, gradient_tile: Tile = (1, 128)
) -> Float[Array, "... Z"]:
    """swiglu(gate_up)·w; gate and up are saved in FP8, what is made of them is recomputed (report section 3.3.3)."""
    rows, w = varying_alike(gate_up.astype(dtype).reshape(-1, gate_up.shape[-1]), w)
    return _swiglu_linear(rows, w, gradient_tile).reshape(*gate_up.shape[:-1], -1)


def attention_linear(
    x: Float[Array, "... A"], w: Float[Array, "A Z"], *, dtype: DType, gradient_tile: Tile = (1, 128)
) -> Float[Array, "... Z"]:
    """x·w, where x is what attention put out: saved in E5M6, all its scales powers of two (report section 3.3.3)."""
    rows, w = varying_alike(x.astype(dtype).reshape(-1, x.shape[-1]), w)
    return _attention_linear(rows, w, gradient_tile).reshape(*x.shape[:-1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x, w, gradient_tile):
    return _linear_forward(x, w, gradient_tile)[0]


def _linear_forward(x, w, gradient_tile):
    q = cast_tokens(x)
    return _product(q, w, x.dtype), (to_bytes(q), w)


def _linear_backward(gradient_tile, residuals, dy):
    saved, w = residuals
    dw = _weight_gradient(requantize_transposed(from_bytes(saved)), dy, gradient_tile)
    return _input_gradient(dy, w, gradient_tile), dw.astype(w.dtype)


_linear.defvjp(_linear_forward, _linear_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _swiglu_linear(gate_up, w, gradient_tile):
    return _swiglu_forward(gate_up, w, gradient_tile)[0]


def _swiglu_forward(gate_up, w, gradient_tile):
    saved = named(to_bytes(cast_tokens(gate_up)), "ffn_gate_up")
    return _product(swiglu_cast(gate_up), w, gate_up.dtype), (saved, w)


def _swiglu_backward(gradient_tile, residuals, dy):
    saved, w = residuals
    hidden, d_hidden = jax.vjp(swiglu, dequantize_tiles(from_bytes(saved), tile=(1, 128)))
    d_gate_up = d_hidden(_input_gradient(dy, w, gradient_tile).astype(jnp.float32))[0]
    dw = _weight_gradient(cast_tokens(hidden.T), dy, gradient_tile)
    return d_gate_up.astype(dy.dtype), dw.astype(w.dtype)


_swiglu_linear.defvjp(_swiglu_forward, _swiglu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attention_linear(x, w, gradient_tile):
    return _attention_forward(x, w, gradient_tile)[0]


def _attention_forward(x, w, gradient_tile):
    saved = named(e5m6.quantize(x), "mla_attended")
    return _product(cast_tokens(x, scale="ue8m0"), w, x.dtype), (saved, w)


def _attention_backward(gradient_tile, residuals, dy):
    saved, w = residuals
    x = e5m6.dequantize(saved, num_columns=w.shape[0])
    dw = _weight_gradient(cast_tokens(x.T, scale="ue8m0"), dy, gradient_tile)
    return _input_gradient(dy, w, gradient_tile), dw.astype(w.dtype)


_attention_linear.defvjp(_attention_forward, _attention_backward)


def _product(x: QTensor, w: Float[Array, "A Z"], dtype: DType) -> Float[Array, "M Z"]:
    return fp8_gemm(x, cast_blocks(w.astype(dtype).T), out_dtype=dtype)


def _input_gradient(dy: Float[Array, "M Z"], w: Float[Array, "A Z"], tile: Tile) -> Float[Array, "M A"]:
    return fp8_gemm(gradient_rows(dy, tile=tile), cast_blocks(w.astype(dy.dtype)), out_dtype=dy.dtype)


def _weight_gradient(x_columns: QTensor, dy: Float[Array, "M Z"], tile: Tile) -> Float[Array, "A Z"]:
    return fp8_gemm(x_columns, gradient_columns(dy, tile=tile), out_dtype=jnp.float32)
