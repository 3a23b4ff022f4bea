"""Whole runs of a midget by several processes of one CPU device each: as one process trains, ended together."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.training.checkpoint_files import finished
from train import main

pytestmark = [pytest.mark.multihost, pytest.mark.slow]

# What conftest.py, here or above, sets and results depend on; and a device each, as two would wait for each other.
NUMERICS = {
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    "JAX_NUM_CPU_DEVICES": "1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}
MIDGET = Path(__file__).parent / "midget.py"
SEQ_LEN = 16
CHANGED = ["train.batch.micro=4", "train.batch.start=4", "train.batch.full=4", "train.batch.ramp_tokens=0"]
CHANGED += ["model.num_layers=3", "train.remat=paper"]
"""One program for all steps, four blocks for the four stages of a pipeline, of which no weights may be saved."""

EVALUATED = ["train.output.eval_every=8", "train.output.final_eval_batches=2"]
HEARTBEAT_S = 10
LIMIT_S = 300
"""A process that takes longer than that hangs."""


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    text, shared = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("prepared") / "data"
    for name in ("json/scanner.py", "json/decoder.py", "keyword.py"):
        source = Path(json.__file__).parents[1] / name
        (text / name.replace("/", "_")).write_text(source.read_text()[:3000])
    output = ["eval_every=0", "final_eval_batches=0", "checkpoint_every=4", "keep_checkpoints=9"]
    sets = [f"data.paths={text}", f"data.cache_dir={shared}", "data.heldout_fraction=0.2", *CHANGED]
    sets += [f"train.output.{one}" for one in output]

    def arguments(run_dir: Path, *more: str) -> list[str]:
        return ["--config", str(MIDGET), "--run-dir", str(run_dir), "--set", *sets, *more]

    return arguments


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole run by this process on one device."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    assert main(command(run_dir, *EVALUATED)) == 0
    return run_dir


class Group:
    """Processes that train together. `limits`: the size of files that one may write."""

    def __init__(self, repository: Path, arguments: list[str], num: int, *, more: dict[int, list[str]], limits: dict):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            where = f"127.0.0.1:{probe.getsockname()[1]}"
        environment = {**os.environ, **NUMERICS, "PYTHONPATH": f"{repository}{os.pathsep}{repository / 'kernels'}"}
        self.processes = []
        for index in range(num):
            lines = [
                "import resource, runpy, sys",
                "from dsv3_jax.training import hosts",
                f"hosts.HEARTBEAT_S = {HEARTBEAT_S}",
                f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limits[index]},) * 2)" if index in limits else "",
                "sys.argv = sys.argv[1:]",
                "runpy.run_path(sys.argv[0], run_name='__main__')",
            ]
            own = ["--coordinator", where, "--processes", str(num), "--process", str(index)]
            program = [str(repository / "train.py"), *own, *arguments, *more.get(index, [])]
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", "\n".join(lines), *program],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    env=environment,
                )
            )

    def finish(self) -> tuple[list[int], list[str]]:
        """Exit codes and output of all; fails if one hangs."""
        outputs = [process.communicate(timeout=LIMIT_S)[0] for process in self.processes]
        return [process.returncode for process in self.processes], outputs


@pytest.fixture
def start(repository: Path) -> Iterator[Callable[..., Group]]:
    groups: list[Group] = []

    def start(arguments: list[str], num: int, *, more: dict | None = None, limits: dict | None = None) -> Group:
        groups.append(Group(repository, arguments, num, more=more or {}, limits=limits or {}))
        return groups[-1]

    yield start
    for process in (process for group in groups for process in group.processes):
        process.kill()
        process.communicate()


def rows_of(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def wait_for(is_ready: Callable[[], object], group: Group) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not is_ready() and time.monotonic() < deadline:
        if any(process.poll() is not None for process in group.processes):
            break
        time.sleep(0.01)


def assert_same_training(run_dir: Path, alone: Path) -> None:
    """Step by step the same batches: losses to 1e-6, expert loads to the token."""
    found, expected = rows_of(run_dir), rows_of(alone)
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    np.testing.assert_allclose([row["loss"] for row in found], [row["loss"] for row in expected], rtol=1e-6)
    for name in ("load_max_over_mean", "tokens", "learning_rate"):
        assert [row[name] for row in found] == [row[name] for row in expected]


def bits_per_byte(run_dir: Path) -> list[float]:
    return [json.loads(line)["bits_per_byte"] for line in (run_dir / "heldout.jsonl").read_text().splitlines()]


def steps_saved(run_dir: Path) -> list[int]:
    return [int(path.name) for path in finished(run_dir / "checkpoints")]


def test_two_processes_train_as_one_does(command, start, alone: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    codes, outputs = start(command(run_dir, "parallel.expert=2", *EVALUATED), 2).finish()
    assert codes == [0, 0], "\n".join(outputs)
    assert_same_training(run_dir, alone)
    np.testing.assert_allclose(bits_per_byte(run_dir), bits_per_byte(alone), rtol=1e-6)
    assert steps_saved(run_dir) == steps_saved(alone)
    assert sorted(file.name for file in (run_dir / "hf").iterdir()) == sorted(
        file.name for file in (alone / "hf").iterdir()
    )
    assert "bits per byte" in outputs[0]
    assert "bits per byte" not in outputs[1]


def test_killed_continued_by_others_and_stopped_by_one(command, start, alone: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    group = start(command(run_dir, "parallel.expert=2"), 2)
    wait_for(lambda: steps_saved(run_dir), group)
    group.processes[1].kill()
    started = time.monotonic()
    codes, outputs = group.finish()
    assert codes[1] == -signal.SIGKILL
    assert codes[0] != 0, outputs[0]
    assert time.monotonic() - started < 3 * HEARTBEAT_S + 30
    resumed = steps_saved(run_dir)[-1]
    assert resumed < len(rows_of(alone))

    copy = shutil.copytree(run_dir, tmp_path / "copy")
    assert main(command(copy)) == 0
    assert_same_training(copy, alone)

    before = rows_of(run_dir)[-1]["step"]
    group = start(command(run_dir, "parallel.expert=2", "parallel.pipe=2"), 4)
    wait_for(lambda: rows_of(run_dir)[-1]["step"] > before, group)
    group.processes[2].terminate()
    codes, outputs = group.finish()
    assert codes == [0, 0, 0, 0], "\n".join(outputs)
    assert "the same command continues" in outputs[0]
    assert steps_saved(run_dir)[-1] == rows_of(run_dir)[-1]["step"]
    assert main(command(run_dir)) == 0
    assert_same_training(run_dir, alone)


def test_a_full_disk_under_one_process_leaves_no_half_checkpoint(command, start, alone: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    assert main(command(run_dir, f"train.total_tokens={4 * 5 * SEQ_LEN}")) == 0
    before = steps_saved(run_dir)
    codes, outputs = start(command(run_dir, "parallel.expert=2"), 2, limits={1: 8000}).finish()
    assert codes[1] == 2, outputs[1]
    assert "saving the checkpoint of step" in outputs[1]
    assert codes[0] != 0
    assert steps_saved(run_dir) == before
    assert main(command(run_dir)) == 0
    assert_same_training(run_dir, alone)


def test_processes_that_disagree_are_refused_before_anything_starts(command, start, tmp_path: Path):
    run_dir = tmp_path / "run"
    group = start(command(run_dir, "parallel.expert=2"), 2, more={1: ["train.lr.peak=0.5"]})
    codes, outputs = group.finish()
    assert codes == [2, 2], "\n".join(outputs)
    assert "train.lr.peak: 0.01, there 0.5" in outputs[0]
    assert not run_dir.exists()
