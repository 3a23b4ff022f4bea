"""Which thread block casts which tiles."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels import launch

WARPGROUPS = 3
"""Of a thread block that stays: 168 registers a thread, and three tiles whose loads are under way."""


def kernel_over_tiles(
    cast: Callable[..., None],
    tiles: tuple[int, ...],
    *,
    name: str,
    out_type: Any,
    num_sms: int | None,
    warpgroups: int = WARPGROUPS,
    scratch_types: Callable[..., Sequence[Any]] = lambda *lead: (),
    interpret: Any,
) -> Callable[..., Any]:
    """A kernel in which a warpgroup calls cast(index, *references) for each index below `tiles`.

    On all multiprocessors a thread block takes one tile, and the GPU balances them. On `num_sms` so many blocks stay,
    whose `warpgroups` take tiles in turns. `scratch_types` gives what a warpgroup needs, with leading axes for all;
    profiles show `name`.
    """
    sizes: dict[str, Any] = {"out_type": out_type, "interpret": interpret}
    if num_sms is None:
        names = tuple(f"tile{axis}" for axis in range(len(tiles)))

        def cast_one(*refs: Any) -> None:
            cast(tuple(lax.axis_index(name) for name in names), *refs)

        cast_one.__name__ = name
        return launch.kernel(cast_one, grid=tiles, grid_names=names, scratch_types=scratch_types(), **sizes)

    is_shared = warpgroups > 1
    scratch = list(scratch_types(warpgroups) if is_shared else scratch_types())

    def cast_many(*refs: Any) -> None:
        arrays, own = refs[: len(refs) - len(scratch)], refs[len(refs) - len(scratch) :]
        if is_shared:
            own = [ref.at[lax.axis_index("warpgroup")] for ref in own]

        # Neighbouring tiles go to different multiprocessors, so that all have work where tiles are few.
        @plgpu.nd_loop(tiles, collective_axes=("warpgroup", "sm") if is_shared else "sm")
        def _(info: Any) -> None:
            cast(info.index, *arrays, *own)

    cast_many.__name__ = name
    if is_shared:
        sizes |= {"num_threads": warpgroups, "thread_name": "warpgroup"}
    num_blocks = min(math.prod(tiles), num_sms)
    return launch.kernel(cast_many, grid=(num_blocks,), grid_names=("sm",), scratch_types=scratch, **sizes)
