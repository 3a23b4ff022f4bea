"""The files that start a run on a cluster, with a cluster played by small scripts."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from train import parse


def played(folder: Path, *, code: int) -> dict[str, str]:
    """An environment whose `srun` and `scontrol` note their arguments."""
    for name, body in {"srun": f"exit {code}", "scontrol": "true"}.items():
        program = folder / name
        program.write_text(f'#!/bin/sh\necho {name} "$@" >> {folder}/calls\n{body}\n')
        program.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "77"}


@pytest.mark.parametrize(
    ("code", "is_done", "is_requeued"), [(0, False, True), (0, True, False), (2, False, False), (143, False, False)]
)
def test_a_job_that_has_saved_without_being_done_is_queued_again(
    repository: Path, tmp_path: Path, code: int, is_done: bool, is_requeued: bool
):
    environment = played(tmp_path, code=code)
    if is_done:
        (tmp_path / "a run" / "hf").mkdir(parents=True)
        (tmp_path / "a run" / "hf" / "config.json").touch()
    script = ["bash", str(repository / "launch" / "slurm.sbatch"), "configs/tiny.py", str(tmp_path / "a run")]
    found = subprocess.run([*script, "--set", "seed=1"], env=environment, check=False)
    assert found.returncode == code
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0].startswith("srun --kill-on-bad-exit=1 ")
    assert calls[0].endswith("--set seed=1")
    assert calls[1:] == (["scontrol requeue 77"] if is_requeued else [])


def test_the_commands_are_those_of_train_py(repository: Path):
    for name in ("slurm.sbatch", "kubernetes.yaml"):
        text = (repository / "launch" / name).read_text().replace("\\\n", " ")
        command = re.search(r"python train\.py (.*?)( &)?$", text, re.MULTILINE)
        assert command is not None
        words = [word.replace("$JOB_COMPLETION_INDEX", "1") for word in shlex.split(command.group(1)) if word != "$@"]
        given = parse(words)
        assert given.config
        assert (given.processes is None) == (name == "slurm.sbatch")


def test_signals_come_in_time_to_save(repository: Path):
    assert "#SBATCH --signal=TERM@300" in (repository / "launch" / "slurm.sbatch").read_text()
    assert "#SBATCH --requeue" in (repository / "launch" / "slurm.sbatch").read_text()
    assert "terminationGracePeriodSeconds: 300" in (repository / "launch" / "kubernetes.yaml").read_text()
