"""What the GPU programs are given of `mla_decode`: inputs as FlashMLA's, and criteria that refuse what is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_kernels.decode_attention.bench import bench_cases, check_cases, excess, finite_diff, make_inputs
from dsv3_kernels.decode_attention.cases import GARBAGE_PAGE, LATENT_DIM, DecodeCase
from dsv3_kernels.latent_cache.fp8_rows import unpack_fp8_cache_rows
from tests.dsv3_kernels.errors import flash_mismatch


@pytest.mark.parametrize("is_fp8", [False, True])
def test_each_page_is_owned_once_and_holds_numbers_up_to_the_length(is_fp8):
    lengths = (65, 0, 64, 3)
    case = DecodeCase(4, 1, 2, 65, is_fp8=is_fp8, given_lengths=lengths)
    _, _, kv_pages, table, seq_lens = map(np.asarray, make_inputs(case, jax.random.key(3)))
    latent = unpack_fp8_cache_rows(kv_pages)[0] if is_fp8 else kv_pages[..., :LATENT_DIM]
    is_number = ~np.isnan(latent.astype(np.float32)).any(-1)
    assert seq_lens.tolist() == list(lengths)
    owned = table[table != GARBAGE_PAGE]
    assert len(set(owned.tolist())) == len(owned) == 4
    assert is_number.sum() == sum(lengths)
    for row, length in zip(table, lengths):
        pages = row[row != GARBAGE_PAGE]
        assert len(pages) == -(-length // 64)
        assert is_number[pages].reshape(-1).tolist() == [slot < length for slot in range(64 * len(pages))]


def test_excess_is_flashmlas_rule():
    rng = np.random.default_rng(0)
    y = np.append(rng.normal(size=500), [0.0, np.inf]).astype(np.float32)
    limits = {"absolute": 8e-4, "relative": 2.01 / 128}
    for factor in (0.9, 1.1):
        x = y.copy()
        x[7] += factor * max(limits["absolute"], limits["relative"] * abs(y[7]))
        is_refused = flash_mismatch(x, y, **limits, cosine=1.0) is not None
        assert is_refused == (factor > 1)
        assert float(excess(**limits)(jnp.asarray(x), jnp.asarray(y))) == pytest.approx(factor, rel=1e-3)
    for place, wrong in ((7, np.nan), (7, np.inf), (-1, 1.0), (-1, -np.inf), (-1, np.nan)):
        x = y.copy()
        x[place] = wrong
        assert not float(excess(**limits)(jnp.asarray(x), jnp.asarray(y))) < 1, (place, wrong)
    assert float(finite_diff(jnp.asarray(y), jnp.asarray(y))) == 0
    assert not float(finite_diff(jnp.asarray(x).at[3].set(jnp.nan), jnp.asarray(y))) < 1


def test_a_missing_key_or_a_shifted_mask_is_refused():
    """Each comparison is fed the right result, then one of a sequence that is shorter by a token."""
    case = next(each for each in check_cases() if each.name == "b7-s4-h3-k140-given")
    inputs = case.make_inputs(jax.random.key(0))
    result = case.run(inputs, "xla")
    q_latent, q_rope, kv_pages, table, lengths = inputs
    wrong = case.run((q_latent, q_rope, kv_pages, table, jnp.maximum(lengths - 1, 0)), "xla")
    for comparison in case.comparisons:
        expected = comparison.expected(inputs)
        assert float(comparison.error(result, expected)) < comparison.limit, comparison.name
        assert not float(comparison.error(wrong, expected)) < comparison.limit, comparison.name


def test_rows_hold_flashmlas_counts():
    rows = {case.name: case for case in bench_cases()}
    row = rows["b128-s2-h128-k4096"]
    assert row.flops == 2 * 128 * 2 * 128 * 4096 * (576 + 512)
    assert row.num_bytes == 128 * (4096 * 576 * 2 + 2 * 128 * ((576 + 512) * 2 + 4))
    assert row.published.tflops == 660
    assert row.is_bf16
    assert rows["b128-s1-h16-k32768"].published.gbps == 3000
    assert rows["b128-s1-h128-k4096-fp8"].num_bytes < row.num_bytes


def test_torch_gets_every_bf16_row_with_the_lengths_of_its_kernel():
    rows = [row for row in bench_cases() if row.others and row.op == "mla_decode"]
    assert [row.name for row in rows if row.torch is None] == [row.name for row in rows if row.name.endswith("-fp8")]
    by_name = {row.name: row.torch for row in rows}
    for S in (1, 2):
        for length in (4096, 8192, 16384, 32768):
            assert by_name[f"b128-s{S}-h128-k{length}"].lengths == (length,) * 128
            problem = by_name[f"b128-s{S}-h128-k{length}-var"]
            assert problem.num_queries == S
            assert len(set(problem.lengths)) > 100
            assert list(problem.lengths) == DecodeCase(128, S, 128, length, is_varlen=True).lengths().tolist()
