import argparse
import re
from pathlib import Path

import pytest

from dsv3_jax.config.arguments import add_config_arguments


def parse(arguments: list[str], *given: str, **options) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_config_arguments(parser, *given, **options)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def test_set_takes_one_key_or_several_once_or_again():
    found = parse(["a.py", "--set", "x=1", "y=2", "--json", "--set", "z=-3"])
    assert (found.config, found.set, found.json) == ("a.py", ["x=1", "y=2", "z=-3"], True)
    assert parse(["--set=x=1", "--config", "a.py"], "--config").set == ["x=1"]
    assert parse([], default="b.py").config == "b.py"
    assert parse([], "--config", default="b.py").config == "b.py"
    assert parse([], default="b.py").set == []


@pytest.mark.parametrize(("config", "name"), [("config", "FILE"), ("--config", "--config")])
def test_a_file_must_be_given(config: str, name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse([], config)
    assert f"required: {name}" in capsys.readouterr().err


def test_every_program_takes_its_configuration_alike(repository: Path):
    """Whatever calls `load_config` on its arguments has these arguments from here."""
    wrong = []
    for path in [*repository.glob("*.py"), *(repository / "dsv3_jax").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        is_alike = re.search(r" load_config\((\w+)\.config, \1\.set\)", text) and "add_config_arguments(" in text
        if " load_config(" in text and "def load_config" not in text and not is_alike:
            wrong.append(path.name)
        if '"--set"' in text and path.name != "arguments.py":
            wrong.append(path.name)
    assert wrong == []
