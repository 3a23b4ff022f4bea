import json
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.config.check import UserError
from dsv3_jax.training.log import HELDOUT, METRICS, RunLog, read_rows
from dsv3_jax.training.metrics import flat, load_ratio, mfu
from dsv3_jax.training.plot import plot_run, smooth


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
    rows = [
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
    heldout = [{"step": 1, "tokens": 100, "loss": 5.0, "bits_per_byte": 2.0}][:num_rows]
    plot_run(tmp_path / "x.png", "title", rows, heldout, {"xz -9": 1.9}, num_mtp=1)
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
