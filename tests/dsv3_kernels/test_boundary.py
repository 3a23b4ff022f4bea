"""What every op takes beside plain JAX arrays: NumPy arrays, and arrays on a mesh as `jax.make_mesh` makes it."""

from typing import Any

import jax
import numpy as np
import pytest

from tests.dsv3_kernels.splits import OPS, SPLITS, of_one_device

pytestmark = pytest.mark.usefixtures("compile_quickly")
FIRSTS = list({name.split(":")[0]: name for name in reversed(OPS)}.values())
"""A call of each op."""


def assert_same(found: Any, expected: Any) -> None:
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert isinstance(ours, jax.Array)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        # Sums over devices are rounded to bfloat16 in another order.
        assert np.linalg.norm(ours - theirs) <= 5e-3 * np.linalg.norm(theirs)


@pytest.mark.parametrize("name", FIRSTS)
def test_numpy_arrays_are_taken(name):
    op, arrays, _, _ = OPS[name]
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(arrays))
    assert_same(op(*arrays), of_one_device(name.split(":")[0]))


LOCAL = [name for name in OPS if name.endswith("pages")]
"""Page tables of a device's own pages."""


@pytest.mark.parametrize("name", [*(name for name in OPS if name not in LOCAL), "gradient of prefill: sequences"])
def test_arrays_on_a_mesh_of_explicit_axes_are_taken(name):
    """Each array is shared by devices as in `jax.shard_map`, twice."""
    op, arrays, specs, _ = SPLITS[name]
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4])
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda spec: jax.sharding.NamedSharding(mesh, spec), specs)
        found = jax.jit(op)(*jax.device_put(arrays, shardings))
    assert_same(found, of_one_device(name.split(":")[0]))
