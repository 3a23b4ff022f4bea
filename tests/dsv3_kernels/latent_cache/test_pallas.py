"""The Hopper kernel that writes the latent cache: in Pallas' interpreter, its divisions, and what it leaves to XLA."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv3_kernels import cache_write, dispatch
from dsv3_kernels.latent_cache.cases import CASES, UGLY, Case, make, shapes
from dsv3_kernels.latent_cache.fp8_rows import pack_fp8_cache_rows, split_fp8_cache_rows

if jax.__version_info__ < dispatch.OLDEST_PALLAS_JAX:
    pytest.skip(dispatch.why_no_pallas() or "", allow_module_level=True)

from dsv3_kernels.casts.pallas_rounding import to_e4m3
from dsv3_kernels.latent_cache import pallas_pack, pallas_sm90
from dsv3_kernels.scales import reciprocal_of


@pytest.mark.parametrize(
    "arguments",
    [
        ["one", "drawn", "page-ends", "from-float32"],
        ["one-fp8", "drawn-fp8", "page-ends-fp8", "page-ends-ue8m0"],
        pytest.param(["three", "three-fp8", "one-ue8m0"], marks=pytest.mark.slow),
        pytest.param(["long", "long-fp8", "long-ue8m0"], marks=pytest.mark.slow),
        pytest.param(["--races", "page-ends", "page-ends-fp8"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_kernel_writes_the_rows_of_the_loop(arguments, interpreted):
    """And nothing elsewhere, whatever the pool holds; fresh inputs each time, of those drawn fresh shapes."""
    _, *reports = map(json.loads, interpreted(*arguments).splitlines())
    assert [each["name"] for each in reports] == [name for name in arguments if name != "--races"]
    for report in reports:
        assert report["is_close"], report
        assert report["different_bytes"] <= report["most_different_bytes"], report
        assert not report["races"], report


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=lambda case: case.name)
def test_the_pool_is_operand_and_result_at_once(case: Case):
    """Also carried through a loop, as layers do; lowered for CUDA, which needs no GPU."""
    arguments = {name: jax.ShapeDtypeStruct(*each) for name, each in shapes(case, num_pages=1000).items()}
    write = partial(pallas_sm90.write, eps=1e-6, fp8_scale="float32")

    def layers(kv_pages, rest):
        return jax.lax.fori_loop(0, 3, lambda _, pages: write(pages, **rest), kv_pages)

    step = jax.jit(layers, donate_argnums=0)
    module = jax.export.export(step, platforms=["cuda"])(arguments.pop("kv_pages"), arguments).mlir_module()
    (call,) = [line for line in module.splitlines() if "@mosaic_gpu" in line]
    assert "output_operand_aliases = [#stablehlo.output_operand_alias<" in call
    assert "tf.aliasing_output = 0" in module


def test_quotients_round_as_exact_divisions_do():
    """All pairs of bfloat16 mantissas, with quotients from below the smallest value of E4M3 to its largest."""
    mantissas = np.arange(128, 256, dtype=np.float32) / 128
    x, scales = mantissas[:, None], mantissas[None, :]
    reciprocals = np.asarray(reciprocal_of(scales))
    assert reciprocals.shape == scales.shape
    for exponent in range(-12, 9):
        numbers = np.ldexp(x, exponent)
        exact = np.clip(numbers / scales, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        ours = np.asarray(to_e4m3(pallas_pack.quotients(jnp.asarray(numbers), jnp.asarray(reciprocals))))
        np.testing.assert_array_equal(ours.view(np.uint8), exact.view(np.uint8))
        products = np.asarray(to_e4m3(jnp.asarray(numbers * reciprocals)))
        if exponent == 0:
            assert (products.view(np.uint8) != exact.view(np.uint8)).any(), "a plain product would do as well"


def test_a_quotient_of_nan_stays_nan():
    payloads = np.array([0x7FFFFFFF, 0x7FC00000, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(pallas_pack.quotients(jnp.asarray(payloads), jnp.ones(3))).all()


@pytest.mark.parametrize("scale", ["float32", "ue8m0"])
def test_scales_are_those_of_the_packer(scale: str):
    """For every magnitude of bfloat16, infinity and NaN too."""
    amax = np.array([*range(0x7F81), 0x7FC0], np.uint16).view(ml_dtypes.bfloat16)
    latent = np.zeros((len(amax), 512), ml_dtypes.bfloat16)
    latent[:, ::128] = amax[:, None]
    rows = pack_fp8_cache_rows(latent, np.zeros((len(amax), 64), ml_dtypes.bfloat16), scale=scale)
    expected = np.asarray(split_fp8_cache_rows(rows)[1])[:, 0]
    ours = pallas_pack.tile_scales(jnp.asarray(amax).astype(jnp.float32), scale)
    np.testing.assert_array_equal(ours, expected)


def arguments_of(case: Case, dtype=jnp.bfloat16, **replaced) -> dict[str, jax.Array]:
    return {name: jnp.asarray(x) for name, x in ({**make(case, dtype), **replaced}).items()}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (arguments_of(UGLY[1]), "rows of 512 \\+ 64, not of 12 \\+ 4"),
        (arguments_of(UGLY[5], np.float32), "not float32 pages from float32"),
        (arguments_of(UGLY[3], np.float32), "not uint8 pages from float32"),
        (arguments_of(UGLY[5]._replace(T=0)), "has no rows"),
    ],
)
def test_what_the_kernel_refuses_is_left_to_xla(given, message: str):
    with pytest.raises(NotImplementedError, match=message):
        cache_write(**given, eps=1e-6, implementation="pallas")
