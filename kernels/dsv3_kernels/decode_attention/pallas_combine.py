"""The sum of a split sequence's parts on Hopper: in the order of the parts, into the rows where it belongs.

One pass over memory, and nothing in shared memory. A thread block takes four rows of a sequence, each of which its 128
threads load at once, and visits the parts four at a time: 16 loads of 16 bytes a thread are under way. The grid is over
parts, not over sequences: at most one split sequence begins in each part, so that long batches bring no idle blocks.
The log-sum-exps of all sequences, split or not, pass through it on their way to the caller's order of axes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32, Int32

from dsv3_kernels import launch
from dsv3_kernels.aot.case import AotCase
from dsv3_kernels.decode_attention.pallas_attend import Partials
from dsv3_kernels.decode_attention.pallas_layout import LATENT, NEVER

ROWS = 4
AT_ONCE = 4
"""Parts whose loads are under way together."""


def combine_parts(
    partials: Partials,
    parts: Int32[Array, "G 5"],
    *,
    num_queries: int,
    num_heads: int,
    interpret: Any = None,
) -> tuple[BFloat16[Array, "B R 512"], Float32[Array, "B H S"]]:
    """Sums up the parts of split sequences, with the same bits at every run; moves the lse of row s H + h to [h, s].

    Rows of sequences that were not split are neither read nor written: the first result is the memory of
    `partials.out`.
    """
    B, R, _ = partials.out.shape
    num_parts, num_rows = len(parts), num_queries * num_heads
    layout = plgpu.Layout.WG_STRIDED((LATENT,), 4)

    def body(parts_ref, lse_ref, part_out_ref, part_lse_ref, out_ref, final_lse_ref):
        part, first_row = lax.axis_index("part"), lax.axis_index("row_block") * ROWS
        rows = [first_row + i for i in range(ROWS)]
        first_seq, first_block, last_seq, _, num_splits = (parts_ref[part, column] for column in range(5))
        is_split = num_splits > 1

        def write_lse(seq, lses):
            for row, lse in zip(rows, lses):

                @pl.when(row < num_rows)
                def _(row=row, lse=lse):
                    final_lse_ref[seq, lax.rem(row, num_heads), lax.div(row, num_heads)] = lse

        def move(group, _):
            indices = [jnp.minimum(begin + group * AT_ONCE + i, end - 1) for i in range(AT_ONCE)]
            lses = [[lse_ref[seq, row] for row in rows] for seq in indices]
            for seq, each in zip(indices, lses):
                write_lse(seq, each)

        # The sequences that lie whole in this part.
        begin, end = first_seq + (first_block > 0).astype(jnp.int32), last_seq + 1 - is_split.astype(jnp.int32)
        lax.fori_loop(0, lax.div(jnp.maximum(end - begin, 0) + (AT_ONCE - 1), AT_ONCE), move, None)

        def visit(group, states):
            indices = [group * AT_ONCE + i for i in range(AT_ONCE)]
            # Behind the last part, the last once more, without weight: other slots may hold NaN.
            slots = [_slot(part, jnp.minimum(i, num_splits - 1)) for i in indices]
            lses = [[part_lse_ref[slot, row] for slot in slots] for row in rows]
            tiles = [[plgpu.load(part_out_ref.at[slot, row], layout=layout) for slot in slots] for row in rows]
            lses = [[jnp.where(i < num_splits, x, -jnp.inf) for i, x in zip(indices, each)] for each in lses]
            return tuple(map(_add, states, lses, tiles))

        @pl.when(is_split)
        def _():
            zeros = plgpu.layout_cast(jnp.zeros((LATENT,), jnp.float32), layout)
            start = ((jnp.float32(0), jnp.float32(NEVER), zeros),) * ROWS
            states = lax.fori_loop(0, lax.div(num_splits + (AT_ONCE - 1), AT_ONCE), visit, start)
            lses = []
            for row, (total, origin, acc) in zip(rows, states):
                has_keys = total != 0  # a NaN is shown, not hidden
                divisor = jnp.where(has_keys, total, 1.0)
                out_ref[last_seq, row] = (acc * (1.0 / divisor)).astype(jnp.bfloat16)
                lses.append(jnp.where(has_keys, origin + jnp.log(divisor), jnp.inf))
            write_lse(last_seq, lses)

    body.__name__ = "combine_parts"
    kernel = launch.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((B, num_heads, num_queries), jnp.float32),
        grid=(num_parts, R // ROWS),
        grid_names=("part", "row_block"),
        has_own_barriers=True,  # it needs none: every thread writes what no other thread reads
        interpret=interpret,
    )
    out_ref = jax.new_ref(partials.out)
    lse = kernel(parts, partials.lse, partials.part_out, partials.part_lse, out_ref)
    return jax.freeze(out_ref), lse


def aot_cases() -> list[AotCase]:
    """Many sequences with all heads, in parts for 132 SMs; one sequence with half of them."""
    return [
        AotCase(
            f"mla_decode_combine b{B}-r{S * H}",
            functools.partial(combine_parts, num_queries=S, num_heads=H),
            (
                Partials._make(
                    [
                        jax.ShapeDtypeStruct((B, S * H, LATENT), jnp.bfloat16),
                        jax.ShapeDtypeStruct((B, S * H), jnp.float32),
                        jax.ShapeDtypeStruct((2 * G, S * H, LATENT), jnp.float32),
                        jax.ShapeDtypeStruct((2 * G, S * H), jnp.float32),
                    ]
                ),
                jax.ShapeDtypeStruct((G, 5), jnp.int32),
            ),
            (r"LDG?\.E\.128",),
            max_shared_bytes=0,
        )
        for B, S, H, G in ((128, 1, 128, 66), (1, 1, 64, 132), (128, 2, 128, 33))
    ]


def _add(state, lses, tiles):
    """A row's sum of weights exp(lse - origin), origin, and sum of weighted outputs, with some parts more."""
    total, origin, acc = state
    largest = origin
    for lse in lses:
        largest = jnp.maximum(largest, lse)
    decay = jnp.exp(origin - largest)
    total, acc = total * decay, acc * decay
    for lse, tile in zip(lses, tiles):
        weight = jnp.exp(lse - largest)
        total, acc = total + weight, acc + tile * weight
    return total, largest, acc


def _slot(first_part, i):
    """Where part i of a sequence lies: the first in the second slot of its part, others in the first slot of theirs."""
    return 2 * (first_part + i) + (i == 0).astype(jnp.int32)
