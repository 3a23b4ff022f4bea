"""The 656-byte row against FlashMLA's own bytes, and its two implementations against each other."""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv3_kernels.latent_cache.fp8_rows import pack_fp8_cache_rows, split_fp8_cache_rows, unpack_fp8_cache_rows

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "fp8_gate.npz")
KV = GOLDEN["kv_bf16"].view(ml_dtypes.bfloat16)
NAMES = {"float32": "kv656_f32scale", "ue8m0": "kv656_ue8m0scale"}


@pytest.mark.parametrize("form", ["numpy", "jax", "jit"])
@pytest.mark.parametrize("scale", NAMES)
def test_bytes_are_flashmlas(scale, form):
    convert = np.asarray if form == "numpy" else jnp.asarray
    pack = jax.jit(pack_fp8_cache_rows, static_argnames="scale") if form == "jit" else pack_fp8_cache_rows
    rows = pack(convert(KV[..., :512]), convert(KV[..., 512:]), scale=scale)
    np.testing.assert_array_equal(np.asarray(rows), GOLDEN[f"{NAMES[scale]}/bytes"])


@pytest.mark.parametrize("form", ["numpy", "jax", "jit"])
@pytest.mark.parametrize("scale", NAMES)
def test_unpacked_values_are_flashmlas(scale, form):
    rows = GOLDEN[f"{NAMES[scale]}/bytes"]
    unpack = jax.jit(unpack_fp8_cache_rows) if form == "jit" else unpack_fp8_cache_rows
    parts = unpack(rows if form == "numpy" else jnp.asarray(rows))
    values = np.concatenate([np.asarray(part) for part in parts], axis=-1)
    np.testing.assert_array_equal(values.view(np.uint16), GOLDEN[f"{NAMES[scale]}/deq_bf16"])


@pytest.mark.parametrize("scale", NAMES)
def test_zeros_have_a_scale(scale):
    zeros = np.zeros((3, 512), ml_dtypes.bfloat16)
    rows = pack_fp8_cache_rows(zeros, zeros[:, :64], scale=scale)
    _, scales, _ = split_fp8_cache_rows(rows)
    assert (scales > 0).all()
    assert not np.asarray(unpack_fp8_cache_rows(rows)[0], np.float32).any()


@pytest.mark.parametrize("scale", NAMES)
def test_error_is_half_a_step_of_e4m3(scale):
    x = np.random.default_rng(5).standard_normal((7, 512), np.float32)
    rows = pack_fp8_cache_rows(x, x[:, :64], scale=scale)
    _, scales, _ = split_fp8_cache_rows(rows)
    latent = np.asarray(unpack_fp8_cache_rows(rows)[0], np.float32)
    step = np.repeat(scales, 128, axis=-1) * 2.0**-9  # of the subnormals
    # 2^-4 is half a step of three mantissa bits, 2^-8 the rounding to BF16.
    np.testing.assert_array_less(np.abs(latent - x), np.abs(x) * (2.0**-4 + 2.0**-8) + step)


@pytest.mark.parametrize("scale", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_number_spoils_its_tile_alone(scale, bad):
    x = np.ones((2, 512), np.float32)
    x[1, 200] = bad
    for convert in (np.asarray, jnp.asarray):
        latent = np.asarray(unpack_fp8_cache_rows(pack_fp8_cache_rows(convert(x), convert(x[:, :64]), scale=scale))[0])
        is_bad = ~np.isfinite(np.float32(latent))
        assert is_bad[1, 200]
        assert is_bad.sum() == is_bad[1, 128:256].sum()


def test_unknown_scale_is_refused():
    x = np.zeros((1, 512), np.float32)
    with pytest.raises(ValueError, match="ue4m3"):
        pack_fp8_cache_rows(x, x[:, :64], scale="ue4m3")
