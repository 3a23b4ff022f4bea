"""`mla_decode` by XLA against float32, with FlashMLA's shapes and tolerances, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv3_kernels.decode_attention.api import mla_decode
from dsv3_kernels.decode_attention.cases import (
    LARGE_CASES,
    SMALL_CASES,
    SOFTMAX_SCALE,
    DecodeCase,
    DecodeInputs,
    make_inputs,
)
from dsv3_kernels.decode_attention.loops import mla_decode_loops
from dsv3_kernels.decode_attention.reference import mla_decode_reference
from dsv3_kernels.decode_attention.xla import mla_decode_xla
from dsv3_kernels.latent_cache.fp8_rows import unpack_fp8_cache_rows
from tests.dsv3_kernels.errors import flash_mismatch

decode = functools.partial(mla_decode, softmax_scale=SOFTMAX_SCALE)

SHORT_TAILS = DecodeCase(7, 16, 3, 1500, given_lengths=(0, 1, 15, 16, 17, 64, 1500))
"""The last tokens of prompts whose beginning the cache holds."""


def truth(inputs: DecodeInputs, *, causal: bool = True, softmax_scale: float = SOFTMAX_SCALE):
    """The reference on the same values as float32, so that its output is not rounded to BF16."""
    kv = inputs.kv_pages
    if kv.dtype == np.uint8:
        kv = np.concatenate(unpack_fp8_cache_rows(kv), axis=-1)
    floats = [jnp.asarray(x, jnp.float32) for x in (inputs.q_latent, inputs.q_rope, kv)]
    form = functools.partial(mla_decode_reference, softmax_scale=softmax_scale, causal=causal)
    return jax.jit(form)(*floats, jnp.asarray(inputs.page_table), jnp.asarray(inputs.seq_lens))


def assert_close(actual, expected) -> None:
    """FlashMLA's tolerances for dense decoding."""
    out, lse = actual
    assert flash_mismatch(out, expected[0], absolute=8e-4, relative=2.01 / 128, cosine=5e-6) is None
    assert flash_mismatch(lse, expected[1], absolute=1e-6, relative=8.01 / 65536, cosine=5e-6) is None


def check(case: DecodeCase) -> None:
    inputs = make_inputs(case)
    arguments = [jnp.asarray(x) for x in inputs]
    out, lse = decode(*arguments, causal=case.causal, implementation="xla")
    assert out.dtype == jnp.bfloat16
    assert lse.dtype == jnp.float32
    assert_close((out, lse), truth(inputs, causal=case.causal))


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_xla_form_is_within_flashmlas_tolerances(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE_CASES, ids=lambda case: case.name)
def test_xla_form_is_within_flashmlas_tolerances_at_size(case):
    check(case)


@pytest.mark.parametrize(
    ("implementation", "case"),
    [(mla_decode_loops, SHORT_TAILS), (mla_decode_xla, SHORT_TAILS), (mla_decode_xla, SMALL_CASES[4])],
    ids=lambda x: getattr(x, "__name__", None) or x.name,
)
def test_many_queries_and_other_gpus_are_within_flashmlas_tolerances(implementation, case):
    inputs = make_inputs(case)
    run = jax.jit(functools.partial(implementation, softmax_scale=SOFTMAX_SCALE))
    assert_close(run(*map(jnp.asarray, inputs)), truth(inputs))


def test_each_platform_gets_its_own_implementation():
    """A GPU gets one loop over the longest sequence's pages, a CPU one over sequences that holds one over pages."""
    shapes = DecodeCase(2, 1, 4, 128).shapes()
    run = jax.jit(functools.partial(decode, implementation="xla")).trace(*shapes)
    loops = {
        platform: run.lower(lowering_platforms=(platform,)).as_text().count("while") for platform in ("cpu", "cuda")
    }
    assert loops == {"cpu": 2, "cuda": 1}


def test_a_sequence_gets_the_same_bits_beside_any_others():
    inputs = make_inputs(DecodeCase(4, 2, 3, 150, given_lengths=(150, 0, 64, 7)))
    run = jax.jit(functools.partial(decode, implementation="xla"))
    out, lse = run(*map(jnp.asarray, inputs))
    others = np.array([0, 3, 1, 1])
    beside = [x if x is inputs.kv_pages else x[others] for x in inputs]
    for a, b in zip((out, lse), run(*map(jnp.asarray, beside)), strict=True):
        np.testing.assert_array_equal(np.asarray(b, np.float32), np.asarray(a, np.float32)[others])


def test_memory_of_a_cpu_does_not_follow_the_width_of_the_table():
    def temporaries(width: int) -> int:
        *arrays, table, lengths = DecodeCase(4, 1, 4, 128).shapes()
        table = jax.ShapeDtypeStruct((4, width), table.dtype)
        run = jax.jit(functools.partial(decode, implementation="xla"))
        return run.lower(*arrays, table, lengths).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(64) - temporaries(2) <= 2 * 4 * 4 * 62, "two copies of the page ids"


def test_reference_by_hand():
    """Two keys, one head: weights are a softmax of two numbers."""
    pages = np.full((3, 64, 4), np.nan, np.float32)
    pages[1, 0], pages[1, 1] = [1, 2, 3, 4], [5, 6, 7, 8]
    q = np.array([0.1, 0.2, 0.3, 0.4], np.float32).reshape(1, 1, 1, 4)
    scores = 0.5 * pages[1, :2] @ q.ravel()
    weights = np.exp(scores) / np.exp(scores).sum()
    table, lengths = jnp.array([[1, 2147480000]], jnp.int32), jnp.array([2], jnp.int32)
    for form in ("reference", "xla"):
        out, lse = mla_decode(
            *map(jnp.asarray, (q[..., :3], q[..., 3:], pages)), table, lengths, softmax_scale=0.5, implementation=form
        )
        np.testing.assert_allclose(out.ravel(), weights @ pages[1, :2, :3], rtol=1e-6)
        np.testing.assert_allclose(lse.ravel(), np.log(np.exp(scores).sum()), rtol=1e-6)


@pytest.mark.parametrize("form", ["reference", "xla"])
def test_query_without_keys_gives_zero_and_infinity(form):
    inputs = make_inputs(DecodeCase(4, 3, 2, 3, given_lengths=(0, 1, 2, 3)))
    out, lse = decode(*map(jnp.asarray, inputs), implementation=form)
    seen = np.arange(3)[None, :] + np.arange(4)[:, None] >= 3
    assert np.array_equal(np.isposinf(lse), np.broadcast_to(~seen[:, None, :], lse.shape))
    assert np.array_equal(
        np.any(np.asarray(out, np.float32) != 0, axis=-1), np.broadcast_to(seen[:, :, None], (4, 3, 2))
    )


@pytest.mark.parametrize("form", ["reference", "xla"])
def test_last_query_sees_what_one_query_sees(form):
    inputs = make_inputs(DecodeCase(3, 4, 2, 100, is_varlen=True))
    out, lse = decode(*map(jnp.asarray, inputs), implementation=form)
    last = inputs._replace(q_latent=inputs.q_latent[:, 3:], q_rope=inputs.q_rope[:, 3:])
    out_last, lse_last = decode(*map(jnp.asarray, last), implementation=form)
    np.testing.assert_allclose(np.float32(out[:, 3:]), np.float32(out_last), atol=1e-3)
    np.testing.assert_allclose(lse[:, :, 3:], lse_last, rtol=1e-6)


@pytest.mark.parametrize("size", [(16, 8), (512, 64), (97, 5)])
def test_other_widths_in_float32(size):
    """The widths of small models; both implementations compute in float32 then."""
    latent, rope = size
    rng = np.random.default_rng(3)
    kv = rng.standard_normal((5, 64, latent + rope), np.float32)
    q = rng.standard_normal((2, 2, 3, latent + rope), np.float32)
    arguments = [*map(jnp.asarray, (q[..., :latent], q[..., latent:], kv)), jnp.array([[4, 0], [2, 3]], jnp.int32)]
    lengths = jnp.array([100, 7], jnp.int32)
    results = [decode(*arguments, lengths, implementation=form) for form in ("reference", "xla")]
    for a, b in zip(*results):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_lengths_may_be_traced_and_compile_nothing_new():
    inputs = make_inputs(DecodeCase(3, 2, 4, 150, is_varlen=True))
    run = jax.jit(functools.partial(decode, implementation="xla"))
    arguments = [jnp.asarray(x) for x in inputs]
    for lengths in (inputs.seq_lens, np.array([1, 64, 0], np.int32)):
        shorter = np.minimum(lengths, inputs.seq_lens)
        traced = run(*arguments[:4], jnp.asarray(shorter))
        assert_close(traced, truth(inputs._replace(seq_lens=shorter)))
    assert run._cache_size() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_rope": (2, 2, 4, 64)}, "first three axes"),
        ({"q_rope": (2, 1, 4, 64, jnp.float32)}, "q_rope is float32"),
        ({"kv_pages": (5, 32, 576)}, "pages of 32 tokens"),
        ({"kv_pages": (5, 64, 512)}, r"512 \+ 64 = 576"),
        ({"kv_pages": (5, 64, 576, jnp.float32)}, "queries' dtype bfloat16"),
        ({"kv_pages": (5, 64, 576, jnp.uint8)}, "rows of 656 bytes"),
        ({"kv_pages": (5, 64, 656, jnp.uint8), "q_latent": (2, 1, 4, 256)}, r"256 \+ 64"),
        ({"page_table": (2, 2, jnp.int16)}, "page_table is int16"),
        ({"page_table": (3, 2, jnp.int32)}, "each of the 2 sequences"),
        ({"seq_lens": (3, jnp.int32)}, "each of the 2 sequences"),
        ({"q_latent": (2, 1, 0, 512), "q_rope": (2, 1, 0, 64)}, "must not be empty"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_bad_input_is_refused_before_launch(change, message):
    shapes = {
        "q_latent": (2, 1, 4, 512, jnp.bfloat16),
        "q_rope": (2, 1, 4, 64, jnp.bfloat16),
        "kv_pages": (5, 64, 576, jnp.bfloat16),
        "page_table": (2, 2, jnp.int32),
        "seq_lens": (2, jnp.int32),
    }
    for name, shape in change.items():
        shapes[name] = shape if not isinstance(shape[-1], int) else (*shape, shapes[name][-1])
    arrays = {name: jnp.zeros(shape[:-1], shape[-1]) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        decode(*arrays.values())


@pytest.mark.parametrize("length", [129, -1])
def test_length_beyond_the_page_table_is_refused(length):
    inputs = make_inputs(DecodeCase(2, 1, 1, 60))
    arguments = [jnp.asarray(x) for x in inputs]
    with pytest.raises(ValueError, match=r"holds lengths from 0 to 128\. Give it more pages"):
        decode(*arguments[:4], jnp.array([1, length], jnp.int32))


def test_nan_in_a_used_slot_is_not_hidden():
    """The masks hide unused slots only."""
    inputs = make_inputs(DecodeCase(1, 1, 1, 64))
    inputs.kv_pages[inputs.page_table[0, 0], 5] = ml_dtypes.bfloat16("nan")
    for form in ("reference", "xla"):
        assert np.isnan(np.float32(decode(*map(jnp.asarray, inputs), implementation=form)[0])).all()
