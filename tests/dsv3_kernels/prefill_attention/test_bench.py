"""What a GPU run of prefill attention times and checks, by the implementation for this machine."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_kernels.prefill_attention import bench
from dsv3_kernels.prefill_attention.cases import Case

CASE = Case("small", B=2, T=33, S=70, H=2, num_documents=3, qk_dim=24, v_dim=16)


@pytest.mark.slow
def test_the_backward_row_computes_the_gradients() -> None:
    """From what forward saved, as autodiff does; d_lse included."""
    inputs = bench.make_saved(CASE, jax.random.key(1))
    whole = jax.jit(lambda x: bench._values_and_gradients(CASE, x, "xla"))(inputs)
    alone = jax.jit(lambda x: bench._backward(CASE, x, "xla"))(inputs)
    for name, found in zip(("d_q", "d_k", "d_v"), alone, strict=True):
        np.testing.assert_allclose(found.astype(np.float32), whole[name].astype(np.float32), rtol=2e-2, atol=1e-3)


def test_one_wrong_row_and_one_nan_fail() -> None:
    """And a right result does not."""
    (comparison,) = (bench._comparison(CASE, "reference"),)
    inputs = bench.make_inputs(CASE, jax.random.key(2))
    right = jax.jit(lambda x: bench._values_and_gradients(CASE, x, "xla"))(inputs)
    expected = comparison.expected(inputs)
    assert comparison.error(right, expected) < comparison.limit
    wrong = right | {"out": right["out"].at[1, 7, 1].multiply(1.1)}
    assert comparison.error(wrong, expected) > comparison.limit
    assert jnp.isnan(comparison.error(right | {"d_k": right["d_k"].at[0, 0, 0, 0].set(jnp.nan)}, expected))


def test_rows_are_judged_by_the_bf16_rate() -> None:
    """And forward and backward have a row each at every shape of the model."""
    rows = bench.bench_cases()
    assert len(rows) == 2 * len(bench.CASES)
    assert all(row.is_bf16 and row.flops > 0 and row.num_bytes > 0 for row in rows)
    assert rows[1].flops / rows[0].flops == (3 * 192 + 2 * 128) / (192 + 128)


def test_torch_computes_every_row() -> None:
    """The same shapes, forward and backward apart."""
    for row in bench.bench_cases():
        (case,) = (case for case in bench.CASES if row.name.startswith(f"{case.name} "))
        assert row.torch is not None
        assert row.torch.is_backward == row.name.endswith("backward")
        assert row.torch[:6] == (case.B, case.T, case.S, case.H, case.qk_dim, case.v_dim)
        assert (row.torch.num_documents > 0) == ("packed" in row.name)
