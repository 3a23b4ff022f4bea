"""The plan of a decoding step on Hopper, in one launch: a thread block for each part finds where the part lies.

Each runs twice over the lengths, for the length of the line and for the sequences at its two cuts. Nothing passes
between blocks, and nothing is sorted, scanned or scattered, for which XLA would launch a kernel each.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from dsv3_kernels import launch
from dsv3_kernels.aot.case import AotCase
from dsv3_kernels.decode_attention.planner import OVERHEAD_BLOCKS, Plan, cut_at, num_blocks

AT_ONCE = 8
"""Lengths whose loads are under way together."""


def plan_parts(seq_lens: Int32[Array, "B"], *, num_parts: int, interpret: Any = None) -> Plan:
    """Twin of `plan_splits`."""
    num_seqs = seq_lens.shape[0]

    def body(lengths, parts):
        part = lax.axis_index("part")
        for column, value in enumerate(part_of(part, lengths, num_seqs=num_seqs, num_parts=num_parts)):
            parts[part, column] = value

    body.__name__ = "plan_parts"
    kernel = launch.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((num_parts, 5), jnp.int32),
        grid=(num_parts,),
        grid_names=("part",),
        has_own_barriers=True,  # it needs none: no thread reads what another writes
        interpret=interpret,
    )
    return Plan(seq_lens, kernel(seq_lens))


def part_of(part: Any, lengths: Any, *, num_seqs: int, num_parts: int) -> tuple[Any, ...]:
    """A row of `Plan.parts`, as scalars."""
    zero = jnp.int32(0)

    def load(seq):
        return num_blocks(lengths[seq]) + OVERHEAD_BLOCKS

    total = _for_all(num_seqs, lambda seq, sum_: sum_ + load(seq), zero)
    cut, next_cut = (cut_at(index, total, num_parts) for index in (part, part + 1))

    def pass_by(seq, state):
        """Of each cut the sequence that it lies in and where that starts; blocks of the one before the next cut's."""
        end, first, first_start, last, last_start, blocks = state
        size = load(seq)
        end = end + size
        first, first_start = jnp.where(end <= cut, seq + 1, first), jnp.where(end <= cut, end, first_start)
        is_before = end <= next_cut
        last, last_start = jnp.where(is_before, seq + 1, last), jnp.where(is_before, end, last_start)
        return end, first, first_start, last, last_start, jnp.where(is_before, size - OVERHEAD_BLOCKS, blocks)

    _, first, first_start, last, last_start, blocks = _for_all(num_seqs, pass_by, (zero,) * 6)
    first_block = jnp.maximum(cut - first_start - OVERHEAD_BLOCKS, 0)
    last_block = jnp.maximum(next_cut - last_start - OVERHEAD_BLOCKS, 0)
    ends_inside = last_block > 0
    is_split = ends_inside & ((first < last) | (first_block == 0))
    last_end = last_start + load(jnp.minimum(last, num_seqs - 1))

    def count(index, num_cuts):
        return num_cuts + (cut_at(index, total, num_parts) < last_end).astype(jnp.int32)

    num_cuts = lax.fori_loop(part + 1, jnp.where(is_split, num_parts, part + 1), count, zero)
    last_seq, end_block = jnp.where(ends_inside, last, last - 1), jnp.where(ends_inside, last_block, blocks)
    return first, first_block, last_seq, end_block, 1 + num_cuts


def _for_all(num_seqs: int, step: Callable[[Any, Any], Any], state: Any) -> Any:
    """A loop over all sequences, a few at a time."""

    def several(group, state):
        for i in range(AT_ONCE):
            state = step(group * AT_ONCE + i, state)
        return state

    num_groups = num_seqs // AT_ONCE
    state = lax.fori_loop(0, num_groups, several, state)
    for seq in range(num_groups * AT_ONCE, num_seqs):
        state = step(seq, state)
    return state


def aot_cases() -> list[AotCase]:
    """Batches in groups of eight, with a rest, and of one."""
    return [
        AotCase(
            f"plan_decode b{B}-g{G}",
            lambda seq_lens, G=G: plan_parts(seq_lens, num_parts=G),
            (jax.ShapeDtypeStruct((B,), jnp.int32),),
            (r"STG?\.E",),
            max_shared_bytes=0,
        )
        for B, G in ((128, 66), (1, 132), (300, 33))
    ]
