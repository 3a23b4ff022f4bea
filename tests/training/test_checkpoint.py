import contextlib
import json
import os
import resource
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config.load import from_dict, to_dict
from dsv3_jax.training.checkpoint import CheckpointFolder, load, load_variables
from dsv3_jax.training.checkpoint_files import HOST, MANIFEST, CheckpointError, find_damage, inventory
from dsv3_jax.training.state import TrainState, init_state


def state_of(value: float) -> TrainState:
    """A state with every kind of leaf, and one empty branch."""
    params = {"w": jnp.full((3, 2), value), "half": jnp.full((4,), value, jnp.bfloat16)}
    opt_state = ({}, {"count": jnp.int32(value), "mu": jax.tree.map(jnp.zeros_like, params)})
    return TrainState(params, {}, opt_state)


def average_of(value: float) -> dict:
    return {"w": np.full((3, 2), value, np.float32), "half": np.full(4, value, np.float32)}


def filled(tmp_path: Path, steps=(1, 2, 3), keep: int = 5) -> tuple[CheckpointFolder, list[str]]:
    said: list[str] = []
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=keep, log=said.append)
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
    found = folder.newest()
    assert found is not None
    assert found.step == 3
    assert found.host["tokens"] == 3 * 10**12
    state, average = load(found, abstract(), average_of(0))
    expected = jax.tree_util.tree_leaves_with_path(state_of(3))
    for (path, old), (_, new) in zip(expected, jax.tree_util.tree_leaves_with_path(state), strict=True):
        assert old.dtype == new.dtype, path
        np.testing.assert_array_equal(old, new)
    assert state.router_state == {}
    np.testing.assert_array_equal(average["w"], average_of(-3)["w"])


def test_other_arrays_than_asked_for_are_refused(tmp_path: Path):
    folder, _ = filled(tmp_path, steps=(1,))
    found = folder.newest()
    assert found is not None
    other = abstract()._replace(params={"v": jax.ShapeDtypeStruct((7,), jnp.float32)})
    with pytest.raises(CheckpointError, match="000000000001 is whole but cannot be loaded"):
        load(found, other)


def test_the_state_may_be_overwritten_while_it_is_saved(tmp_path: Path):
    folder = CheckpointFolder(tmp_path, keep=2)
    bump = jax.jit(lambda state: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state), donate_argnums=0)
    state = TrainState({"w": jnp.zeros((256, 256))}, {}, ({"count": jnp.int32(0)},))
    average = {"w": np.zeros((256, 256), np.float32)}
    folder.save(1, state, average, {})
    for _ in range(20):
        state = bump(state)
        average["w"] += 1
    folder.wait()
    found = folder.newest()
    assert found is not None
    restored, restored_average = load(found, jax.eval_shape(lambda: state), average)
    assert float(jnp.abs(restored.params["w"]).max()) == 0.0
    assert np.abs(restored_average["w"]).max() == 0.0


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
    found = folder.newest()
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
        folder.newest()
    with pytest.raises(CheckpointError, match="every checkpoint"):
        folder.newest()


def test_a_corrupt_checkpoint_set_aside_is_never_overwritten(tmp_path: Path):
    """Nor forgotten: each start names it."""
    folder, said = filled(tmp_path, steps=(1, 2))
    for _ in range(2):
        (folder.folder / "000000000002" / HOST).write_text("[]")
        found = folder.newest()
        assert found is not None
        assert found.step == 1
        save_and_wait(folder, 2)
    names = ["000000000001", "000000000002", "000000000002.corrupt", "000000000002.corrupt-2"]
    assert sorted(path.name for path in folder.folder.iterdir()) == names
    said.clear()
    folder.clean()
    assert [line.split(" is a corrupt")[0].rpartition("/")[2] for line in said] == names[2:]


def damaged_json() -> dict[str, bytes]:
    """What a JSON file may hold after an accident, or by somebody's hand."""
    outside = json.dumps({HOST: [2, 0], "../../notes.txt": [2, 0]})
    kinds = {"empty": b"", "list": b"[]", "number": b"3", "null": b"null", "text": b"\xff\xfe", "cut": b'{"a": [1'}
    return kinds | {
        "deep": b"[" * 10**6,
        "outside": outside.encode(),
        "absolute": b'{"host.json": [], "/etc/hosts": []}',
    }


def test_json_of_any_kind_is_damage(tmp_path: Path):
    folder, _ = filled(tmp_path, steps=(1,))
    path = folder.folder / "000000000001"
    for name in (MANIFEST, HOST):
        whole, manifest = (path / name).read_bytes(), (path / MANIFEST).read_bytes()
        for kind, text in damaged_json().items():
            (path / name).write_bytes(text)
            assert find_damage(path) is not None, (name, kind)
            if name == HOST:
                (path / MANIFEST).unlink()
                (path / MANIFEST).write_text(json.dumps(inventory(path)))
                assert (find_damage(path) is None) == (kind in ("outside", "absolute")), "these are objects"
                (path / MANIFEST).write_bytes(manifest)
        (path / name).write_bytes(whole)
    with (path / MANIFEST).open("wb") as stream:
        stream.truncate(2**40)
    assert "bytes" in str(find_damage(path))


def test_an_unfinished_save_is_never_taken(tmp_path: Path):
    """Whatever subset of the files exists, without a manifest it is not a checkpoint."""
    folder, said = filled(tmp_path, steps=(1, 2))
    (folder.folder / "000000000002" / MANIFEST).unlink()
    (folder.folder / "000000000007.orbax-checkpoint-tmp").mkdir()
    (folder.folder / "000000000008.orbax-checkpoint-tmp-1700000000" / "params").mkdir(parents=True)
    assert folder.steps() == [1]
    folder.clean()
    assert len(said) == 3
    assert [path.name for path in folder.folder.iterdir()] == ["000000000001"]
    found = folder.newest()
    assert found is not None
    assert found.step == 1


def test_only_what_a_save_left_behind_is_removed(tmp_path: Path):
    """A user's folders, files and links stay, in the folder of checkpoints, beside a step's arrays, in place of one."""
    folder, said = filled(tmp_path, steps=(1, 2, 3))
    for name in ("notes", "100", "000000000100.old", "keep/000000000100", "tmp.orbax-checkpoint-tmp", "²"):
        (folder.folder / name).mkdir(parents=True)
        (folder.folder / name / MANIFEST).write_text("{}")
    (folder.folder / "000000000009").write_text("a file")
    (folder.folder / "000000000003" / MANIFEST).unlink()
    (folder.folder / "000000000003" / "why.txt").write_text("the loss of step 3 looks odd")
    (folder.folder / "000000000002").rename(tmp_path / "elsewhere")
    (folder.folder / "000000000002").symlink_to(tmp_path / "elsewhere")
    (folder.folder / "000000000004").symlink_to(tmp_path / "nowhere")
    (tmp_path / "unfinished").mkdir()
    (folder.folder / "000000000005").symlink_to(tmp_path / "unfinished")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    folder.clean()
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    assert ["why.txt, which no save writes" in line for line in said] == [True]
    assert folder.steps() == [1, 2], "a link is followed"
    for step in (3, 4, 5, 9):
        with pytest.raises(CheckpointError, match="move away what lies there"):
            folder.save(step, state_of(0), None, {})
    said.clear()
    narrow = CheckpointFolder(folder.folder, keep=1, log=said.append)
    save_and_wait(narrow, 6)
    assert narrow.steps() == [2, 6], "keep-N deletes no link"
    assert find_damage(tmp_path / "elsewhere") is None
    assert said == ["checkpoint 000000000002 is left beyond train.output.keep_checkpoints: it is a link."]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read_is_neither_corrupt_nor_unfinished(tmp_path: Path):
    folder, said = filled(tmp_path, steps=(1, 2))
    for path in (folder.folder / "000000000002" / HOST, folder.folder / "000000000002"):
        mode = path.stat().st_mode
        path.chmod(0)
        with pytest.raises(CheckpointError, match="cannot be read"):
            folder.newest()
        with contextlib.suppress(CheckpointError):
            folder.clean()
        path.chmod(mode)
    assert said == []
    assert folder.steps() == [1, 2]


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
    for _ in range(100):  # other threads of Orbax may still be writing into the folder that is being removed
        with contextlib.suppress(CheckpointError):
            folder.clean()
            break
        time.sleep(0.1)
    found = folder.newest()
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
