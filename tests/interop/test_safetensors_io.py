"""Our reader and writer against the format's own library, and against broken files."""

import json
import os
import tracemalloc
from collections.abc import Callable
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


def header_file(file: Path, header: str | bytes, num_bytes: int) -> Path:
    """A file of that header and as many bytes of data."""
    text = header.encode() if isinstance(header, str) else header
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(num_bytes))
    return file


def header(**entries: object) -> str:
    return json.dumps(entries, separators=(",", ":"))


def entry(start: object, stop: object, shape: object = (2,), dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


A = header(a=entry(0, 8))
HEADERS: dict[str, tuple[str | bytes, int, str | None]] = {
    "spaces after it": (A + " \n", 8, None),
    "spaces before it": (" " + A, 8, None),
    "nothing": ("{}", 0, None),
    "empty tensors": (header(a=entry(0, 0, (0, 5)), b=entry(0, 8)), 8, None),
    "no dimensions": (header(a=entry(0, 4, ())), 4, None),
    "null metadata": ('{"__metadata__":null,' + A[1:], 8, None),
    "types that we do not load": (header(a=entry(0, 8, (1,), "I64"), b=entry(8, 12, (8,), "F4")), 12, None),
    "one name twice": (header(a=entry(0, 8), b=entry(8, 16)).replace('"b"', '"a"'), 16, "it gives 'a' twice"),
    "one dtype twice": (A.replace('"dtype":', '"dtype":"F32","dtype":'), 8, "it gives 'dtype' twice"),
    "overlap": (header(a=entry(0, 8), b=entry(4, 12)), 12, "tensor 'b' overlaps tensor 'a'"),
    "the same bytes": (header(a=entry(0, 8), b=entry(0, 8)), 8, "tensor 'b' overlaps tensor 'a'"),
    "an empty tensor inside": (header(a=entry(4, 4, (0,)), b=entry(0, 8)), 8, "tensor 'a' overlaps tensor 'b'"),
    "hole": (header(a=entry(0, 8), b=entry(24, 32)), 32, "tensor 'b' leaves a hole after tensor 'a'"),
    "hole at the start": (header(a=entry(4, 12)), 12, "tensor 'a' leaves a hole after the header"),
    "hole at the end": (A, 12, "truncated or damaged"),
    "backwards": (header(a=entry(8, 0)), 8, "needs 8 bytes, but its offsets span -8"),
    "float offset": (header(a=entry(0.0, 8)), 8, "'a' is described by"),
    "negative offset": (header(a=entry(-8, 0)), 8, "'a' is described by"),
    "true as offset": (header(a=entry(False, 8)), 8, "'a' is described by"),
    "text as offset": (header(a=entry("0", "8")), 8, "'a' is described by"),
    "three offsets": (A.replace("[0,8]", "[0,8,8]"), 8, "'a' is described by"),
    "huge offset": (header(a=entry(0, 2**80)), 8, "'a' is described by"),
    "offset of many digits": (A.replace("8]", "9" * 5000 + "]"), 8, "is not JSON"),
    "float size": (header(a=entry(0, 8, (2.0,))), 8, "'a' is described by"),
    "infinite size": (A.replace("[2]", "[Infinity]"), 8, "'a' is described by"),
    "negative sizes": (header(a=entry(0, 8, (-1, -2))), 8, "'a' is described by"),
    "true as size": (header(a=entry(0, 4, (True,))), 4, "'a' is described by"),
    "a number as shape": (header(a=entry(0, 8, 2)), 8, "'a' is described by"),
    "sizes beyond 64 bits": (header(a=entry(0, 0, (2**40, 2**40))), 0, "needs"),
    "object as dtype": (header(a=entry(0, 8, (2,), {})), 8, "'a' is described by"),
    "unknown dtype": (header(a=entry(0, 8, (2,), "F32X")), 8, "dtype 'F32X', which the safetensors format"),
    "list as entry": ('{"a":[1,2]}', 0, "'a' is described by"),
    "metadata of numbers": ('{"__metadata__":{"x":1},' + A[1:], 8, "__metadata__ .* object of strings"),
    "metadata as text": ('{"__metadata__":"x",' + A[1:], 8, "__metadata__ .* object of strings"),
    "deep": ("[" * 200_000, 0, "header is nested deeper"),
    "not UTF-8": (b'{"\xff":1}', 0, "header is not JSON"),
    "byte order mark": ("\ufeff" + A, 8, "header is not JSON"),
    "zeros after it": (A + "\0\0", 8, "header is not JSON"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_header_is_read_as_the_library_reads_it(tmp_path, name):
    """What one refuses, the other does; a name that comes twice is refused by us alone."""
    text, num_bytes, message = HEADERS[name]
    file = header_file(tmp_path / SINGLE, text, num_bytes)
    if message is None:
        with safetensors.safe_open(file, "np") as theirs:
            assert {n: list(t.shape) for n, t in read_header(file).items()} == {
                n: theirs.get_slice(n).get_shape()
                for n in theirs.keys()  # noqa: SIM118 - it is no mapping
            }
        return
    with pytest.raises(CheckpointError, match=message) as caught:
        read_folder(tmp_path)
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 1000
    if "overlap" not in name and "twice" not in name:
        with pytest.raises(safetensors.SafetensorError):
            safetensors.safe_open(file, "np")


def test_header_beyond_the_format_is_refused_unread(tmp_path):
    """A sparse file of a gigabyte, of which the header claims all."""
    file = tmp_path / SINGLE
    with file.open("wb") as stream:
        stream.write((2**30).to_bytes(8, "little"))
        stream.truncate(8 + 2**30)
    tracemalloc.start()
    for read in (read_header, read_metadata):
        with pytest.raises(CheckpointError, match="claims 1,073,741,824 bytes, but the format allows 100,000,000"):
            read(file)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


BROKEN = {
    "empty": (lambda file: file.write_bytes(b""), "truncated or not safetensors"),
    "html": (lambda file: file.write_bytes(b"<html>" * 50), "truncated or not safetensors"),
    "cut in the header": (lambda file: file.write_bytes(file.read_bytes()[:40]), "truncated or not safetensors"),
    "cut in the data": (lambda file: file.write_bytes(file.read_bytes()[:-1]), "truncated or damaged"),
    "too long": (lambda file: file.write_bytes(file.read_bytes() + b"x"), "truncated or damaged"),
    "no JSON": (lambda file: file.write_bytes((6).to_bytes(8, "little") + b"{nope}"), "header is not JSON"),
    "a list": (lambda file: file.write_bytes((2).to_bytes(8, "little") + b"[]"), "header must be a JSON object"),
    "no dtype": (
        lambda file: damage_header(file, lambda h: h["a"].pop("dtype")),
        "'a' is described by .* needs a dtype",
    ),
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


def replace(file: Path, make: Callable[[Path], object]) -> None:
    file.unlink()
    make(file)


INCONSISTENT = {
    "missing shard": (lambda f: (f / "two.safetensors").unlink(), r"two.safetensors: shard is missing.*2 tensors.*'b'"),
    "elsewhere": (lambda f: edit_index(f, a="two.safetensors"), r"two.safetensors: tensor 'a' is not in this shard"),
    "not listed": (lambda f: edit_index(f, c=None), r"two.safetensors: holds tensor 'c'.*does not list"),
    "outside": (
        lambda f: edit_index(f, a="../one.safetensors"),
        r"'a' in '../one.safetensors', which is not the name of a file",
    ),
    "no map": (lambda f: (f / INDEX).write_text("{}"), r"index.json: cannot be read as an index"),
    "no JSON": (lambda f: (f / INDEX).write_text("nope"), r"index.json: is not JSON"),
    "no file": (lambda f: edit_index(f, a=""), r"'a' in '', which is not the name of a file"),
    "parent": (lambda f: edit_index(f, a=".."), r"'a' in '..', which is not the name of a file"),
    "absolute": (lambda f: edit_index(f, a=str(f / "one.safetensors")), r"which is not the name of a file"),
    "number": (lambda f: edit_index(f, a=1), r"'a' in 1, which is not the name of a file"),
    "control characters": (lambda f: edit_index(f, a="\0\x1b[2J"), r"which is not the name of a file"),
    "a very long name": (lambda f: edit_index(f, a="x" * 5000), r"shard is missing"),
    "in both": (
        lambda f: write(f / "one.safetensors", {"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)}),
        r"'b', which .* places in two",
    ),
    "list": (lambda f: (f / INDEX).write_text('{"weight_map": ["a"]}'), r"weight_map must be an object"),
    "null": (lambda f: (f / INDEX).write_text('{"weight_map": null}'), r"weight_map must be an object.*None"),
    "twice": (lambda f: (f / INDEX).write_text('{"weight_map": {"a": "x", "a": "y"}}'), r"gives 'a' twice"),
    "deep": (lambda f: (f / INDEX).write_text("[" * 200_000), r"index.json: is nested deeper"),
    "a single file too": (
        lambda f: write(f / SINGLE, {"a": np.ones(2, np.float32)}),
        r"model.safetensors and .*index.json, which",
    ),
    "folder as shard": (lambda f: replace(f / "two.safetensors", os.mkdir), r"two.safetensors: is not a plain file"),
    "pipe as shard": (lambda f: replace(f / "two.safetensors", os.mkfifo), r"two.safetensors: is not a plain file"),
    "pipe as index": (lambda f: replace(f / INDEX, os.mkfifo), r"index.json: is not a plain file"),
    "dangling link": (
        lambda f: replace(f / INDEX, lambda p: p.symlink_to("gone")),
        r"a link to a file that is missing",
    ),
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
    sizes = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E8M0": 1}
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == sizes
    assert DTYPES["F8_E4M3"] == np.dtype(ml_dtypes.float8_e4m3fn)
