from pathlib import Path

import pytest

from dsv3_jax.config.check import ConfigError
from dsv3_jax.config.load import load_config, to_dict
from dsv3_jax.config.stored import complete


@pytest.fixture(scope="module")
def tree(repository: Path) -> dict:
    return to_dict(load_config(repository / "configs" / "v2_lite_16b.py"))


def without(tree: dict, *keys: str) -> dict:
    """A copy that lacks some fields."""
    return {
        name: without(value, *(key.partition(".")[2] for key in keys if key.startswith(name + ".")))
        if isinstance(value, dict)
        else value
        for name, value in tree.items()
        if name not in keys
    }


def test_what_this_version_stores_is_complete(tree: dict):
    assert complete(tree, where="x") == tree


def test_a_missing_field_or_group_is_its_default(tree: dict):
    older = without(tree, "train.lr", "model.yarn", "data.paths", "model.moe.scale", "train.ema_every")
    found = complete(older, where="x")
    assert found["train"]["lr"]["peak"] == 2.2e-4
    assert found["model"]["yarn"]["factor"] == 40.0
    assert found["data"]["paths"] == []
    assert found["model"]["moe"]["scale"] == 2.5
    assert found["train"]["ema_every"] == 1
    assert found["model"]["moe"]["has_bias"] is False, "what is there stays"
    assert list(found["train"]) == list(tree["train"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "x: unknown field 'colour': a newer version of dsv3_jax wrote it"),
        ({"train": 3}, "x: train must be a group"),
        ({"model": {"moe": None}}, "x: model.moe must be a group"),
        ({"model": {"moe": {"width": 1}}}, "x: unknown field 'model.moe.width'"),
        ({"model": {"old": 2}}, "x: model.old=2 was written by another version .* does what 1 meant"),
    ],
)
def test_what_nothing_stands_for_is_refused_by_name(tree: dict, change: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        complete({**tree, **change}, where="x", retired={"model.old": 1})
    for wrong in ([], None, "x", 3):
        with pytest.raises(ConfigError, match="x: it must be a group"):
            complete(wrong, where="x")
    with pytest.raises(ConfigError, match="'name' is missing"):
        complete(without(tree, "name"), where="x")


def test_a_retired_field_with_the_value_of_today_is_dropped(tree: dict):
    older = {**tree, "model": {**tree["model"], "old": 1}}
    assert complete(older, where="x", retired={"model.old": 1}) == tree
    assert complete({**tree, "data": {**tree["data"], "shuffle_rows": 2048}}, where="x") == tree
