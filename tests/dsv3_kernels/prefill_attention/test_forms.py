"""Prefill attention: its implementations agree in values and gradients, and it refuses what it cannot take."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dsv3_kernels import mla_prefill
from dsv3_kernels.prefill_attention.cases import UGLY, Case, make, num_operations
from dsv3_kernels.prefill_attention.reference import wide_dtype

SCALE = 0.21


def arrays(case: Case, dtype=np.float32) -> dict[str, jax.Array | None]:
    """`make`, on the device."""
    return {name: None if x is None else jnp.asarray(x) for name, x in make(case, dtype).items()}


def results(case: Case, implementation: str, dtype=np.float32, q_starts=None) -> dict[str, np.ndarray]:
    """Both results and the three gradients, jitted."""
    given = arrays(case, dtype)
    ids = given["q_segment_ids"], given["kv_segment_ids"]

    @jax.jit
    def run(q, k, v, cotangents):
        def attend(q, k, v):
            return mla_prefill(q, k, v, *ids, softmax_scale=SCALE, q_starts=q_starts, implementation=implementation)

        out, backward = jax.vjp(attend, q, k, v)
        return *out, *backward(cotangents)

    cotangents = given["d_out"], given["d_lse"].astype(wide_dtype(dtype))
    found = run(given["q"], given["k"], given["v"], cotangents)
    return dict(zip(("out", "lse", "d_q", "d_k", "d_v"), map(np.asarray, found), strict=True))


@pytest.mark.parametrize("case", UGLY, ids=lambda case: case.name)
def test_chunks_change_neither_values_nor_gradients(case: Case) -> None:
    plain, chunked = results(case, "reference"), results(case, "xla")
    for name, expected in plain.items():
        np.testing.assert_allclose(chunked[name], expected, rtol=2e-5, atol=5e-5, err_msg=name)


def test_gradients_agree_in_float64() -> None:
    """Against autodiff of the reference, packed, with queries at the end of more keys, both results used."""
    case = Case("float64", B=2, T=300, S=341, H=2, num_documents=4, qk_dim=12, v_dim=8)
    with jax.enable_x64(True):
        plain, chunked = (results(case, form, np.float64) for form in ("reference", "xla"))
    for name, expected in plain.items():
        assert chunked[name].dtype == np.float64, name
        np.testing.assert_allclose(chunked[name], expected, rtol=1e-11, atol=1e-12, err_msg=name)


def test_the_reference_has_the_gradient_of_finite_differences() -> None:
    case = Case("tiny", B=1, T=5, S=7, H=1, num_documents=2, qk_dim=4, v_dim=3)
    with jax.enable_x64(True):
        given = arrays(case, np.float64)

        def value(q, k, v):
            ids = given["q_segment_ids"], given["kv_segment_ids"]
            out, lse = mla_prefill(q, k, v, *ids, softmax_scale=SCALE, implementation="reference")
            return (out * given["d_out"]).sum() + (lse * given["d_lse"]).sum()

        check_grads(jax.jit(value), (given["q"], given["k"], given["v"]), order=1, modes=["rev"], rtol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_starts_stand_each_sequence_where_it_belongs(implementation: str) -> None:
    """One batch of chunks behind prefixes of unequal lengths equals each sequence alone, bottom-right."""
    T, lengths = 9, [9, 30, 17]
    case = Case("unequal", B=3, T=T, S=30, H=2, qk_dim=12, v_dim=8)
    given = arrays(case)
    attend = jax.jit(partial(mla_prefill, softmax_scale=SCALE, implementation=implementation))
    starts = jnp.asarray(lengths, jnp.int32) - T
    out, lse = attend(given["q"], given["k"], given["v"], q_starts=starts)
    for b, length in enumerate(lengths):
        alone = [given[name][b : b + 1] for name in ("q", "k", "v")]
        expected, expected_lse = attend(alone[0], alone[1][:, :length], alone[2][:, :length])
        np.testing.assert_allclose(out[b], expected[0], atol=1e-6)
        np.testing.assert_allclose(lse[b], expected_lse[0], atol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_query_without_keys_gives_zeros(implementation: str) -> None:
    """Of a segment no key has, or before the first key: out 0, lse +inf, gradients 0 and finite."""
    case = Case("blind", B=1, T=6, S=4, H=2, qk_dim=12, v_dim=8)
    starts = jnp.asarray([-2], jnp.int32)
    given = arrays(case) | {"q_segment_ids": jnp.asarray([[1, 1, 1, 7, 1, 1]], jnp.int32)}
    ids = given["q_segment_ids"], jnp.ones((1, 4), jnp.int32)

    def attend(q, k, v):
        return mla_prefill(q, k, v, *ids, softmax_scale=SCALE, q_starts=starts, implementation=implementation)

    (out, lse), backward = jax.vjp(attend, given["q"], given["k"], given["v"])
    blind = [0, 1, 3]
    np.testing.assert_array_equal(out[:, blind], 0)
    assert np.isposinf(lse[..., blind]).all()
    assert np.isfinite(np.delete(lse, blind, axis=-1)).all()
    d_q, d_k, d_v = backward((given["d_out"], jnp.zeros_like(lse)))
    np.testing.assert_array_equal(d_q[:, blind], 0)
    assert all(np.isfinite(x).all() for x in (d_q, d_k, d_v))
    assert np.abs(d_q[:, [4, 5]]).min() > 0


def test_bfloat16_keeps_its_dtype_and_its_error() -> None:
    """Within twice the error of the same matmuls without chunks, and lse as of float32."""
    case = Case("narrow", B=1, T=300, S=300, H=2, num_documents=2, qk_dim=192, v_dim=128)
    wide = results(case, "reference", jnp.bfloat16)
    narrow = results(case, "xla", jnp.bfloat16)
    for name in ("out", "d_q", "d_k", "d_v"):
        assert narrow[name].dtype == jnp.bfloat16, name
        expected = wide[name].astype(np.float32)
        np.testing.assert_allclose(narrow[name].astype(np.float32), expected, rtol=2e-2, atol=8e-2, err_msg=name)
    np.testing.assert_allclose(narrow["lse"], wide["lse"], rtol=1e-5)


def test_memory_is_linear() -> None:
    """Neither pass holds anything as large as all scores."""
    q = jax.ShapeDtypeStruct((1, 4096, 1, 8), jnp.float32)

    def loss(q, k, v):
        return mla_prefill(q, k, v, softmax_scale=SCALE, implementation="xla")[0].sum()

    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, q, q).as_text()
    assert "256x4096" in text
    assert "4096x4096" not in text


def test_few_queries_pay_for_no_more() -> None:
    """One query over many keys has one row of scores, not a chunk of them."""
    q, k = (jax.ShapeDtypeStruct((1, n, 1, 8), jnp.float32) for n in (1, 4096))
    text = jax.jit(partial(mla_prefill, softmax_scale=SCALE, implementation="xla")).lower(q, k, k).as_text()
    assert "1x4096" in text
    assert "256x4096" not in text


def test_operations_are_counted_by_pairs() -> None:
    case = Case("count", B=2, T=3, S=5, H=7, qk_dim=4, v_dim=3)
    assert num_operations(case) == 2 * 2 * 7 * (3 + 4 + 5) * (4 + 3)
    assert num_operations(case, backward=True) == 2 * 2 * 7 * (3 + 4 + 5) * (3 * 4 + 2 * 3)


def ids(*shape: int) -> jax.Array:
    return jnp.ones(shape, jnp.int32)


def floats(*shape: int, dtype=jnp.float32) -> jax.Array:
    return jnp.ones(shape, dtype)


Q, K, V = (2, 3, 4, 12), (2, 5, 4, 12), (2, 5, 4, 8)


@pytest.mark.parametrize(
    ("q", "k", "v", "segment_ids", "q_starts", "message"),
    [
        (floats(*Q), floats(2, 5, 4, 10), floats(*V), (), None, "head size must agree"),
        (floats(*Q), floats(2, 5, 2, 12), floats(2, 5, 2, 8), (), None, "heads and head size must agree"),
        (floats(*Q), floats(*K), floats(2, 6, 4, 8), (), None, "all but the head size must agree"),
        (floats(*Q), floats(*K, dtype=jnp.bfloat16), floats(*V), (), None, "one floating dtype"),
        (floats(2, 9, 4, 12), floats(*K), floats(*V), (), None, "T=9 queries exceed S=5 keys"),
        (floats(*Q), floats(*K), floats(*V), (ids(2, 3),), None, "Only one of the segment ids"),
        (floats(*Q), floats(*K), floats(*V), (None, ids(2, 5)), None, "Only one of the segment ids"),
        (floats(*Q), floats(*K), floats(*V), (ids(2, 3), ids(2, 4)), None, "kv_segment_ids is int32"),
        (floats(2, 0, 4, 12), floats(*K), floats(*V), (), None, "none may be empty"),
        (floats(*Q), floats(2, 0, 4, 12), floats(2, 0, 4, 8), (), ids(2), "none may be empty"),
        (floats(*Q), floats(*K), floats(*V), (), ids(3), "give one integer a sequence"),
    ],
)
def test_what_does_not_fit_is_refused(q, k, v, segment_ids, q_starts, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mla_prefill(q, k, v, *segment_ids, softmax_scale=SCALE, q_starts=q_starts)
