"""The dense shapes that DeepSeek-V3 multiplies, and ugly ones; shared by tests, compilation and benches.

N x K of the forward pass: 2112 x 7168 makes the latents of queries and keys at once (1536 + 576), 576 x 7168 those of
keys alone, 24576 x 1536 the queries, 32768 x 512 keys and values, 7168 x 16384 the output of attention, 4096 x 7168
gate and up of an expert, 7168 x 2048 its down. The lists are those DeepGEMM is tested with.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dsv3_kernels.quantize import QTensor, quantize_tiles

FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = "forward", "input gradient", "weight gradient"

_LATENTS, _KV_LATENT = ("latents of q and kv", 2112, 7168), ("latent of kv", 576, 7168)
_LAYERS = (
    ("queries", 24576, 1536),
    ("keys and values", 32768, 512),
    ("output of attention", 7168, 16384),
    ("expert gate and up", 4096, 7168),
    ("expert down", 7168, 2048),
)


class GemmCase(NamedTuple):
    """out [m, n] = a [m, k] · b [n, k]ᵀ, and what it is in the model."""

    name: str
    m: int
    n: int
    k: int
    layer: str
    role: str = FORWARD
    accumulates: bool = False
    is_small: bool = False
    """Whether a test on a CPU can afford it."""

    @property
    def b_tile(self) -> tuple[int, int]:
        """Weights share a scale in 128x128, the operand of a weight gradient in 1x128."""
        return (1, 128) if self.role == WEIGHT_GRADIENT else (128, 128)

    @property
    def out_dtype(self) -> jax.typing.DTypeLike:
        """Weight gradients stay float32."""
        return jnp.float32 if self.role == WEIGHT_GRADIENT else jnp.bfloat16


class GemmInputs(NamedTuple):
    """Fresh operands of a case, and the bfloat16 values that they were quantised from."""

    a: QTensor
    b: QTensor
    accumulate_into: Array | None
    exact_a: Array
    exact_b: Array


def _case(m: int, n: int, k: int, layer: str, role: str = FORWARD) -> GemmCase:
    prefix = "" if role == FORWARD else role.replace(" ", "_") + "_"
    return GemmCase(f"{prefix}m{m}_n{n}_k{k}", m, n, k, layer, role)


def _forward(m: int, layer: tuple[str, int, int]) -> GemmCase:
    what, n, k = layer
    return _case(m, n, k, what)


def _gradients(m: int, layer: tuple[str, int, int]) -> list[GemmCase]:
    """dX [m, k] = dY [m, n] · W [n, k] contracts n; dW [n, k] = dYᵀ · X contracts m."""
    what, n, k = layer
    weight = _case(n, k, m, what, WEIGHT_GRADIENT)
    return [
        _case(m, k, n, what, INPUT_GRADIENT),
        weight,
        weight._replace(name=f"{weight.name}_added", accumulates=True),
    ]


HEADLINE = tuple(_forward(m, layer) for m in (64, 128, 4096) for layer in (_LATENTS, *_LAYERS))
"""The shapes of DeepGEMM's published table."""

FORWARD_CASES = (
    *(_forward(1, layer) for layer in (_LATENTS, _KV_LATENT, *_LAYERS)),
    *(_forward(m, _KV_LATENT) for m in (128, 4096)),
    _case(4096, 7168, 576, "shape of the input gradient of the latent of kv"),
)
GRADIENT_CASES = (
    *(case for layer in (_LATENTS, _KV_LATENT, *_LAYERS) for case in _gradients(4096, layer)),
    *(_case(k, n, m, what, WEIGHT_GRADIENT) for m in (4096, 8192) for what, n, k in (_LATENTS, *_LAYERS)),
)
UGLY_CASES = (
    GemmCase("one_row", 1, 256, 256, "one token", is_small=True),
    GemmCase("one_column", 97, 1, 128, "one output", is_small=True),
    GemmCase("one_block", 128, 128, 128, "one tile", is_small=True),
    GemmCase("odd_rows", 97, 200, 384, "ragged M and N", is_small=True),
    GemmCase("many_odd_rows", 1025, 136, 256, "one row past the last tile", is_small=True),
    GemmCase("odd_contraction", 65, 192, 200, "ragged K", is_small=True),
    GemmCase("short_contraction", 33, 64, 1, "K below a block", is_small=True),
    GemmCase("no_rows", 0, 128, 256, "an empty batch", is_small=True),
    GemmCase("odd_weight_gradient", 97, 130, 640, "ragged M and N", WEIGHT_GRADIENT, is_small=True),
    GemmCase("odd_weight_gradient_added", 97, 130, 640, "ragged M and N", WEIGHT_GRADIENT, True, is_small=True),
    GemmCase("odd_tokens", 130, 97, 1025, "a batch of 1025", WEIGHT_GRADIENT, True, is_small=True),
)
CASES = (*HEADLINE, *FORWARD_CASES, *GRADIENT_CASES, *UGLY_CASES)


def make_inputs(case: GemmCase, key: Array, *, scale: str = "float32") -> GemmInputs:
    """Standard normal operands in bfloat16, quantised with `scale` ("float32" or "ue8m0")."""
    key_a, key_b, key_sum = jax.random.split(key, 3)
    exact_a, exact_b = normal(key_a, (case.m, case.k)), normal(key_b, (case.n, case.k))
    sums = jax.random.normal(key_sum, (case.m, case.n), jnp.float32) if case.accumulates else None
    a = quantize_tiles(exact_a, tile=(1, 128), scale=scale)
    return GemmInputs(a, quantize_tiles(exact_b, tile=case.b_tile, scale=scale), sums, exact_a, exact_b)


def normal(key: Array, shape: tuple[int, ...]) -> Array:
    """Standard normal values, drawn in float32 and rounded to bfloat16."""
    return jax.random.normal(key, shape, jnp.float32).astype(jnp.bfloat16)
