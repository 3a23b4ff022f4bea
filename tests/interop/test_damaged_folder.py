"""Whatever is in a folder's small files, only a `UserError` leaves `load_pretrained`."""

import contextlib
import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dsv3_jax as ds
from dsv3_jax.config.check import UserError
from dsv3_jax.interop.safetensors_io import INDEX, SINGLE

ODD: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    4.0,
    0.5,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "a",
    "false",
]
ODD += ["..", "\0", "\ud800", "F8_E4M3", "I64", "model.safetensors", [], {}, [[]], [0, 0], ["a"], {"a": {}}]


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory) -> Path:
    """A copy of tiny_a whose files are damaged and restored."""
    made = tmp_path_factory.mktemp("damaged")
    source = golden / "hf" / "tiny_a"
    shutil.copy(source / "config.json", made)
    shutil.copy(source / SINGLE, made)
    return made


def header_of(folder: Path) -> tuple[dict, int]:
    with (folder / SINGLE).open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return json.loads(stream.read(length)), length


def damaged(value: Any, data: st.DataObject) -> Any:
    """`value` with one part of it replaced, removed, or renamed."""
    value = copy.deepcopy(value)
    node: Any = value
    for _ in range(4):
        if not isinstance(node, dict | list) or not node:
            return data.draw(st.sampled_from(ODD))
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if isinstance(node[key], dict | list) and node[key] and data.draw(st.booleans()):
            node = node[key]
            continue
        match data.draw(st.integers(0, 5)):
            case 0:
                del node[key]
            case 1 if isinstance(node, dict):
                node[data.draw(st.sampled_from(["x", "__metadata__", "model.layers.3.eh_proj.weight"]))] = node.pop(key)
            case _:
                node[key] = data.draw(st.sampled_from(ODD))
        break
    return value


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_only_user_errors_leave(folder, data):
    config, (header, length) = json.loads((folder / "config.json").read_text()), header_of(folder)
    index = {"weight_map": {name: SINGLE for name in header if name != "__metadata__"}}
    where = data.draw(st.sampled_from(["config", "header", "index", "bytes"]))
    files = {
        folder / "config.json": (folder / "config.json").read_bytes(),
        folder / SINGLE: (folder / SINGLE).read_bytes(),
    }
    try:
        if where == "config":
            (folder / "config.json").write_text(json.dumps(damaged(config, data)))
        elif where == "index":
            (folder / INDEX).write_text(json.dumps(damaged(index, data)))
        elif where == "header":
            text = json.dumps(damaged(header, data)).encode()
            weights = files[folder / SINGLE][8 + length :]
            (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + weights)
        else:
            file = data.draw(st.sampled_from(sorted(files)))
            raw = bytearray(files[file])
            for place in data.draw(st.lists(st.integers(0, min(len(raw), 8 + length) - 1), min_size=1, max_size=4)):
                raw[place] = data.draw(st.sampled_from([0, 0x22, 0x2C, 0x30, 0x39, 0x5B, 0x7B, 0x7D, 0x80, 0xFF]))
            file.write_bytes(raw)
        with contextlib.suppress(UserError):
            ds.load_pretrained(folder, log=lambda line: None)
    finally:
        for file, content in files.items():
            file.write_bytes(content)
        (folder / INDEX).unlink(missing_ok=True)
