import json
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.bench.balance import main, plot, ratios


def test_ratio_is_taken_over_a_window_of_steps():
    load = np.zeros((40, 1, 4), int)
    load[np.arange(40), 0, np.arange(40) % 4] = 8
    found = ratios(load)
    assert found[0, 0] == 4.0
    assert found[-1, 0] == pytest.approx(1.0)


def test_a_picture_of_both_runs(tmp_path: Path):
    plot(tmp_path / "x.png", {"with bias update": np.ones((5, 2)), "without": np.full((5, 2), 3.0)})
    assert (tmp_path / "x.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_bias_balances_a_skewed_start_and_nothing_else_does(tmp_path: Path, repository: Path, capsys):
    config = str(repository / "configs" / "tiny.py")
    assert main([config, "--json", "--out", str(tmp_path / "balance.png"), "--run-dir", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert max(found["with bias update"]["start"]) > 2.5
    # One run of a few hundred steps: 1.43 and 1.51 in the present order of rows, below 1.5 in the order before streams.
    assert max(found["with bias update"]["end"]) < 1.6
    assert min(found["without"]["end"]) > 2.5


@pytest.mark.parametrize(
    "arguments", [["--steps=0"], ["--rows=0"], ["--bias-speed=nan"], ["--set", "train.lr.peak=inf"]]
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], repository: Path, capsys):
    assert main([str(repository / "configs" / "tiny.py"), *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: ")
