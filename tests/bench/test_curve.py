"""The largest rise of a smoothed loss, and what chance does."""

import json
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.bench.curve import largest_rise, main


def run_dir(folder: Path, loss: np.ndarray) -> Path:
    rows = [{"step": i, "tokens": 10 * i, "main_loss": float(value)} for i, value in enumerate(loss, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps({"train": {"lr": {"warmup_tokens": 100}}}))
    return folder


def test_a_rise_is_measured_from_the_lowest_mean_so_far() -> None:
    assert largest_rise(np.array([5.0, 3.0, 1.0, 3.0, 2.0, 4.0]), 2) == pytest.approx(1.0)
    assert largest_rise(np.linspace(4, 1, 50), 5) == 0


def test_a_step_in_the_data_stands_out_of_the_noise_of_batches(tmp_path: Path, capsys) -> None:
    rng = np.random.default_rng(0)
    loss = 3 - 0.3 * np.log(np.arange(1, 401)) + rng.normal(0, 0.1, 400)
    arguments = [str(run_dir(tmp_path, loss)), "--window=40", "--json"]
    assert main([*arguments, "--at-most=0.2"]) == 0
    smooth = json.loads(capsys.readouterr().out)["40"]
    assert smooth["rise"] < 1.5 * smooth["by_chance"][1]
    loss[200:] += 0.6
    assert main([str(run_dir(tmp_path, loss)), "--window=40", "--json", "--at-most=0.2"]) == 1
    stepped = json.loads(capsys.readouterr().out)["40"]
    assert stepped["rise"] > 0.4


def test_a_run_that_is_too_short_is_refused(tmp_path: Path, capsys) -> None:
    assert main([str(run_dir(tmp_path, np.ones(60))), "--window=50"]) == 2
    assert "has 50 steps after warm-up" in capsys.readouterr().err
