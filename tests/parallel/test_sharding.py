"""How parameters are stored: on the meshes of the report, and on small ones."""

import math
from types import SimpleNamespace

import jax
import pytest
from jax.sharding import PartitionSpec

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.model.params import ParamSpec, abstract_params
from dsv3_jax.parallel.axes import AXES
from dsv3_jax.parallel.sharding import store


def mesh_of(*sizes: int) -> SimpleNamespace:
    return SimpleNamespace(shape=dict(zip(AXES, sizes, strict=True)))


def leaf(shape: tuple[int, ...], *axes: str | None) -> ParamSpec:
    return ParamSpec(shape, jax.numpy.dtype("float32"), axes)


def flat(entry) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


@pytest.mark.parametrize("sizes", [(16, 2, 8, 8, 1), (1, 32, 8, 8, 1), (4, 4, 2, 4, 8), (1, 3, 1, 4, 1)])
def test_every_leaf_of_671b_is_split_evenly_and_an_axis_splits_it_once(sizes) -> None:
    mesh = mesh_of(*sizes)
    for spec in jax.tree.leaves(abstract_params(ModelConfig()), is_leaf=lambda x: isinstance(x, ParamSpec)):
        stored = store(spec, mesh)
        split = [flat(entry) for entry in stored.spec]
        for length, axes in zip(spec.shape, split, strict=True):
            assert length % math.prod(mesh.shape[axis] for axis in axes) == 0
        assert len({axis for axes in split for axis in axes}) == sum(map(len, split))
        for dim, axes in stored.gathers:
            assert split[dim] == axes
            assert spec.axes[dim] != "layers"
        gathered = dict(stored.gathers)
        assert [() if dim in gathered else axes for dim, axes in enumerate(split)] == [flat(e) for e in stored.used]


def test_a_length_that_all_axes_do_not_divide_is_split_with_another_dimension() -> None:
    stored = store(leaf((129280, 7168), "vocab", "embed"), mesh_of(16, 2, 8, 8, 1))
    assert stored.spec == PartitionSpec(("pipe", "data", "node"), ("expert",))
    assert stored.gathers == ((0, ("pipe", "data", "node")), (1, ("expert",)))


def test_experts_lie_with_their_peers_and_are_split_over_the_rest() -> None:
    stored = store(leaf((58, 256, 7168, 2, 2048), "layers", "expert", "embed", None, "ffn"), mesh_of(16, 2, 8, 8, 1))
    assert stored.spec == PartitionSpec(None, ("node", "expert"), ("pipe", "data"), None, None)
    assert stored.used == PartitionSpec(None, ("node", "expert"), None, None, None)


def test_what_no_axis_divides_has_copies() -> None:
    assert store(leaf((5, 7), "layers", "embed"), mesh_of(1, 5, 1, 2, 1)).spec == PartitionSpec(None, None)
