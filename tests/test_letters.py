"""Every dimension letter of a signature is in the legend of its package: `dsv3_jax/typing.py`, `dsv3_kernels`."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest

PACKAGES = {
    "dsv3_jax": Path("dsv3_jax/typing.py"),
    "kernels/dsv3_kernels": Path("kernels/dsv3_kernels/__init__.py"),
}
SPELLED_OUT = {"batch", "columns", "places", "slots", "stages", "ticks", "width"}
"""Names that are words."""


def axes(file: Path) -> Iterator[str]:
    """The names in the shapes of a file's annotations, without what a suffix spells out: `M_blocks` is M."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Subscript) or not hasattr(jaxtyping, getattr(node.value, "id", "-")):
            continue
        shape = node.slice.elts[-1] if isinstance(node.slice, ast.Tuple) else None
        if isinstance(shape, ast.Constant) and isinstance(shape.value, str):
            for name in re.findall(r"[A-Za-z]\w*", shape.value):
                yield name.split("_")[0]


def legend(file: Path) -> set[str]:
    """The letters of the table in a file's docstring."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return set(re.findall(r"(?:^|\| )\|? *([A-Za-z]\d?) +\|", docstring, re.MULTILINE))


def is_known(name: str, stated: set[str]) -> bool:
    """Whether it is a letter of the legend, a part of such an axis (lower case), or a word."""
    return name in stated | SPELLED_OUT or (name.islower() and name.upper() in stated)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_letter_is_in_the_legend(package: str, repository: Path) -> None:
    used: dict[str, set[str]] = {}
    for file in sorted((repository / package).rglob("*.py")):
        for name in axes(file):
            used.setdefault(name, set()).add(file.relative_to(repository).as_posix())
    stated = legend(repository / PACKAGES[package])
    missing = {name: sorted(files) for name, files in used.items() if not is_known(name, stated)}
    assert not missing, f"not in the legend of {PACKAGES[package]}: {missing}"
