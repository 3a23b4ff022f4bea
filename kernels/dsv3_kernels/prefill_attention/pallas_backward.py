"""What the two kernels of the backward pass share: rows that stay, rows that pass by, and how they are brought.

Both make the probabilities again from lse: P = exp(scale · q kᵀ - lse), dS = P · (dO vᵀ - delta). One has 128 keys of a
head and visits tiles of queries (`pallas_key_gradients`), one has 128 queries and visits blocks of keys
(`pallas_query_gradients`). No atomics, so gradients are the same each time.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels import launch
from dsv3_kernels.prefill_attention.pallas_parts import CONSUMERS, QK_DIM, ROWS, V_DIM, matrix_memory

STAGES = 3
"""80 KiB of rows that stay, and 40 KiB a stage of rows that pass by: 200 of 227 KiB."""

Copies = list[tuple[Any, Any]]
"""Sources in global memory, and the shared memory they go to, of which the first axis is the warpgroup or the stage."""


def slot_of(i: jax.Array, begin: jax.Array) -> jax.Array:
    """The stage of block i where `begin` is the first."""
    return lax.rem(i - begin, np.int32(STAGES))


def bring(
    staying: Callable[[int], Copies],
    passing: Callable[[Any], Copies],
    stay_full: Any,
    full: Any,
    empty: Any,
    begin: jax.Array,
    end: jax.Array,
) -> None:
    """The loader: the rows that each consumer holds, then blocks begin .. end - 1 through the stages."""
    for w in range(CONSUMERS):
        for source, target in staying(w):
            plgpu.copy_gmem_to_smem(source, target.at[w], stay_full.at[w])

    @pl.loop(begin, end)
    def _(i):
        slot = slot_of(i, begin)

        @pl.when(i - begin >= STAGES)
        def _():
            plgpu.barrier_wait(empty.at[slot])

        for source, target in passing(i):
            plgpu.copy_gmem_to_smem(source, target.at[slot], full.at[slot])

    # Sees every slot released, so that no barrier is left half way when the loader ends.
    @pl.loop(jnp.maximum(begin, end - STAGES), end)
    def _(i):
        plgpu.barrier_wait(empty.at[slot_of(i, begin)])


def backward_kernel(
    body: Callable[..., None],
    *,
    out_type: Any,
    grid: tuple[int, int, int],
    vectors: Sequence[Any],
    num_staying: int,
    num_passing: int,
    interpret: Any,
) -> Callable[..., Any]:
    """A kernel over (b, h, tile) with a loader and the consumers.

    `body` gets inputs, outputs, and in shared memory the two matrices that stay, the two that pass by, `vectors`, and
    the barriers: a consumer's rows are there, a stage is full, a stage is empty. `num_staying` and `num_passing` copies
    fill a consumer's rows and a stage.
    """
    return launch.kernel(
        body,
        out_type=out_type,
        grid=grid,
        grid_names=("b", "h", "tile"),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        scratch_types=[
            *(matrix_memory(count, ROWS, width) for count in (CONSUMERS, STAGES) for width in (QK_DIM, V_DIM)),
            *vectors,
            plgpu.Barrier(num_arrivals=num_staying, num_barriers=CONSUMERS),
            plgpu.Barrier(num_arrivals=num_passing, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES),
        ],
        approx_math=True,
        interpret=interpret,
    )


def vector_memory(count: int, dtype: jax.typing.DTypeLike) -> Any:
    """Shared memory for a value of each row, of every warpgroup or stage."""
    return plgpu.SMEM((count, ROWS), dtype)
