"""Which implementation a program holds is decided for the platform it is lowered for, and it has no silent gradient."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv3_kernels as K
from dsv3_kernels import dispatch, target
from dsv3_kernels.decode_attention.cases import DecodeCase
from dsv3_kernels.sm90.shapes import integers, operand

P = jax.sharding.PartitionSpec
needs_pallas = pytest.mark.skipif(
    jax.__version_info__ < dispatch.OLDEST_PALLAS_JAX, reason="jax older than the kernels need"
)


def array(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def blocks(size: int) -> jax.ShapeDtypeStruct:
    return array(size, 256)


OPS = {
    "cast_tokens": (K.cast_tokens, (blocks(128),)),
    "swiglu_cast": (K.swiglu_cast, (array(8, 2048),)),
    "cast_blocks": (K.cast_blocks, (blocks(128),)),
    "requantize_transposed": (K.requantize_transposed, (operand((128, 256), 1),)),
    "fp8_gemm": (K.fp8_gemm, (operand((128, 256), 1), operand((128, 256), 128))),
    "grouped_fp8_gemm": (K.grouped_fp8_gemm, (operand((128, 256), 1), operand((2, 128, 256), 128), integers(1))),
    "grouped_fp8_gemm_masked": (
        K.grouped_fp8_gemm_masked,
        (operand((2, 64, 256), 1), operand((2, 128, 256), 128), integers(2)),
    ),
    "grouped_fp8_gemm_k": (
        functools.partial(K.grouped_fp8_gemm_k, num_groups=2),
        (operand((128, 256), 1), operand((128, 256), 1), integers(2)),
    ),
    "grouped_matmul": (K.grouped_matmul, (blocks(128), array(2, 256, 128), integers(2))),
    "grouped_matmul_k": (
        functools.partial(K.grouped_matmul_k, num_groups=2), (blocks(128), array(128, 64), integers(2)),
    ),
    "mla_decode": (functools.partial(K.mla_decode, softmax_scale=0.1), DecodeCase(2, 1, 64, 128).shapes()),
    "mla_prefill": (
        functools.partial(K.mla_prefill, softmax_scale=0.1),
        (array(1, 128, 1, 192), array(1, 128, 1, 192), array(1, 128, 1, 128)),
    ),
    "cache_write": (
        functools.partial(K.cache_write, eps=1e-6),
        (
            array(2, 64, 576), array(1, 1, 576), array(512), *[array(1, 1, 32, dtype=jnp.float32)] * 2,
            array(1, 2, dtype=jnp.int32), *[integers(1)] * 2,
        ),
    ),
}  # fmt: skip
FP8_OPS = [name for name in OPS if "cast" in name or "fp8" in name or "requantize" in name]


@needs_pallas
@pytest.mark.parametrize("name", OPS)
def test_an_exported_program_holds_the_kernel_for_cuda_only(name: str) -> None:
    function, args = OPS[name]
    both = jax.export.export(jax.jit(function), platforms=["cpu", "cuda"])(*args).mlir_module()
    assert "mosaic_gpu" in both
    assert "stablehlo.case" in both
    assert "mosaic_gpu" not in jax.jit(function).trace(*args).lower(lowering_platforms=("cpu",)).as_text()


@needs_pallas
def test_a_named_kernel_means_the_target() -> None:
    function, args = OPS["fp8_gemm"]
    named = jax.jit(functools.partial(function, implementation="pallas"))
    assert "mosaic_gpu" in named.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    message = r'fp8_gemm\(implementation="pallas"\) needs a Hopper GPU.*compiled for cpu; leave it None'
    with pytest.raises(NotImplementedError, match=message):
        named.trace(*args).lower(lowering_platforms=("cpu",))


class OtherGpu:
    """What jax reports of a GPU."""

    platform, device_kind, core_count = "gpu", "NVIDIA B200", 148

    def __init__(self, capability: str, version: str = "cuda 13000"):
        self.compute_capability = capability
        self.client = type("Client", (), {"platform_version": f"PJRT C API\n{version}"})


@needs_pallas
def test_a_process_with_another_gpu_never_gets_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "gpu", lambda: OtherGpu("10.0"))
    function, args = OPS["cast_tokens"]
    assert (
        "mosaic_gpu" not in jax.jit(lambda *x: function(*x)).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    )
    named = jax.jit(functools.partial(function, implementation="pallas"))
    with pytest.raises(NotImplementedError, match=r"compute capability 9.0\), NVIDIA B200 has 10.0; leave it None"):
        named.trace(*args).lower(lowering_platforms=("cuda",))


@needs_pallas
@pytest.mark.parametrize(("version", "is_refused"), [(12060, False), (12080, True), (12090, True), (13000, False)])
def test_versions_of_cuda_that_miscompile_causal_masks_are_refused(monkeypatch, version: int, is_refused: bool) -> None:
    monkeypatch.setattr(target, "gpu", lambda: OtherGpu("9.0", f"cuda {version}"))
    assert (target.why_no_kernels(has_causal_mask=True) is not None) == is_refused
    assert target.why_no_kernels() is None
    function, args = OPS["mla_prefill"]
    text = jax.jit(lambda *x: function(*x)).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert ("mosaic_gpu" in text) != is_refused


def test_the_gpu_of_the_process_tells_its_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert target.num_sms(7) == 7
    monkeypatch.setattr(target, "gpu", lambda: None)
    assert target.num_sms() == 132
    monkeypatch.setattr(target, "gpu", lambda: OtherGpu("9.0"))
    assert target.num_sms() == 148


def zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(shape.shape, shape.dtype)


@pytest.mark.parametrize("name", FP8_OPS)
def test_no_gradient_passes_through_rounding(name: str) -> None:
    function, args = OPS[name]
    arrays = jax.tree.map(zeros, args)
    tangents = jax.tree.map(
        lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else np.zeros(x.shape, jax.dtypes.float0), arrays
    )
    with pytest.raises(TypeError, match=rf"{name} cannot be differentiated.*dsv3_jax\.precision"):
        jax.jvp(function, tuple(arrays), tuple(tangents))


@pytest.mark.parametrize("implementation", [None, "reference", "xla"])
def test_no_implementation_of_decoding_has_a_gradient(implementation: str | None) -> None:
    q, rope, *rest = jax.tree.map(zeros, DecodeCase(1, 1, 64, 64).shapes())

    def loss(q: jax.Array) -> jax.Array:
        return K.mla_decode(q, rope, *rest, softmax_scale=0.1, implementation=implementation)[0].sum()

    with pytest.raises(TypeError, match=r"mla_decode cannot be differentiated.*mla_prefill.*dsv3_jax\.precision"):
        jax.jit(jax.grad(loss))(q)


def test_quantising_by_hand_has_no_silent_gradient_either() -> None:
    x = jnp.ones((128, 128))
    for rounding in (
        lambda x: K.quantize_tiles(x, tile=(1, 128)).scales,
        lambda x: K.pack_fp8_cache_rows(jnp.tile(x[:1], 4), x[:1, :64]).astype(jnp.float32),
    ):
        with pytest.raises(TypeError, match=r"cannot be differentiated.*dsv3_jax\.precision"):
            jax.grad(lambda x, rounding=rounding: rounding(x).sum())(x)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_prefill_has_reverse_mode_only(wrap) -> None:
    q, v = jnp.ones((1, 4, 1, 8)), jnp.ones((1, 4, 1, 4))
    attend = wrap(lambda q: K.mla_prefill(q, q, v, softmax_scale=0.1)[0])
    assert jax.grad(lambda q: attend(q).sum())(q).shape == q.shape
    with pytest.raises(TypeError, match="forward-mode|reverse mode"):
        jax.jvp(attend, (q,), (q,))
    with pytest.raises(TypeError, match="mla_prefill has its first derivative in reverse mode only"):
        jax.grad(lambda q: jax.grad(lambda q: attend(q).sum())(q).sum())(q)


@needs_pallas
def test_what_a_kernel_refuses_is_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "why_no_pallas", lambda: None)
    dispatch._log.cache_clear()
    with caplog.at_level(logging.WARNING, logger="dsv3_kernels"):
        for rows in (8, 8, 16):
            K.swiglu_cast(jnp.ones((rows, 2 * 1408), jnp.bfloat16))
        refused = array(8, 2 * 1408)
        jax.jit(lambda x: K.swiglu_cast(x)).trace(refused).lower(lowering_platforms=("cuda",))
    assert len(caplog.records) == 2
    assert "swiglu_cast(bfloat16[8, 2816])" in caplog.records[0].message
    assert "F in multiples of 1024" in caplog.records[0].message
    assert "pad it" in caplog.records[0].message


@needs_pallas
def test_a_program_of_several_devices_is_told_to_use_shard_map(caplog: pytest.LogCaptureFixture) -> None:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    rows = jax.ShapeDtypeStruct((256, 512), jnp.bfloat16, sharding=jax.sharding.NamedSharding(mesh, P("x")))
    dispatch._log.cache_clear()
    with caplog.at_level(logging.WARNING, logger="dsv3_kernels"):
        text = jax.jit(K.cast_tokens).trace(rows).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" not in text
    assert "2 devices" in caplog.text
    assert "jax.shard_map" in caplog.text


@needs_pallas
def test_a_batch_of_kernels_runs_one_by_one() -> None:
    for name in ("fp8_gemm", "cache_write"):
        function, args = OPS[name]
        many = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), args)
        text = jax.jit(jax.vmap(function)).trace(*many).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("custom_call @mosaic_gpu") == 1
    x = jax.random.normal(jax.random.key(0), (3, 4, 256))
    many = jax.vmap(K.cast_tokens, in_axes=1)(x)
    np.testing.assert_array_equal(many.scales[1], K.cast_tokens(x[:, 1]).scales)


def test_unknown_implementations_are_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="'triton' of cast_tokens is unknown; use None, 'reference', 'xla', 'pallas'"):
        K.cast_tokens(jnp.ones((8, 128)), implementation="triton")


def test_without_jit_an_op_is_what_it_is_with_it() -> None:
    x = jax.random.normal(jax.random.key(0), (8, 128))
    with jax.disable_jit():
        plain = K.cast_tokens(x)
    np.testing.assert_array_equal(plain.scales, K.cast_tokens(x).scales)
