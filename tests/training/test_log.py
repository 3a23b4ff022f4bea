import contextlib
import json
import resource
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.config.check import UserError
from dsv3_jax.training.log import HELDOUT, METRICS, LogError, RunLog, read_rows
from dsv3_jax.training.metrics import flat, load_ratio, mfu
from dsv3_jax.training.plot import plot_run, smooth
from dsv3_jax.training.tensorboard import Event, SessionLog


def test_resuming_drops_rows_that_will_be_written_again(tmp_path: Path):
    log = RunLog(tmp_path, step=0, tensorboard=False)
    for step in range(1, 6):
        log.write({"step": step, "loss": 0.1 + step})
        log.write_heldout({"step": step, "loss": float(step)})
    log.close()
    log = RunLog(tmp_path, step=3, tensorboard=False)
    log.write({"step": 4, "loss": 4.1})
    log.close()
    assert [row["step"] for row in read_rows(tmp_path / METRICS)] == [1, 2, 3, 4]
    assert [row["step"] for row in read_rows(tmp_path / HELDOUT)] == [1, 2, 3]


def test_floats_survive_in_full(tmp_path: Path):
    value = float(np.float32(1 / 3))
    log = RunLog(tmp_path, step=0, tensorboard=False)
    log.write({"step": 1, "loss": value})
    log.close()
    RunLog(tmp_path, step=1, tensorboard=False).close()
    assert json.loads((tmp_path / METRICS).read_text())["loss"] == value


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path):
    (tmp_path / METRICS).write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [row["step"] for row in read_rows(tmp_path / METRICS)] == [1, 2]


def test_lines_that_are_no_rows_are_set_aside(tmp_path: Path):
    row = json.dumps({"step": 2, "loss": 1.5}).encode()
    damaged = [b"\0" * 64, row[:9] + row, b"\xff\xfe", b'{"loss": 1}', b'{"step": "3"}', b"[2]", b"[" * 10**5]
    lines = [b'{"step": 1}', *damaged, row, b'{"step": 2, "loss": 2.5}', b""]
    for name in (METRICS, HELDOUT):
        (tmp_path / name).write_bytes(b"\n".join(lines))
    assert read_rows(tmp_path / METRICS) == [{"step": 1}, {"step": 2, "loss": 2.5}]
    told: list[str] = []
    for _ in range(2):
        RunLog(tmp_path, step=2, tensorboard=False, warn=told.append).close()
    assert len(told) == 2
    assert "7; moved to metrics.jsonl.damaged" in told[0]
    assert (tmp_path / "heldout.jsonl.damaged").read_bytes().split(b"\n")[:-1] == damaged


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What a full disk looks like to a program that writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_error_that_closing_does_not_hide(tmp_path: Path):
    log = RunLog(tmp_path, step=0, tensorboard=False)
    with files_of_at_most(4000):
        with pytest.raises(LogError, match="cannot write the metrics"):
            log.write({"step": 1, "load": [1.0] * 1000})
        log.close()


def test_a_failing_tensorboard_is_told_once_and_the_log_goes_on(tmp_path: Path):
    told: list[str] = []
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "tensorboard").write_text("in the way")
    for folder, size in (("full", 30_000), ("file", 10**9)):
        (tmp_path / folder).mkdir(exist_ok=True)
        log = RunLog(tmp_path / folder, step=0, tensorboard=True, warn=told.append)
        with files_of_at_most(size):
            for step in range(1, 40):
                log.write({"step": step, "load": [1.0] * 60})
            log.close()
        assert log.tensorboard_failure in told[-1]
        assert len(read_rows(tmp_path / folder / METRICS)) == 39
    assert len(told) == 2


def test_tensorboard_has_one_value_a_tag_and_step(tmp_path: Path):
    log = RunLog(tmp_path, step=3, tensorboard=True)
    log.write({"step": 4, "tokens": 40, "loss": 3.0, "load": [1.0, 2.0]})
    log.write_heldout({"step": 4, "tokens": 40, "loss": 2.5})
    log.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    events = [Event.FromString(record) for record in records(file.read_bytes())]
    assert events[0].file_version == "brain.Event:2"
    assert (events[1].step, events[1].session_log.status) == (4, SessionLog.START)
    points = {(value.tag, event.step): value.simple_value for event in events for value in event.summary.value}
    assert points == {
        ("train/tokens", 4): 40,
        ("train/loss", 4): 3.0,
        ("train/load/0", 4): 1.0,
        ("train/load/1", 4): 2.0,
        ("heldout/tokens", 4): 40,
        ("heldout/loss", 4): 2.5,
    }


def records(data: bytes) -> Iterator[bytes]:
    """Length, checksum, record, checksum; again and again."""
    at = 0
    while at < len(data):
        (size,) = struct.unpack("<Q", data[at : at + 8])
        yield data[at + 12 : at + 12 + size]
        at += 16 + size


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the metrics"):
        RunLog(tmp_path / "file", step=0, tensorboard=False)


def test_load_ratio_is_one_when_even_and_experts_when_all_on_one():
    ratio = load_ratio(np.array([[3, 3, 3, 3], [12, 0, 0, 0], [0, 0, 0, 0]]))
    np.testing.assert_array_equal(ratio, [1.0, 4.0, 1.0])
    assert mfu(10.0, 5.0, 100.0) == 0.5
    assert flat({"a": 1, "b": [2.0, 3.0]}) == {"a": 1.0, "b/0": 2.0, "b/1": 3.0}


def test_smooth_is_the_mean_of_what_came_before():
    np.testing.assert_allclose(smooth(np.array([1.0, 3.0, 5.0, 7.0]), 2), [1, 2, 4, 6])


@pytest.mark.parametrize("num_rows", [0, 1, 30])
def test_a_picture_is_drawn_of_any_run(tmp_path: Path, num_rows: int):
    rows: list[dict] = [
        {
            "step": i,
            "tokens": 100 * i,
            "main_loss": 5 / i,
            "mtp_loss": [6 / i],
            "load_max_over_mean": [1.5, 1.2],
            "learning_rate": 1e-3,
            "grad_norm": 1.0,
        }
        for i in range(1, num_rows + 1)
    ]
    rows[3:3] = [{"step": 4}, {**rows[3], "main_loss": "x"}, {**rows[3], "mtp_loss": [1, 2]}] if num_rows > 3 else []
    heldout = [{"step": 1, "tokens": 100, "loss": 5.0, "bits_per_byte": 2.0}, {"step": 2}][:num_rows]
    plot_run(tmp_path / "x.png", "title", rows, heldout, {"xz -9": 1.9}, num_mtp=1)
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
