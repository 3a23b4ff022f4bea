"""One step for every mesh: which gradients, and how state and batches lie."""

import functools

from jax.sharding import Mesh

from dsv3_jax.config.run import RunConfig
from dsv3_jax.model.functions import Functions
from dsv3_jax.parallel.axes import ROWS
from dsv3_jax.training.batches import place
from dsv3_jax.training.sharded import sharded_gradients, used_axes
from dsv3_jax.training.state import state_shardings
from dsv3_jax.training.step import Step, make_step


def step_on(cfg: RunConfig, mesh: Mesh | None, functions: Functions) -> Step:
    """The compiled step of `cfg` on `mesh`; one device, or no mesh, is the plain step.

    Its batches hold the rows of this process (`batches.own_rows`), which `Step.place` puts on the mesh.
    """
    if mesh is None or mesh.size == 1:
        return make_step(cfg, functions=functions)
    rows = used_axes(mesh, ROWS)
    return make_step(
        cfg,
        gradients=sharded_gradients(cfg, mesh, functions),
        shardings=state_shardings(cfg, mesh),
        place=functools.partial(place, mesh=mesh, rows=rows),
    )
