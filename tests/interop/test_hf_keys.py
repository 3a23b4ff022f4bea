"""The official key of each field: in its docstring, in the table of configs/README.md, and in what `to_hf` writes."""

import ast
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from dsv3_jax.config.model import MLAConfig, ModelConfig, MoEConfig, YarnConfig
from dsv3_jax.interop.hf_config import to_hf

PARTS = {"": ModelConfig, "mla": MLAConfig, "moe": MoEConfig, "yarn": YarnConfig}
TOGETHER = ("moe.score", "moe.has_bias")
"""V3 has sigmoid scores with a bias, V2 softmax scores without: neither changes alone."""


def documented() -> dict[str, set[str]]:
    """Official keys by field, as the docstrings state them."""
    found = {}
    for part, cls in PARTS.items():
        fields, docs = [], {}
        for node in ast.parse(inspect.getsource(cls)).body[0].body:  # type: ignore[attr-defined]
            if isinstance(node, ast.AnnAssign):
                fields.append(node.target.id)  # type: ignore[union-attr]
            elif isinstance(node, ast.Expr) and fields:
                docs[fields[-1]] = node.value.value  # type: ignore[attr-defined]
        for name in fields:
            if name not in PARTS or name in docs:
                keys = re.search(r"HF: ([\w., ]+)$", docs[name])
                assert keys, f"{cls.__name__}.{name} names no key"
                found[f"{part}.{name}".lstrip(".")] = set(keys[1].split(", ")) - {"none"}
    return found


KEYS = documented()


def flat(hf: dict[str, Any]) -> dict[str, Any]:
    inside = {f"rope_scaling.{key}": value for key, value in (hf["rope_scaling"] or {}).items()}
    return {**hf, **inside, "rope_scaling": hf["rope_scaling"] is None}


def changed(path: str) -> ModelConfig:
    """DeepSeek-V3 with another value of one field."""
    cfg = ModelConfig()
    if path in TOGETHER:
        moe = dataclasses.replace(cfg.moe, score="softmax", has_bias=False, normalize_weights=False)
        return dataclasses.replace(cfg, moe=moe, mtp_depth=0)
    part, _, name = path.rpartition(".")
    owner = getattr(cfg, part) if part else cfg
    value = getattr(owner, name)
    other = None if name == "yarn" else not value if isinstance(value, bool) else 2 * value or 3
    new = dataclasses.replace(owner, **{name: other})
    return dataclasses.replace(cfg, **{part: new}) if part else new


@pytest.mark.parametrize("path", [path for path, keys in KEYS.items() if keys])
def test_a_documented_key_is_the_one_that_changes(path: str) -> None:
    before, after = flat(to_hf(ModelConfig(), "float32")), flat(to_hf(changed(path), "float32"))
    keys = {key for key in before.keys() & after.keys() if before[key] != after[key]}
    assert KEYS[path] <= keys if path in TOGETHER else KEYS[path] == keys


def test_the_table_is_what_the_docstrings_say(repository: Path) -> None:
    text = (repository / "configs" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `model\.([\w.]+)` \| (.*) \|$", text, re.MULTILINE)
    same = {
        path: keys for path, keys in KEYS.items() if keys == {path.replace("yarn.", "rope_scaling.")} and "." in path
    }
    assert "| `model.yarn.*`, others | `rope_scaling.*`, the same names |" in text
    stated = {path: set(re.findall(r"`([\w.]+)`", keys)) for path, keys in rows} | same
    assert stated == {path: keys for path, keys in KEYS.items() if keys}
