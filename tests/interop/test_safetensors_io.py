"""Our reader and writer against the format's own library, and against broken files."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv3_jax.interop.safetensors_io import (
    DTYPES,
    INDEX,
    SINGLE,
    CheckpointError,
    read_folder,
    read_header,
    read_metadata,
    write_file,
)

WRITTEN = ("float32", "bfloat16", "float8_e4m3fn")


def write(file: Path, tensors: dict[str, np.ndarray]) -> Path:
    write_file(file, [(n, t.shape, t.dtype.name) for n, t in tensors.items()], tensors.items(), {"format": "pt"})
    return file


def random_tensor(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def test_the_library_reads_what_we_write(tmp_path):
    tensors = {"b": random_tensor((3, 5), "bfloat16", 0), "a": random_tensor((7,), "float32", 1)}
    file = write(tmp_path / SINGLE, tensors)
    read = safetensors.numpy.load_file(file)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(read[name].view(np.uint8), tensor.view(np.uint8))
    with safetensors.safe_open(file, framework="np") as opened:
        assert opened.metadata() == read_metadata(file) == {"format": "pt"}


def test_we_read_what_the_library_writes(tmp_path):
    tensors = {"x": random_tensor((4, 3), "float16", 0), "y": random_tensor((2,), "bfloat16", 1)}
    safetensors.numpy.save_file(tensors, tmp_path / SINGLE)
    stored = read_folder(tmp_path)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(stored[name].read().view(np.uint8), tensor.view(np.uint8))


@given(
    shapes=st.lists(
        st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(WRITTEN)), min_size=1, max_size=6
    )
)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_read_undoes_write_and_every_tensor_is_aligned(tmp_path, shapes):
    tensors = {
        f"t{i}": random_tensor(tuple(shape), dtype, i) if shape else np.array(1.5, np.float32).astype(dtype)
        for i, (shape, dtype) in enumerate(shapes)
    }
    stored = read_header(write(tmp_path / SINGLE, tensors))
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = stored[name].read()
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert read.tobytes() == tensor.tobytes()
        assert stored[name].start % tensor.dtype.itemsize == 0


def test_order_of_arrival_does_not_show(tmp_path):
    tensors = {name: random_tensor((4,), dtype, 3) for name, dtype in zip("abc", WRITTEN)}
    one = write(tmp_path / "one", tensors).read_bytes()
    two = write(tmp_path / "two", dict(reversed(tensors.items()))).read_bytes()
    assert one == two


def test_refuses_to_write_what_the_header_does_not_say(tmp_path):
    x = np.zeros((2, 2), np.float32)
    with pytest.raises(ValueError, match="no data came for 'b'"):
        write_file(tmp_path / "f", [("a", (2, 2), "float32"), ("b", (1,), "float32")], [("a", x)], {})
    with pytest.raises(ValueError, match=r"a: got float32 \(2, 2\), the header says float32 \(4,\)"):
        write_file(tmp_path / "f", [("a", (4,), "float32")], [("a", x)], {})


def damage_header(file: Path, change) -> None:
    """Rewrites the JSON header, data as it was."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


BROKEN = {
    "empty": (lambda file: file.write_bytes(b""), "truncated or not safetensors"),
    "html": (lambda file: file.write_bytes(b"<html>" * 50), "truncated or not safetensors"),
    "cut in the header": (lambda file: file.write_bytes(file.read_bytes()[:40]), "truncated or not safetensors"),
    "cut in the data": (lambda file: file.write_bytes(file.read_bytes()[:-1]), "truncated or damaged"),
    "too long": (lambda file: file.write_bytes(file.read_bytes() + b"x"), "truncated or damaged"),
    "no JSON": (lambda file: file.write_bytes((6).to_bytes(8, "little") + b"{nope}"), "header cannot be read"),
    "a list": (lambda file: file.write_bytes((2).to_bytes(8, "little") + b"[]"), "header cannot be read"),
    "no dtype": (lambda file: damage_header(file, lambda h: h["a"].pop("dtype")), "header cannot be read"),
    "another shape": (lambda file: damage_header(file, lambda h: h["a"].update(shape=[9])), r"'a' .*\(9,\).*36 bytes"),
    "another dtype": (lambda file: damage_header(file, lambda h: h["a"].update(dtype="BF16")), r"'a' .*BF16.*span"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_named(tmp_path, name):
    file = write(tmp_path / SINGLE, {"a": np.ones((4, 4), np.float32), "b": np.ones((2,), np.float32)})
    do, message = BROKEN[name]
    do(file)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_folder(tmp_path)
    assert str(file) in str(caught.value)
    assert "fetch" in str(caught.value)


def test_unknown_dtype_is_refused_only_when_read(tmp_path):
    safetensors.numpy.save_file({"a": np.arange(4), "b": np.ones(2, np.float32)}, tmp_path / SINGLE)
    stored = read_folder(tmp_path)
    assert stored["b"].read().tolist() == [1.0, 1.0]
    with pytest.raises(CheckpointError, match=r"'a' has dtype I64.*F32, BF16"):
        stored["a"].read()


def test_file_that_shrinks_after_its_header_was_read(tmp_path):
    file = write(tmp_path / SINGLE, {"a": np.ones((64,), np.float32)})
    stored = read_folder(tmp_path)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"ends inside tensor 'a' \(248 of 256 bytes\)"):
        stored["a"].read()


def shard(folder: Path) -> None:
    write(folder / "one.safetensors", {"a": np.ones(2, np.float32)})
    write(folder / "two.safetensors", {"b": np.ones(2, np.float32), "c": np.ones(3, np.float32)})
    weight_map = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def edit_index(folder: Path, **places: str | None) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= places
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file is not None}
    (folder / INDEX).write_text(json.dumps(index))


INCONSISTENT = {
    "missing shard": (lambda f: (f / "two.safetensors").unlink(), r"two.safetensors: shard is missing.*2 tensors.*'b'"),
    "elsewhere": (lambda f: edit_index(f, a="two.safetensors"), r"two.safetensors: tensor 'a' is not in this shard"),
    "not listed": (lambda f: edit_index(f, c=None), r"two.safetensors: holds tensor 'c'.*does not list"),
    "outside": (lambda f: edit_index(f, a="../one.safetensors"), r"'a' in '../one.safetensors', which is not a file"),
    "no map": (lambda f: (f / INDEX).write_text("{}"), r"index.json: cannot be read as an index"),
    "no JSON": (lambda f: (f / INDEX).write_text("nope"), r"index.json: cannot be read as an index"),
    "no weights": (lambda f: (f / INDEX).unlink(), r"has neither model.safetensors.index.json nor model.safetensors"),
}


@pytest.mark.parametrize("name", INCONSISTENT)
def test_index_and_shards_must_agree(tmp_path, name):
    shard(tmp_path)
    assert sorted(read_folder(tmp_path)) == ["a", "b", "c"]
    do, message = INCONSISTENT[name]
    do(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        read_folder(tmp_path)


def test_every_readable_dtype_has_the_size_of_its_name():
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1}
    assert DTYPES["F8_E4M3"] == np.dtype(ml_dtypes.float8_e4m3fn)
