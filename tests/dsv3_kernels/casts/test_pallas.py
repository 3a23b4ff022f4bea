"""The Hopper casts in Pallas' interpreter, and the shapes they leave to XLA."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import pytest

import dsv3_kernels
from dsv3_kernels import dispatch
from dsv3_kernels.quantize import QTensor
from tests.dsv3_kernels.grids import grids

if jax.__version_info__ < dispatch.OLDEST_PALLAS_JAX:
    pytest.skip(dispatch.why_no_pallas() or "", allow_module_level=True)

FAST = [
    ("cast_tokens", "bfloat16", "float32", "0"),
    ("swiglu_cast", "bfloat16", "ue8m0", "0"),
    ("cast_blocks", "float32", "float32", "0"),
    ("requantize_transposed", "float32", "ue8m0", "0"),
    ("cast_tokens", "float32", "ue8m0", "2"),
    ("swiglu_cast", "float32", "float32", "2"),
    ("cast_blocks", "bfloat16", "ue8m0", "2"),
    ("requantize_transposed", "bfloat16", "float32", "2"),
]
OPS = ("cast_tokens", "swiglu_cast", "cast_blocks", "requantize_transposed")
ALL = [(op, dtype, scale, "0") for op in OPS for dtype in ("bfloat16", "float32") for scale in ("float32", "ue8m0")]
SLOW = [each for each in ALL if each not in FAST]


@pytest.mark.parametrize("which", [FAST, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["one each", "the rest"])
def test_kernels_have_the_bits_of_the_reference(which, interpreted):
    """Both divide with integers; exp is XLA's in the interpreter."""
    _, *reports = map(json.loads, interpreted(*(",".join(each) for each in zip(*which))).splitlines())
    assert [(each["op"], each["dtype"], each["scale"], str(each["sms"] or 0)) for each in reports] == which
    for report in reports:
        assert report["wrong_bytes"] == {"values": 0, "scales": 0}, report
        assert not report["races"], report


@pytest.mark.parametrize("op", OPS)
def test_a_kernel_starts_no_more_blocks_than_it_may_use_multiprocessors(op):
    """Five tiles or six, one a block where all multiprocessors are there."""
    shape = {"cast_tokens": (40, 1024), "swiglu_cast": (6, 2048)}.get(op, (256, 384))
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    if op == "requantize_transposed":
        scales = jax.ShapeDtypeStruct((256, 3), jnp.float32)
        x = QTensor(jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn), scales)

    def blocks(num_sms: int | None) -> int:
        cast = functools.partial(getattr(dsv3_kernels, op), num_sms=num_sms)
        [grid] = grids(jax.jit(cast).trace(x).lower(lowering_platforms=("cuda",)))
        return math.prod(grid)

    tiles = blocks(None)
    assert tiles == (5 if op == "cast_tokens" else 6)
    assert (blocks(2), blocks(100)) == (2, tiles)


def test_what_the_kernels_refuse_is_left_to_xla():
    for op, shape in (
        ("cast_tokens", (5, 1025)),
        ("cast_tokens", (1, 128)),
        ("cast_tokens", (0, 1024)),
        ("swiglu_cast", (5, 1024)),
        ("swiglu_cast", (0, 2048)),
        ("cast_blocks", (97, 128)),
        ("cast_blocks", (0, 128)),
    ):
        with pytest.raises(NotImplementedError, match="multiples of"):
            getattr(dsv3_kernels, op)(jnp.zeros(shape), implementation="pallas")
    for rows, columns in ((97, 128), (128, 130), (0, 128)):
        q = QTensor(jnp.zeros((rows, columns), jnp.float8_e4m3fn), jnp.zeros((rows, -(-columns // 128))))
        with pytest.raises(NotImplementedError, match="multiples of 128"):
            dsv3_kernels.requantize_transposed(q, implementation="pallas")
