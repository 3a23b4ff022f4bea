"""One step for every mesh: which gradients, and how state and batches lie."""

import functools

from jax.sharding import Mesh

from dsv3_jax.config.mesh_rules import check_rows
from dsv3_jax.config.run import RunConfig
from dsv3_jax.model.functions import Functions
from dsv3_jax.parallel.axes import DATA, EXPERTS, PIPE, ROWS
from dsv3_jax.parallel.mesh import size_of
from dsv3_jax.training.batches import place
from dsv3_jax.training.pipelined import PipelineStep, make_pipeline_step
from dsv3_jax.training.sharded import sharded_gradients, used_axes
from dsv3_jax.training.state import state_shardings
from dsv3_jax.training.step import Step, make_step


def step_on(cfg: RunConfig, mesh: Mesh | None, functions: Functions) -> Step | PipelineStep:
    """The compiled step of `cfg` on `mesh`; one device, or no mesh, is the plain step.

    Its batches hold the rows of this process (`batches.own_rows`), which `Step.place` puts on the mesh.

    Raises:
        ConfigError: a micro-batch cannot be shared equally by the devices that its rows lie on.
    """
    if mesh is None or mesh.size == 1:
        return make_step(cfg, functions=functions)
    check_rows(cfg.train.batch, data=mesh.shape[DATA], expert=size_of(mesh, EXPERTS))
    if mesh.shape[PIPE] > 1:
        return make_pipeline_step(cfg, mesh, functions)
    rows = used_axes(mesh, ROWS)
    return make_step(
        cfg,
        gradients=sharded_gradients(cfg, mesh, functions),
        shardings=state_shardings(cfg, mesh),
        place=functools.partial(place, mesh=mesh, rows=rows),
    )
