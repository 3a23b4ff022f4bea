"""The Python examples of the README run as they stand."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.usefixtures("compile_quickly")
@pytest.mark.parametrize("code", BLOCKS, ids=[f"block{number}" for number in range(len(BLOCKS))])
def test_example_runs(code: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(repository / "configs")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(README), "exec"), {"__name__": "readme"})


def test_there_are_examples() -> None:
    assert len(BLOCKS) == 2


def test_named_folders_and_programs_exist(repository: Path) -> None:
    text = README.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:dsv3_jax|configs|kernels|tests)/[\w/.]*|\w+\.py)`", text):
        assert (repository / name).exists(), f"README names {name}"
