"""What `train.py` tells of a mesh before it makes anything."""

from pathlib import Path

import pytest

import train


@pytest.fixture
def told(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A function of arguments: exit code, stdout and stderr of train.py; it has left no file behind."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = train.main(["--config", str(repository / "configs" / "tiny.py"), *arguments])
        assert list(tmp_path.iterdir()) == []
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_a_plan_shows_the_mesh_and_what_a_device_holds(told):
    batch = [f"train.batch.{name}=4096" for name in ("micro", "start", "full")]
    code, text, _ = told("--simulate-devices", "4096", "--plan", "--set", "parallel.expert=4", *batch)
    assert code == 0
    assert "4,096 devices" in text
    assert "data      1024  rows of a batch" in text
    assert "80 GB hold it" in text
    assert "1 devices" in told("--plan")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "8 --set parallel.pipe=2 parallel.expert=3",
            "num_experts=16 is not divisible by parallel.expert=3; expert may",
        ),
        ("6 --set parallel.expert=4", "parallel: expert 4 does not divide 6 devices; expert may be 1, 2, 3 or 6."),
        ("6", "train.batch.micro=8 sequences cannot be shared by data 6 x expert 1 = 6 devices; data x expert may be"),
        ("8 --set parallel.sequence=2", "'parallel.sequence': context parallelism is not built"),
        ("0", "--simulate-devices 0 must be at least 1."),
    ],
)
def test_a_mesh_that_does_not_fit_ends_a_run_before_it_begins(told, arguments: str, message: str):
    for plan in ([], ["--plan"]):
        code, _, errors = told("--simulate-devices", *arguments.split(), *plan)
        assert code == 2
        assert errors.startswith("error: ")
        assert message in errors
