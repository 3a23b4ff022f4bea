import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config.check import UserError
from dsv3_jax.data import shards

RECORDS = [np.arange(n) % 250 for n in (3, 0, 5, 1, 7, 2)]


@settings(deadline=None, max_examples=20)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any), limit=st.integers(1, 20))
def test_records_come_back_whatever_the_files(tmp_path_factory, sizes, limit):
    folder = tmp_path_factory.mktemp("shards") / "s"
    records = [np.arange(size) + i for i, size in enumerate(sizes) if size]
    found = shards.write(folder, records, dtype="uint16", max_shard_items=limit)
    assert len(found) == len(records)
    assert found.num_items == sum(map(len, records))
    for i, record in enumerate(records):
        np.testing.assert_array_equal(found[i], record)
        assert found[i].dtype == np.uint16


def test_outside_indices_raise(tmp_path):
    found = shards.write(tmp_path / "s", RECORDS, dtype="uint16")
    for index in (-1, len(RECORDS)):
        with pytest.raises(IndexError, match="outside"):
            found[index]


def test_nothing_written_opens_as_nothing(tmp_path):
    assert len(shards.write(tmp_path / "s", [], dtype="uint16")) == 0


def _damage_nothing_but(what, folder):
    items = folder / "00000.items.npy"
    if what == "truncated":
        items.write_bytes(items.read_bytes()[:-4])
    elif what == "altered":
        data = bytearray(items.read_bytes())
        data[-1] ^= 1
        items.write_bytes(data)
    elif what == "missing":
        items.unlink()
    elif what == "no index":
        (folder / "index.json").unlink()
    elif what == "index cut":
        index = folder / "index.json"
        index.write_text(index.read_text()[:20])
    elif what == "offsets of other shards":
        np.save(folder / "00000.offsets.npy", np.array([0, 1], np.uint64))
    elif what == "newer format":
        index = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps({**index, "format": 99}))


@pytest.mark.parametrize(
    "what",
    ["truncated", "altered", "missing", "no index", "index cut", "offsets of other shards", "newer format"],
)
def test_damage_is_noticed_with_the_remedy(tmp_path, what):
    shards.write(tmp_path / "s", RECORDS, dtype="uint16")
    _damage_nothing_but(what, tmp_path / "s")
    with pytest.raises(UserError, match="delete the folder"):
        shards.open_shards(tmp_path / "s")
