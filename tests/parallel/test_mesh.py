"""A mesh has all axes and all devices; what does not multiply to them is refused with what would."""

import re
from pathlib import Path

import jax
import pytest

from dsv3_jax.config.check import ConfigError
from dsv3_jax.config.load import load_config
from dsv3_jax.config.parallel import ParallelConfig
from dsv3_jax.model.functions import functions_for
from dsv3_jax.parallel.axes import AXES, ROWS
from dsv3_jax.parallel.mesh import make_mesh, mesh_shape, size_of
from dsv3_jax.training.mesh_step import step_on


@pytest.mark.parametrize(
    ("axes", "num_devices", "message"),
    [
        (
            {"pipe": 2, "expert": 3},
            8,
            "parallel: pipe 2 x expert 3 = 6 does not divide 8 devices; expert may be 1, 2 or 4.",
        ),
        ({"expert": 3}, 8, "parallel: expert 3 does not divide 8 devices; expert may be 1, 2, 4 or 8."),
        ({"pipe": 3, "expert": 2}, 8, "pipe 3 x expert 2 = 6 does not divide 8 devices; pipe may be 1, 2 or 4."),
        ({"pipe": 4, "tensor": 4}, 8, "= 16 does not divide 8 devices; pipe may be 1 or 2 or tensor may be 1 or 2."),
        ({"pipe": 3, "tensor": 3}, 8, "= 9 does not divide 8 devices; the product may be 1, 2, 4 or 8."),
        ({"expert": 6, "expert_nodes": 2}, 8, "parallel: expert 6 does not divide 8 devices; expert may be 2, 4 or 8."),
        ({"data": 3}, 8, "parallel: data 3 is not the 8 devices there are; data may be 8."),
        ({"data": 1}, 8, "parallel: data 1 is not the 8 devices there are; data may be 8."),
        ({"pipe": 2, "data": 2}, 8, "data 2 = 4 is not the 8 devices there are; pipe may be 4 or data may be 4."),
        ({"data": 3, "expert": 3}, 8, "data 3 x expert 3 = 9 is not the 8 devices there are; the product may be 8."),
        ({"pipe": 16, "expert": 64}, 1, "= 1024 does not divide one device; the product may be 1 (train.py --simulate"),
    ],
)
def test_axes_that_do_not_multiply_to_the_devices_are_refused(axes: dict, num_devices: int, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        mesh_shape(ParallelConfig(**axes), num_devices)


def test_every_mesh_has_all_axes_and_every_device():
    mesh = make_mesh(ParallelConfig(expert=4, expert_nodes=2))
    assert mesh.shape == {"pipe": 1, "data": 2, "node": 2, "expert": 2, "tensor": 1}
    assert tuple(mesh.shape) == AXES
    assert list(mesh.devices.flat) == jax.devices()
    assert size_of(mesh, ROWS) == 8
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    with pytest.raises(ConfigError, match="expert 4 does not divide 6 devices; expert may be 1, 2, 3 or 6"):
        make_mesh(ParallelConfig(expert=4), jax.devices()[:6])


def test_a_micro_batch_that_the_devices_cannot_share_is_refused_before_a_step_is_made(repository: Path):
    cfg = load_config(repository / "configs" / "tiny.py")
    mesh = make_mesh(cfg.parallel, jax.devices()[:6])
    with pytest.raises(ConfigError, match="micro=8 sequences cannot be shared by data 6 x expert 1 = 6 devices"):
        step_on(cfg, mesh, functions_for(cfg.precision))
