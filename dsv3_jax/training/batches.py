"""Batches on a mesh: which rows are whose, and how NumPy rows become arrays there."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config.check import check
from dsv3_jax.data.batch import Batch


def own_rows(num_rows: int, mesh: Mesh, rows: tuple[str, ...]) -> slice:
    """Those of a batch's `num_rows`, split over the axes `rows`, that the devices of this process hold.

    Processes that differ in other axes alone, such as the ranks of a pipeline, hold the same.

    Raises:
        ConfigError: they are not neighbours, because the mesh has the devices of a process apart.
    """
    sharding = NamedSharding(mesh, PartitionSpec(rows or None))
    indices = sharding.addressable_devices_indices_map((num_rows,)).values()
    held = {index[0].indices(num_rows)[:2] for index in indices if index is not None}
    start, stop = min(first for first, _ in held), max(last for _, last in held)
    check(
        sum(last - first for first, last in held) == stop - start,
        f"a process holds rows {sorted(held)} of {num_rows}, which are not neighbours; make the mesh of devices in the "
        "order of jax.devices().",
    )
    return slice(start, stop)


def place(batch: Batch, mesh: Mesh, rows: tuple[str, ...]) -> Batch:
    """This process's rows of a batch as arrays on the mesh, split over the axes `rows`."""

    def put(leaf: Any, spec: PartitionSpec) -> jax.Array:
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), leaf)

    return jax.tree.map(put, batch, batch_specs(batch, rows))


def batch_specs(batch: Batch, rows: tuple[str, ...]) -> Batch:
    """How a batch lies whose rows are split over the axes `rows`; stacked micro-batches, too."""
    stacked = (None,) * (batch.tokens.ndim - 2)
    first, second = PartitionSpec(*stacked, rows or None), PartitionSpec(*stacked, None, rows or None)
    specs = Batch(first, second, second, first, first, first)
    return Batch(*(None if leaf is None else spec for leaf, spec in zip(batch, specs, strict=True)))
