"""The grouped GEMMs in bf16: every group against its own dense matmul, empty groups, skipped blocks, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_kernels import grouped_matmul, grouped_matmul_k
from dsv3_kernels.grouped_gemm_bf16 import bench, cases, pallas_sm90

SMALL = [case for case in cases.CASES if case.is_small]
IMPLEMENTATIONS = ["reference", "xla"]
rows_gemm = jax.jit(grouped_matmul, static_argnames=("transposed", "out_dtype", "implementation"))
contraction_gemm = jax.jit(grouped_matmul_k, static_argnames=("num_groups", "out_dtype", "implementation"))


def float64(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def exact(case: cases.GroupedCase, inputs: cases.GroupedInputs) -> dict[str, np.ndarray]:
    rows, weights, d_out = map(float64, inputs[:3])
    owner = np.repeat(case.block_group, case.block)
    forward, input_gradient = np.zeros_like(d_out), np.zeros_like(rows)
    weight_gradient = np.zeros_like(weights)
    for group, weight in enumerate(weights):
        own = owner == group
        forward[own], input_gradient[own] = rows[own] @ weight, d_out[own] @ weight.T
        weight_gradient[group] = rows[own].T @ d_out[own]
    return {"forward": forward, "input_gradient": input_gradient, "weight_gradient": weight_gradient}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_each_group_has_its_own_product_in_all_directions(case, implementation, rng):
    inputs = cases.make_inputs(case, jax.random.key(rng.integers(2**31)))
    is_skipped = np.repeat(case.block_group, case.block)[:, None] < 0
    poisoned = inputs._replace(
        rows=jnp.where(is_skipped, jnp.bfloat16(jnp.nan), inputs.rows),
        d_out=jnp.where(is_skipped, jnp.bfloat16(jnp.nan), inputs.d_out),
    )
    for direction, (_, run, _) in bench.DIRECTIONS.items():
        out, expected = run(case, poisoned, implementation), exact(case, inputs)[direction]
        assert out.dtype == (jnp.float32 if direction == "weight_gradient" else jnp.bfloat16)
        atol = 2e-2 * np.sqrt(case.inner + case.outer)
        np.testing.assert_allclose(float64(out), expected, rtol=2**-8, atol=atol)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_implementations_agree_on_any_order_of_groups_and_height_of_blocks(dtype, rng):
    ids = rng.integers(-1, 3, 6).astype(np.int32)
    rows, weights = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((6 * 8, 40), (3, 56, 40)))
    by_form = [
        rows_gemm(rows, weights, ids, transposed=True, out_dtype=jnp.float32, implementation=form)
        for form in IMPLEMENTATIONS
    ]
    np.testing.assert_allclose(*by_form, rtol=1e-4, atol=1e-4)
    d_out = jnp.asarray(rng.normal(size=(6 * 8, 56)), dtype)
    by_form = [
        contraction_gemm(rows, d_out, np.sort(ids), num_groups=3, implementation=form) for form in IMPLEMENTATIONS
    ]
    np.testing.assert_allclose(*by_form, rtol=1e-4, atol=1e-4)


def test_tiles_begin_with_each_run_and_cover_it():
    """The lists that the kernel walks: first unit, group and height of each tile."""
    groups = np.array([1, 1, 1, -1, 0, 0, 2], np.int32)
    first, group, height, count = map(np.asarray, jax.jit(pallas_sm90.tile_lists, static_argnums=1)(groups, 2))
    used = slice(0, int(count[0]))
    np.testing.assert_array_equal(first[used], [0, 2, 3, 4, 6])
    np.testing.assert_array_equal(group[used], [1, 1, -1, 0, 2])
    np.testing.assert_array_equal(height[used], [2, 1, 1, 2, 1])


ROWS, WEIGHTS, IDS = np.ones((128, 24), np.float32), np.ones((3, 24, 40), np.float32), np.zeros(2, np.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grouped_matmul(ROWS, WEIGHTS, np.zeros(3, np.int32)), r"\(3,\), which does not divide M=128 rows"),
        (lambda: grouped_matmul(ROWS, WEIGHTS, np.zeros(2, np.int8)), r"dtype int8 and must be int32"),
        (lambda: grouped_matmul(ROWS, WEIGHTS, np.full(2, 3, np.int32)), r"holds 3 and must be -1 to 2; weights has"),
        (lambda: grouped_matmul(ROWS, WEIGHTS, IDS, transposed=True), r"24 and 40; pass weights as"),
        (lambda: grouped_matmul(ROWS, WEIGHTS[0], IDS), r"weights has shape \(24, 40\) and must have 3 axes"),
        (lambda: grouped_matmul(ROWS, WEIGHTS.astype(jnp.bfloat16), IDS), r"dtype bfloat16 and the first operand"),
        (lambda: grouped_matmul(ROWS.astype(int), WEIGHTS, IDS), r"rows has dtype int\d+ and must be"),
        (lambda: grouped_matmul(ROWS, WEIGHTS, IDS, out_dtype=jnp.int8), r"out_dtype=int8"),
        (lambda: grouped_matmul_k(ROWS, ROWS[:64], IDS, num_groups=1), r"differ in rows"),
        (lambda: grouped_matmul_k(ROWS, ROWS, IDS, num_groups=0), r"num_groups=0 must be at least 1"),
        (lambda: grouped_matmul_k(ROWS, ROWS, np.array([0, 1, 0, 0], np.int32), num_groups=2), r"not side by side"),
    ],
)  # fmt: skip
def test_errors_say_what_to_change(call, message):
    with pytest.raises(ValueError, match=message):
        call()
