"""Whole runs of a midget: stopped, killed, resumed, refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from dsv3_jax.config.load import load_config
from dsv3_jax.training.checkpoint import CheckpointFolder, load
from dsv3_jax.training.state import abstract_state
from train import main

# What conftest.py, here or above, sets and results depend on: other processes must compute as this one does.
NUMERICS = {
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    "JAX_NUM_CPU_DEVICES": "8",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}
MIDGET = Path(__file__).parent / "midget.py"
STEPS = 24


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for name in ("json/scanner.py", "json/decoder.py", "keyword.py"):
        source = Path(json.__file__).parents[1] / name
        (folder / name.replace("/", "_")).write_text(source.read_text()[:3000])
    return folder


@pytest.fixture(scope="module")
def command(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    shared = tmp_path_factory.mktemp("prepared") / "data"

    def arguments(run_dir: Path, *more: str) -> list[str]:
        sets = [f"data.paths={text}", f"data.cache_dir={shared}", "data.heldout_fraction=0.2", *more]
        return ["--config", str(MIDGET), "--run-dir", str(run_dir), "--set", *sets]

    return arguments


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(command(run_dir, "train.output.sample_tokens=8")) == 0
    return run_dir


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def final_arrays(run_dir: Path) -> dict[str, bytes]:
    """Every array of the last checkpoint, and the host's part of it."""
    abstract = abstract_state(load_config(MIDGET))
    average = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), abstract.params)
    found = CheckpointFolder(run_dir / "checkpoints", keep=2).newest()
    assert found is not None
    leaves = jax.tree_util.tree_leaves_with_path(load(found, abstract, average))
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}
    return arrays | {"host": json.dumps([found.host["tokens"], found.host["data"]]).encode()}


def same_run(run_dir: Path, undisturbed: Path) -> None:
    assert losses(run_dir) == losses(undisturbed)
    assert [step for step, *_ in losses(run_dir)] == list(range(1, STEPS + 1))
    assert final_arrays(run_dir) == final_arrays(undisturbed)


def start(arguments: list[str], repository: Path, before: str = "") -> subprocess.Popen:
    """train.py in a process of its own, after the statement `before`."""
    program = str(repository / "train.py")
    lines = [
        "import resource, runpy, sys",
        before,
        "sys.argv = sys.argv[1:]",
        "runpy.run_path(sys.argv[0], run_name='__main__')",
    ]
    code = "\n".join(lines)
    environment = {**os.environ, **NUMERICS, "PYTHONPATH": f"{repository}{os.pathsep}{repository / 'kernels'}"}
    return subprocess.Popen(
        [sys.executable, "-c", code, program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def wait_for_rows(run_dir: Path, num: int, process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + 300
    path = run_dir / "metrics.jsonl"
    while time.monotonic() < deadline and (process is None or process.poll() is None):
        if path.exists() and len(path.read_text().splitlines()) >= num:
            return
        time.sleep(0.005)


def test_a_finished_run_leaves_everything_behind(undisturbed: Path, capsys):
    for name in ("config.json", "metrics.jsonl", "heldout.jsonl", "training.png", "tokenizer.json", "hf/config.json"):
        assert (undisturbed / name).stat().st_size > 0, name
    steps = sorted(int(path.name) for path in (undisturbed / "checkpoints").iterdir())
    assert steps == [STEPS - 4, STEPS]
    rows = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    wanted = {"loss", "main_loss", "mtp_loss", "grad_norm", "learning_rate", "tokens_per_s", "mfu", "balance_loss"}
    assert wanted | {"load_max_over_mean", "bias_min", "bias_max"} <= rows[-1].keys()
    assert rows[-1]["bias_speed"] == 0.0
    assert rows[0]["mtp_weight"] > rows[-1]["mtp_weight"]
    assert rows[-1]["tokens"] - rows[-2]["tokens"] == 2 * (rows[1]["tokens"] - rows[0]["tokens"])


def test_a_finished_run_started_again_only_reports(command, undisturbed: Path, capsys):
    before = losses(undisturbed)
    assert main(command(undisturbed)) == 0
    assert losses(undisturbed) == before
    assert "bits per byte" in capsys.readouterr().out


@pytest.mark.slow
def test_sigterm_saves_and_the_next_start_continues_bit_for_bit(command, undisturbed: Path, tmp_path: Path):
    run_dir = tmp_path / "run"

    rows = run_dir / "metrics.jsonl"
    thread = when(lambda: rows.exists() and rows.read_text().count("\n") >= 10, signal.SIGTERM)
    assert main(command(run_dir)) == 0
    thread.join()
    assert 10 <= len(losses(run_dir)) < STEPS
    assert main(command(run_dir)) == 0
    same_run(run_dir, undisturbed)


def when(ready: Callable[[], bool], number: signal.Signals) -> threading.Thread:
    """Sends this process a signal as soon as `ready`."""

    def send() -> None:
        deadline = time.monotonic() + 300
        while not ready() and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_a_stop_before_the_first_step_leaves_with_the_signals_number(command, tmp_path: Path, capsys):
    thread = when((tmp_path / "run" / "config.json").exists, signal.SIGHUP)
    assert main(command(tmp_path / "run")) == 128 + signal.SIGHUP
    thread.join()
    assert "stopped by SIGHUP" in capsys.readouterr().out
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_stop_during_the_results_is_quick_and_the_next_start_computes_them(
    command, undisturbed: Path, tmp_path: Path
):
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    (run_dir / "training.png").unlink()
    before = set(run_dir.iterdir())
    # Training is over, so the log is opened only to be closed again, and the results follow.
    log = run_dir / "metrics.jsonl"
    opened = log.stat().st_ino
    thread = when(lambda: log.stat().st_ino != opened, signal.SIGTERM)
    assert main(command(run_dir)) == 0
    thread.join()
    assert set(run_dir.iterdir()) == before
    assert main(command(run_dir)) == 0
    assert (run_dir / "training.png").stat().st_size > 0


def test_what_fails_at_the_end_is_named_and_the_rest_is_done(command, undisturbed: Path, tmp_path: Path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    (run_dir / "training.png").unlink()
    (run_dir / "training.png").mkdir()
    shutil.rmtree(run_dir / "hf")
    assert main(command(run_dir, "train.output.sample_tokens=8", "train.output.final_eval_batches=1")) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: the picture failed: IsADirectoryError")
    assert "1 of " in out
    assert "this model" in out
    assert "sample" in out
    assert (run_dir / "hf" / "config.json").is_file()


@pytest.mark.slow
def test_no_batches_to_evaluate_means_no_evaluation(command, undisturbed: Path, tmp_path: Path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    before = (run_dir / "heldout.jsonl").read_text()
    one_step_more = losses(run_dir)[-1][0] + 1
    tokens = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["tokens"] + 1
    sets = ["train.output.eval_every=1", "train.output.eval_batches=0", "train.output.final_eval_batches=0"]
    assert main(command(run_dir, *sets, f"train.total_tokens={tokens}")) == 0
    out, err = capsys.readouterr()
    assert losses(run_dir)[-1][0] == one_step_more
    assert (run_dir / "heldout.jsonl").read_text() == before
    assert "bits per byte" in out  # of the compressors
    assert "this model" not in out
    assert err == ""


def test_kill_nine_and_the_next_start_continues_bit_for_bit(
    command, undisturbed: Path, tmp_path: Path, repository: Path
):
    run_dir = tmp_path / "run"
    process = start(command(run_dir), repository)
    wait_for_rows(run_dir, 8, process)
    process.kill()
    process.communicate()
    assert len(losses(run_dir)) < STEPS
    assert main(command(run_dir)) == 0
    same_run(run_dir, undisturbed)


@pytest.mark.slow
def test_a_run_moves_between_meshes(command, undisturbed: Path, tmp_path: Path, capsys):
    """Begun by two experts' peers, ended by one device: the batches and, but for rounding, the losses of one."""
    run_dir = tmp_path / "run"
    half = (8 * 2 + 4 * 4) * 16
    begun = command(run_dir, "parallel.expert=2", f"train.total_tokens={half}", "train.output.final_eval_batches=1")
    assert main(["--simulate-devices", "2", *begun]) == 0
    assert "this model" in capsys.readouterr().out
    assert main(command(run_dir)) == 0
    found, expected = (np.array(losses(folder)) for folder in (run_dir, undisturbed))
    np.testing.assert_array_equal(found[:, 0], expected[:, 0])
    np.testing.assert_allclose(found[:, 1], expected[:, 1], rtol=1e-6)


@pytest.mark.slow
def test_a_corrupt_newest_checkpoint_falls_back(command, undisturbed: Path, tmp_path: Path, capsys):
    run_dir = tmp_path / "run"
    half = (8 * 2 + 10 * 4) * 16
    assert main(command(run_dir, f"train.total_tokens={half}")) == 0
    newest = max((run_dir / "checkpoints").iterdir())
    damaged = max((file for file in newest.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-10])
    capsys.readouterr()
    assert main(command(run_dir)) == 0
    out = capsys.readouterr().out
    assert f"checkpoint {newest.name} is corrupt" in out
    assert "resuming after step 15" in out
    same_run(run_dir, undisturbed)


def test_the_run_dir_of_another_config_is_refused_with_the_difference(command, undisturbed: Path, capsys):
    before = losses(undisturbed)
    assert main(command(undisturbed, "train.lr.peak=0.5", "model.moe.top_k=1")) == 2
    message = capsys.readouterr().err
    assert "train.lr.peak: 0.01 -> 0.5" in message
    assert "model.moe.top_k: 3 -> 1" in message
    assert losses(undisturbed) == before


def test_bad_keys_exit_with_two_and_one_message(command, tmp_path: Path, capsys):
    assert main(command(tmp_path, "train.lr.peek=1")) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "did you mean 'train.lr.peak'" in message
    assert message.count("\n") == 1


def test_a_loss_that_is_not_finite_stops_with_three(command, tmp_path: Path, capsys):
    run_dir = tmp_path / "run"
    assert main(command(run_dir, "train.lr.peak=1e38", "train.lr.warmup_tokens=1")) == 3
    message = capsys.readouterr().err
    assert "not applied" in message
    assert "lower train.lr.peak" in message
    assert all(np.isfinite(loss) for _, loss, _ in losses(run_dir))


def test_a_second_process_is_kept_out(command, tmp_path: Path, capsys):
    import fcntl

    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with (run_dir / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert main(command(run_dir)) == 2
    assert "another process" in capsys.readouterr().err


@pytest.mark.slow
def test_a_full_disk_while_saving_leaves_the_old_checkpoint_good(
    command, undisturbed: Path, tmp_path: Path, repository: Path
):
    """The disk is "full" through a limit on the size of files, which the arrays exceed and the logs do not."""
    run_dir = tmp_path / "run"
    half = (8 * 2 + 10 * 4) * 16
    assert main(command(run_dir, f"train.total_tokens={half}")) == 0
    before = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    process = start(command(run_dir), repository, before="resource.setrlimit(resource.RLIMIT_FSIZE, (24_000,) * 2)")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output
    assert "saving the checkpoint of step" in output
    assert "untouched" in output
    assert set(before) <= {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert main(command(run_dir)) == 0
    same_run(run_dir, undisturbed)


@pytest.mark.slow
def test_metrics_that_cannot_be_written_end_the_run_saved(command, undisturbed: Path, tmp_path: Path, repository: Path):
    """The log is nearly as large as files may be here, and every checkpoint smaller."""
    run_dir = tmp_path / "run"
    half = (8 * 2 + 10 * 4) * 16
    assert main(command(run_dir, f"train.total_tokens={half}")) == 0
    log = run_dir / "metrics.jsonl"
    *rows, last = log.read_text().splitlines()
    log.write_text("\n".join([*rows, json.dumps({**json.loads(last), "note": "x" * 2_000_000})]) + "\n")
    limit = log.stat().st_size + 1500
    process = start(command(run_dir), repository, before=f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit},) * 2)")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "cannot write the metrics" in errors[0]
    assert "The checkpoint of step" in errors[0]
    assert main(command(run_dir)) == 0
    assert final_arrays(run_dir) == final_arrays(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(10))
def test_kill_nine_at_a_random_moment(command, undisturbed: Path, tmp_path: Path, repository: Path, moment: int):
    """Also inside a save: half of the moments are within milliseconds of a save's start."""
    rng = np.random.default_rng(moment)
    run_dir = tmp_path / "run"
    for _ in range(2):
        process = start(command(run_dir, "train.output.checkpoint_every=2"), repository)
        wait_for_rows(run_dir, int(rng.integers(2, STEPS)), process)
        time.sleep(float(rng.uniform(0, 0.05)) if moment % 2 else 0.0)
        process.kill()
        process.communicate()
    assert main(command(run_dir, "train.output.checkpoint_every=2")) == 0
    assert losses(run_dir) == losses(undisturbed)
    assert final_arrays(run_dir) == final_arrays(undisturbed)
