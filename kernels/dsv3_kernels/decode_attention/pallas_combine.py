"""The sum of a split sequence's parts on Hopper: in the order of the parts, into the rows where it belongs.

One pass over memory, and nothing in shared memory. A thread block takes four rows of a sequence, each of which its 128
threads load at once, and visits the parts four at a time: 16 loads of 16 bytes a thread are under way. The grid is over
parts, not over sequences: at most one split sequence begins in each part, so that long batches bring no idle blocks.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32

from dsv3_kernels import launch
from dsv3_kernels.aot.case import AotCase
from dsv3_kernels.decode_attention.pallas_layout import LATENT, NEVER
from dsv3_kernels.decode_attention.planner import Plan, plan_splits

ROWS = 4
AT_ONCE = 4
"""Parts whose loads are under way together."""


def combine_parts(
    out: BFloat16[Array, "B R 512"],
    lse: Float32[Array, "B R"],
    part_out: Float32[Array, "Z R 512"],
    part_lse: Float32[Array, "Z R"],
    plan: Plan,
    *,
    interpret: Any = None,
) -> tuple[BFloat16[Array, "B R 512"], Float32[Array, "B R"]]:
    """Twin of the plain form that its tests have, with the same bits at every run; R is a multiple of 4.

    Rows of sequences that were not split are neither read nor written: the results are the memory of `out` and `lse`.
    """
    num_parts, R = len(plan.parts), out.shape[1]
    layout = plgpu.Layout.WG_STRIDED((LATENT,), 4)

    def body(parts_ref, first_ref, splits_ref, part_out_ref, part_lse_ref, out_ref, lse_ref):
        part, first_row = lax.axis_index("part"), lax.axis_index("row_block") * ROWS
        rows = [first_row + i for i in range(ROWS)]
        seq = jnp.maximum(parts_ref[part, 2], 0)  # the last of this part; -1 where no sequence came yet
        num_splits = splits_ref[seq]

        def visit(group, states):
            indices = [group * AT_ONCE + i for i in range(AT_ONCE)]
            # Behind the last part, the last once more, without weight: other slots may hold NaN.
            slots = [_slot(part, jnp.minimum(i, num_splits - 1)) for i in indices]
            lses = [[part_lse_ref[slot, row] for slot in slots] for row in rows]
            tiles = [[plgpu.load(part_out_ref.at[slot, row], layout=layout) for slot in slots] for row in rows]
            lses = [[jnp.where(i < num_splits, x, -jnp.inf) for i, x in zip(indices, each)] for each in lses]
            return tuple(map(_add, states, lses, tiles))

        @pl.when((first_ref[seq] == part) & (num_splits > 1))
        def _():
            zeros = plgpu.layout_cast(jnp.zeros((LATENT,), jnp.float32), layout)
            start = ((jnp.float32(0), jnp.float32(NEVER), zeros),) * ROWS
            states = lax.fori_loop(0, (num_splits + AT_ONCE - 1) // AT_ONCE, visit, start)
            for row, (total, origin, acc) in zip(rows, states):
                has_keys = total != 0  # a NaN is shown, not hidden
                divisor = jnp.where(has_keys, total, 1.0)
                out_ref[seq, row] = (acc * (1.0 / divisor)).astype(jnp.bfloat16)
                lse_ref[seq, row] = jnp.where(has_keys, origin + jnp.log(divisor), jnp.inf)

    body.__name__ = "combine_parts"
    kernel = launch.kernel(
        body,
        out_type=(),
        grid=(num_parts, R // ROWS),
        grid_names=("part", "row_block"),
        has_own_barriers=True,  # it needs none: every thread writes what no other thread reads
        interpret=interpret,
    )
    out_ref, lse_ref = jax.new_ref(out), jax.new_ref(lse)
    kernel(plan.parts, plan.first_part, plan.num_splits, part_out, part_lse, out_ref, lse_ref)
    return jax.freeze(out_ref), jax.freeze(lse_ref)


def aot_cases() -> list[AotCase]:
    """Many sequences with all heads, in parts for 132 SMs; one sequence with half of them."""
    return [
        AotCase(
            f"mla_decode_combine b{B}-r{R}",
            combine_parts,
            (
                jax.ShapeDtypeStruct((B, R, LATENT), jnp.bfloat16),
                jax.ShapeDtypeStruct((B, R), jnp.float32),
                jax.ShapeDtypeStruct((2 * G, R, LATENT), jnp.float32),
                jax.ShapeDtypeStruct((2 * G, R), jnp.float32),
                jax.eval_shape(functools.partial(plan_splits, num_parts=G), jax.ShapeDtypeStruct((B,), jnp.int32)),
            ),
            (r"LDG?\.E\.128",),
            max_shared_bytes=0,
        )
        for B, R, G in ((128, 128, 66), (1, 64, 132))
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
