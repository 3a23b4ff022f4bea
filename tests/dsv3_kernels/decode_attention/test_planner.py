"""The plan covers every block once, balances, and the kernel's is the plain one's."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_kernels import dispatch
from dsv3_kernels.decode_attention.planner import OVERHEAD_BLOCKS, plan_splits

_plan = jax.jit(plan_splits, static_argnames="num_parts")


def plan(lengths, num_parts: int) -> np.ndarray:
    return np.asarray(_plan(jnp.asarray(lengths, jnp.int32), num_parts=num_parts).parts)


def segments(parts: np.ndarray, lengths) -> list[list[tuple[int, int, int]]]:
    """(sequence, first block, end block) of every part, as the kernel reads the table."""
    blocks = -(-np.asarray(lengths) // 128)
    return [
        [
            (b, first_block if b == first_seq else 0, end_block if b == last_seq else int(blocks[b]))
            for b in range(first_seq, last_seq + 1)
        ]
        for first_seq, first_block, last_seq, end_block, _ in parts.tolist()
    ]


def check(lengths, num_parts: int) -> None:
    parts = plan(lengths, num_parts)
    blocks = -(-np.asarray(lengths) // 128)
    by_part = segments(parts, lengths)
    seen = [np.zeros(n, int) for n in blocks]
    parts_of = [[] for _ in blocks]
    for part, own in enumerate(by_part):
        for b, begin, end in own:
            assert 0 <= begin <= end <= blocks[b]
            assert begin < end or blocks[b] == 0
            seen[b][begin:end] += 1
            parts_of[b].append(part)
    assert all((count == 1).all() for count in seen)
    # A split sequence is the last of the part it begins in, and thus of one part alone: the combining kernel's grid.
    told = {int(parts[part, 2]): list(range(part, part + parts[part, 4])) for part in np.flatnonzero(parts[:, 4] > 1)}
    assert told == {b: own for b, own in enumerate(parts_of) if len(own) > 1}
    assert all(own for own in parts_of)
    load = [sum(end - begin + OVERHEAD_BLOCKS for _, begin, end in own) for own in by_part]
    share = (blocks.sum() + OVERHEAD_BLOCKS * len(blocks)) / num_parts
    assert max(load) <= share + OVERHEAD_BLOCKS + 1


@given(
    lengths=st.lists(st.integers(0, 2000) | st.sampled_from([0, 1, 127, 128, 129]), min_size=8, max_size=8),
    num_parts=st.sampled_from([1, 5, 16]),
)
@settings(deadline=None, max_examples=150, derandomize=True)
def test_every_block_once_and_loads_within_one_block_and_overhead(lengths, num_parts):
    check(lengths, num_parts)


@pytest.mark.parametrize(
    "lengths",
    [[0] * 128, [1] * 128, [4096] * 128, [131072] + [1] * 127, [0] * 127 + [100_000], [32768, 0] * 64],
    ids=["empty", "one", "equal", "huge-first", "huge-last", "every-other"],
)
def test_batches_of_128_on_132_parts(lengths):
    check(lengths, 132)
    check(lengths, 33)


def test_one_long_sequence_fills_the_gpu():
    parts = plan([132 * 128 * 3], 132)
    assert parts[:, 4].max() >= 130
    assert (parts[:, 3] - parts[:, 1]).max() <= 4


def test_new_lengths_compile_nothing():
    plan([5, 6, 7], 4)
    before = _plan._cache_size()
    plan([500, 0, 700], 4)
    assert _plan._cache_size() == before


def test_long_batches_do_not_overflow():
    check([131072 * 8] * 256, 132)


@pytest.mark.skipif(jax.__version_info__ < dispatch.OLDEST_PALLAS_JAX, reason=dispatch.why_no_pallas() or "")
@pytest.mark.parametrize(("num_seqs", "num_parts"), [(1, 132), (2, 9), (3, 1), (128, 66), (128, 132), (300, 33)])
def test_kernel_s_arithmetic_is_the_plain_plan(num_seqs, num_parts):
    """Its function of one part, for all of them; with more parts than blocks some cuts lie at one place."""
    from dsv3_kernels.decode_attention.pallas_plan import part_of

    def by_part(lengths):
        of_one = functools.partial(part_of, lengths=lengths, num_seqs=num_seqs, num_parts=num_parts)
        return jnp.stack(jax.vmap(of_one)(jnp.arange(num_parts, dtype=jnp.int32)), axis=1)

    seed = time.time_ns() % 2**32
    rng = np.random.default_rng(seed)
    of_kernel = jax.jit(by_part)
    for longest in (0, 1, 300, 200_000, 2**31 - 1):
        for share_empty in (0, 0.3, 0.9):
            lengths = rng.integers(0, longest, num_seqs, endpoint=True) * (rng.random(num_seqs) >= share_empty)
            ours = of_kernel(jnp.asarray(lengths, jnp.int32))
            np.testing.assert_array_equal(ours, plan(lengths, num_parts), err_msg=f"seed {seed}, {longest=}")
