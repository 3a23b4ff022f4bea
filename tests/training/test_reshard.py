"""A checkpoint of one mesh on every other."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dsv3_jax.config.load import to_dict
from dsv3_jax.config.parallel import ParallelConfig
from dsv3_jax.config.run import RunConfig
from dsv3_jax.interop.save import save_pretrained
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.training.checkpoint import CheckpointFolder, load, load_variables
from dsv3_jax.training.ema import HostEMA
from dsv3_jax.training.state import TrainState, abstract_state, state_shardings
from tests.small import make_config
from tests.training.conftest import small_config


@pytest.fixture(scope="module")
def cfg() -> RunConfig:
    """Eight experts; bfloat16 moments beside float32 parameters."""
    model = make_config(num_layers=4, model_dim=24, moe={"num_experts": 8, "num_groups": 4})
    return dataclasses.replace(small_config(), model=model, precision="fp8_dsv3")


def shardings_of(cfg: RunConfig, axes: dict[str, int]) -> TrainState:
    num = int(np.prod(list(axes.values())))
    return state_shardings(cfg, make_mesh(ParallelConfig(**axes), jax.devices()[:num]))


@pytest.fixture(scope="module")
def whole(cfg: RunConfig) -> TrainState:
    """Random numbers in every array of a state, on one device."""
    rng = np.random.default_rng(0)
    random = jax.tree.map(lambda leaf: 100 * rng.normal(size=leaf.shape), abstract_state(cfg))
    return jax.tree.map(lambda x, leaf: np.asarray(x).astype(leaf.dtype), random, abstract_state(cfg))


@pytest.fixture(scope="module")
def run_dir(cfg: RunConfig, whole: TrainState, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by a mesh of pipe 2 x expert 2."""
    return saved(
        tmp_path_factory.mktemp("run"), cfg, jax.device_put(whole, shardings_of(cfg, {"pipe": 2, "expert": 2}))
    )


def saved(run_dir: Path, cfg: RunConfig, state: TrainState) -> Path:
    average = HostEMA(state.params, decay=0.9)
    average.update(jax.tree.map(lambda leaf: leaf * leaf, state.params))
    folder = CheckpointFolder(run_dir / "checkpoints", keep=1)
    folder.save(3, state, average.average(), {"config": to_dict(cfg)})
    folder.close()
    average.close()
    return run_dir


def assert_same(left: Any, right: Any) -> None:
    """Bit for bit, with NumPy's view of arrays that lie anywhere."""
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def lying(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


@pytest.mark.parametrize("axes", [{}, {"data": 4}, {"expert": 8}, {"pipe": 4}], ids=str)
def test_every_mesh_restores_every_bit(cfg: RunConfig, whole: TrainState, run_dir: Path, axes: dict[str, int]):
    abstract, shardings = abstract_state(cfg), shardings_of(cfg, axes)
    average = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), abstract.params)
    if axes:
        abstract = jax.tree.map(lying, abstract, shardings)
        average = jax.tree.map(lying, average, shardings.params)
    found = CheckpointFolder(run_dir / "checkpoints", keep=1).newest()
    assert found is not None
    state, restored = load(found, abstract, average)
    assert_same(state, whole)
    assert_same(restored, jax.tree.map(lambda leaf: leaf * leaf, whole.params))
    if axes:
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings
        assert_same(HostEMA(restored, decay=0.9, num_updates=1).average(), restored)


def test_the_official_folder_is_that_of_one_device(cfg: RunConfig, whole: TrainState, run_dir: Path, tmp_path: Path):
    alone = saved(tmp_path / "alone", cfg, jax.device_put(whole))
    for use_average in (False, True):
        folders = [tmp_path / f"{use_average}{number}" for number in range(2)]
        for folder, source in zip(folders, (run_dir, alone), strict=True):
            save_pretrained(folder, cfg.model, load_variables(source, use_average=use_average)[1])
        names = sorted(file.name for file in folders[0].iterdir())
        assert names == sorted(file.name for file in folders[1].iterdir())
        for name in names:
            assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
