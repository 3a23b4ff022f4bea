"""The comparison of precisions: its arithmetic on made-up losses, and one arm trained by the program."""

import json
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.bench.precision import ARMS, main
from dsv3_jax.bench.precision_errors import BASE, LAST, WINDOW, read_losses, summary, table
from dsv3_jax.bench.precision_plot import plot

MIDGET = Path(__file__).parents[1] / "training" / "midget.py"
LABELS = {name: arm.label for name, arm in ARMS.items()}


def made_up(steps: int, seeds: int = 2) -> dict[str, dict[int, np.ndarray]]:
    """Losses of every arm: bf16's are 2; FP8's are 0.1 % more in the steps that count and 10 % more before."""
    losses = {name: {seed: np.full(steps, 2.0) for seed in range(seeds)} for name in ARMS}
    counted = np.arange(steps) >= steps - LAST - WINDOW + 1
    for loss in losses["fp8_dsv3"].values():
        loss *= np.where(counted, 1.001, 1.1)
    return losses


def test_errors_are_those_of_the_smoothed_loss_at_the_last_steps():
    rows = summary(made_up(1000))
    assert rows[BASE] == {"seeds": 2, "loss": 2.0}
    assert rows["fp8_dsv3"]["mean_error"] == pytest.approx(1e-3)
    assert rows["fp8_dsv3"]["max_abs_error"] == pytest.approx(1e-3)
    assert rows["float32"]["max_abs_error"] == 0
    early = made_up(1000)
    early["fp8_dsv3"][0][1000 - LAST - WINDOW + 1] += 2 * WINDOW * 0.01  # the first step that a running mean reaches
    assert summary(early)["fp8_dsv3"]["max_abs_error"] == pytest.approx(1e-3 + 0.005), "half of it: two seeds"
    assert summary(early)["fp8_dsv3"]["max_abs_error_by_seed"] == pytest.approx([1e-3 + 0.01, 1e-3])


def test_opposite_errors_of_two_seeds_cancel_in_the_mean_and_are_seen_by_seed():
    found = made_up(1000)
    found["float32"] = {0: np.full(1000, 2.02), 1: np.full(1000, 1.98)}
    row = summary(found)["float32"]
    assert row["max_abs_error"] == pytest.approx(0, abs=1e-12)
    assert row["mean_error_by_seed"] == pytest.approx([0.01, -0.01])
    assert row["max_abs_error_by_seed"] == pytest.approx([0.01, 0.01])


def test_an_arm_is_compared_with_bf16_from_its_own_seeds_only():
    found = made_up(1000)
    found[BASE][1] = np.full(1000, 4.0)
    found["float32"] = {0: np.full(1000, 2.02)}
    row = summary(found)["float32"]
    assert (row["seeds"], row["mean_error"]) == (1, pytest.approx(0.01))
    assert " 1.000%" in table(summary(found), LABELS)


def test_unfinished_runs_are_left_out(tmp_path: Path):
    for folder, steps in (("seed0/bf16", 3), ("seed10/bf16", 4), ("seed2/bf16", 3), ("seed2/fp8_dsv3", 2)):
        (tmp_path / folder).mkdir(parents=True)
        rows = [json.dumps({"step": step + 1, "main_loss": float(step)}) for step in range(steps)]
        (tmp_path / folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    found = read_losses(tmp_path, list(ARMS), steps=3)
    assert {name: list(by_seed) for name, by_seed in found.items()} == {"bf16": [0, 2, 10]}
    assert found["bf16"][10].tolist() == [0, 1, 2]


def test_the_plot_is_a_png_of_any_length(tmp_path: Path):
    for steps in (30, 1000):
        plot(tmp_path / "errors.png", made_up(steps), LABELS, "made up")
        assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")


def test_bad_arguments_end_with_2(tmp_path: Path, capsys):
    assert main([str(MIDGET), "--steps", "0", "--out", str(tmp_path)]) == 2
    assert "--steps 0 must be at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_an_arm_is_trained_then_all_are_compared(tmp_path: Path, capsys):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(4):
        (text / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 120)
    out = tmp_path / "out"
    given = [str(MIDGET), "--set", f"data.paths={text}", "data.heldout_fraction=0.2"]
    given += ["--steps", "2", "--seeds", "3", "--out", str(out), "--arms", "fp8_dsv3", "--json"]
    assert main(given) == 0
    assert "bf16 must be trained to step 2" in capsys.readouterr().err
    trained = read_losses(out, ["fp8_dsv3"], steps=2)["fp8_dsv3"][3]
    (out / "seed3" / "bf16").mkdir()
    lines = [json.dumps({"step": i + 1, "main_loss": loss / 1.01}) for i, loss in enumerate(trained)]
    (out / "seed3" / "bf16" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert main(given) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows["fp8_dsv3"]["loss"] == pytest.approx(np.mean(trained))
    assert rows["fp8_dsv3"]["max_abs_error"] == pytest.approx(0.01)
    assert (out / "loss_error.png").exists()
