"""The plan covers every block once, balances, and tells the same story in its three tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_kernels.decode_attention.planner import Plan, plan_splits

_plan = jax.jit(plan_splits, static_argnames=("num_parts", "block_size", "overhead"))


def plan(lengths, num_parts: int, overhead: int = 2) -> Plan:
    seq_lens = jnp.asarray(lengths, jnp.int32)
    return Plan(*map(np.asarray, _plan(seq_lens, num_parts=num_parts, overhead=overhead)))


def segments(p: Plan, lengths) -> list[list[tuple[int, int, int]]]:
    """(sequence, first block, end block) of every part, as the kernel reads the table."""
    blocks = -(-np.asarray(lengths) // 128)
    result = []
    for first_seq, first_block, last_seq, end_block, _ in p.parts.tolist():
        sequences = range(first_seq, last_seq + 1)
        result.append(
            [
                (b, first_block if b == first_seq else 0, end_block if b == last_seq else int(blocks[b]))
                for b in sequences
            ]
        )
    return result


def check(lengths, num_parts: int, overhead: int = 2) -> None:
    p = plan(lengths, num_parts, overhead)
    blocks = -(-np.asarray(lengths) // 128)
    by_part = segments(p, lengths)
    seen = [np.zeros(n, int) for n in blocks]
    parts_of = [[] for _ in blocks]
    for part, own in enumerate(by_part):
        for b, begin, end in own:
            assert 0 <= begin <= end <= blocks[b]
            assert begin < end or blocks[b] == 0
            seen[b][begin:end] += 1
            parts_of[b].append(part)
    assert all((count == 1).all() for count in seen)
    for b, parts in enumerate(parts_of):
        assert parts == list(range(p.first_part[b], p.first_part[b] + p.num_splits[b]))
    for part, own in enumerate(by_part):
        if own and own[0][1] > 0:
            assert p.parts[part, 4] == part - p.first_part[own[0][0]]
        else:
            assert p.parts[part, 4] == 0
    # A split sequence is the last of the part it begins in, and thus of one part alone: the combining kernel's grid.
    last = np.maximum(p.parts[:, 2], 0)
    combined = last[(p.first_part[last] == np.arange(num_parts)) & (p.num_splits[last] > 1)]
    assert sorted(combined.tolist()) == np.flatnonzero(p.num_splits > 1).tolist()
    load = [sum(end - begin + overhead for _, begin, end in own) for own in by_part]
    share = (blocks.sum() + overhead * len(blocks)) / num_parts
    assert max(load) <= share + overhead + 1


@given(
    lengths=st.lists(st.integers(0, 2000) | st.sampled_from([0, 1, 127, 128, 129]), min_size=8, max_size=8),
    num_parts=st.sampled_from([1, 5, 16]),
    overhead=st.sampled_from([1, 2]),
)
@settings(deadline=None, max_examples=150, derandomize=True)
def test_every_block_once_and_loads_within_one_block_and_overhead(lengths, num_parts, overhead):
    check(lengths, num_parts, overhead)


@pytest.mark.parametrize(
    "lengths",
    [[0] * 128, [1] * 128, [4096] * 128, [131072] + [1] * 127, [0] * 127 + [100_000], [32768, 0] * 64],
    ids=["empty", "one", "equal", "huge-first", "huge-last", "every-other"],
)
def test_batches_of_128_on_132_parts(lengths):
    check(lengths, 132)
    check(lengths, 33)


def test_one_long_sequence_fills_the_gpu():
    p = plan([132 * 128 * 3], 132)
    assert p.num_splits[0] >= 130
    assert (p.parts[:, 3] - p.parts[:, 1]).max() <= 4


def test_new_lengths_compile_nothing():
    plan([5, 6, 7], 4)
    before = _plan._cache_size()
    plan([500, 0, 700], 4)
    assert _plan._cache_size() == before


def test_long_batches_do_not_overflow():
    check([131072 * 8] * 256, 132)


@pytest.mark.parametrize("wrong", [{"num_parts": 0}, {"num_parts": 4, "overhead": 0}])
def test_meaningless_division_is_refused(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        plan_splits(jnp.array([1], jnp.int32), **wrong)
