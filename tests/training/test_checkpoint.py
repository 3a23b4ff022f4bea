import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config.load import from_dict, to_dict
from dsv3_jax.training.checkpoint import (
    MANIFEST,
    CheckpointError,
    CheckpointFolder,
    find_damage,
    load_variables,
)
from dsv3_jax.training.state import TrainState, init_state


def state_of(value: float) -> TrainState:
    """A state with every kind of leaf, and one empty branch."""
    params = {"w": jnp.full((3, 2), value), "half": jnp.full((4,), value, jnp.bfloat16)}
    opt_state = ({}, {"count": jnp.int32(value), "mu": jax.tree.map(jnp.zeros_like, params)})
    return TrainState(params, {}, opt_state, jnp.arange(2, dtype=jnp.uint32))


def average_of(value: float) -> dict:
    return {"w": np.full((3, 2), value, np.float32), "half": np.full(4, value, np.float32)}


def filled(tmp_path: Path, steps=(1, 2, 3), keep: int = 5) -> tuple[CheckpointFolder, list[str]]:
    said: list[str] = []
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=keep, say=said.append)
    for step in steps:
        folder.save(step, state_of(step), average_of(-step), {"tokens": step * 10**12, "config": {"name": "x"}})
    folder.wait()
    return folder, said


def save_and_wait(folder: CheckpointFolder, step: int) -> None:
    folder.save(step, state_of(step), average_of(step), {})
    folder.wait()


def abstract() -> TrainState:
    return jax.eval_shape(lambda: state_of(0))


def test_everything_comes_back_bit_for_bit(tmp_path: Path):
    folder, _ = filled(tmp_path)
    found = folder.restore_newest(abstract(), average_of(0))
    assert found is not None
    assert found.step == 3
    assert found.host["tokens"] == 3 * 10**12
    expected = jax.tree_util.tree_leaves_with_path(state_of(3))
    for (path, old), (_, new) in zip(expected, jax.tree_util.tree_leaves_with_path(found.state), strict=True):
        assert old.dtype == new.dtype, path
        np.testing.assert_array_equal(old, new)
    assert found.state.router_state == {}
    np.testing.assert_array_equal(found.average["w"], average_of(-3)["w"])


def test_the_state_may_be_overwritten_while_it_is_saved(tmp_path: Path):
    folder = CheckpointFolder(tmp_path, keep=2)
    bump = jax.jit(lambda state: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state), donate_argnums=0)
    state = TrainState({"w": jnp.zeros((256, 256))}, {}, ({"count": jnp.int32(0)},), jnp.zeros(2, jnp.uint32))
    average = {"w": np.zeros((256, 256), np.float32)}
    folder.save(1, state, average, {})
    for _ in range(20):
        state = bump(state)
        average["w"] += 1
    folder.wait()
    found = folder.restore_newest(jax.eval_shape(lambda: state), average)
    assert found is not None
    assert float(jnp.abs(found.state.params["w"]).max()) == 0.0
    assert np.abs(found.average["w"]).max() == 0.0


def test_only_the_newest_are_kept(tmp_path: Path):
    folder, _ = filled(tmp_path, steps=(1, 2, 3, 4), keep=2)
    assert folder.steps() == [3, 4]
    assert sorted(path.name for path in folder.folder.iterdir()) == ["000000000003", "000000000004"]


def test_damage_to_any_file_is_found(tmp_path: Path):
    folder, _ = filled(tmp_path, steps=(1,))
    path = folder.folder / "000000000001"
    assert find_damage(path) is None
    files = [file for file in path.rglob("*") if file.is_file()]
    assert len(files) > 10
    for file in files:
        whole = file.read_bytes()
        if whole:
            file.write_bytes(whole[: len(whole) // 2])
            assert find_damage(path) is not None, file
            flipped = bytearray(whole)
            flipped[len(whole) // 2] ^= 0x10
            file.write_bytes(bytes(flipped))
            assert find_damage(path) is not None, file
        file.unlink()
        assert find_damage(path) is not None, file
        file.write_bytes(whole)
        assert find_damage(path) is None


def test_a_corrupt_newest_falls_back_to_the_one_before_and_says_so(tmp_path: Path):
    folder, said = filled(tmp_path)
    files = (file for file in (folder.folder / "000000000003").rglob("*") if file.is_file())
    largest = max(files, key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    found = folder.restore_newest(abstract(), average_of(0))
    assert found is not None
    assert found.step == 2
    assert "000000000003 is corrupt" in said[0]
    assert folder.steps() == [1, 2]
    folder.save(3, state_of(3), average_of(3), {})
    folder.wait()
    assert folder.steps() == [1, 2, 3]


def test_when_all_are_corrupt_it_does_not_start_anew_silently(tmp_path: Path):
    folder, _ = filled(tmp_path, steps=(1, 2))
    for step in folder.steps():
        (folder.folder / f"{step:012d}" / MANIFEST).write_text("{")
    with pytest.raises(CheckpointError, match="every checkpoint"):
        folder.restore_newest(abstract(), average_of(0))
    with pytest.raises(CheckpointError, match="every checkpoint"):
        folder.restore_newest(abstract(), average_of(0))


def test_an_unfinished_save_is_never_taken(tmp_path: Path):
    """Whatever subset of the files exists, without a manifest it is not a checkpoint."""
    folder, said = filled(tmp_path, steps=(1, 2))
    (folder.folder / "000000000002" / MANIFEST).unlink()
    (folder.folder / "000000000007.orbax-checkpoint-tmp").mkdir()
    assert folder.steps() == [1]
    folder.clean()
    assert len(said) == 2
    assert [path.name for path in folder.folder.iterdir()] == ["000000000001"]
    found = folder.restore_newest(abstract(), average_of(0))
    assert found is not None
    assert found.step == 1


# tensorstore calls back into the event loop that Orbax closed when the first write failed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_save_that_fails_leaves_the_old_one_good(tmp_path: Path):
    folder, _ = filled(tmp_path, steps=(1,))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"step 2.*the checkpoint of step 1 is untouched"):
            save_and_wait(folder, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    folder.clean()
    found = folder.restore_newest(abstract(), average_of(0))
    assert found is not None
    assert found.step == 1
    folder.save(2, state_of(2), average_of(2), {})
    folder.wait()
    assert folder.steps() == [1, 2]


def test_variables_are_read_without_the_rest(tmp_path: Path, small):
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=5)
    state = init_state(small)
    average = jax.tree.map(lambda leaf: np.full(leaf.shape, 9, np.float32), state.params)
    folder.save(4, state, average, {"config": to_dict(small)})
    folder.wait()
    config, variables = load_variables(tmp_path)
    assert from_dict(config) == small
    for ours, theirs in zip(jax.tree.leaves(variables), jax.tree.leaves(state.variables), strict=True):
        assert isinstance(ours, np.ndarray)
        np.testing.assert_array_equal(ours, theirs)
    _, averaged = load_variables(tmp_path, use_average=True)
    assert all((leaf == 9).all() for leaf in jax.tree.leaves(averaged["params"]))
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        load_variables(tmp_path)
