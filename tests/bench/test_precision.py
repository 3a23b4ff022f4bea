"""The comparison of precisions: its arithmetic on made-up losses, and one arm trained by the program."""

import json
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.bench.precision import ARMS, LAST, WINDOW, main, plot, summary

MIDGET = Path(__file__).parents[1] / "training" / "midget.py"


def made_up(steps: int) -> dict[str, np.ndarray]:
    """Losses of every arm: bf16's are 2, FP8's are 0.1 % more in the last steps and 10 % more before."""
    losses = {name: np.full(steps, 2.0) for name in ARMS}
    losses["fp8_dsv3"] *= np.where(np.arange(steps) < steps - LAST, 1.1, 1.001)
    return losses


def test_errors_are_those_of_running_means_within_the_last_steps():
    rows = summary(made_up(1000))
    assert rows["bf16"] == {"loss": 2.0}
    assert rows["fp8_dsv3"] == pytest.approx(
        {"loss": 2.002, "mean_error": 1e-3, "mean_abs_error": 1e-3, "max_abs_error": 1e-3}
    )
    late = made_up(1000)
    late["fp8_dsv3"][-1] += 2 * WINDOW * 0.01
    assert summary(late)["fp8_dsv3"]["max_abs_error"] == pytest.approx(1e-3 + 0.01)
    assert summary(late)["float32"]["max_abs_error"] == 0


def test_the_plot_is_a_png_of_any_length(tmp_path: Path):
    for steps in (30, 1000):
        plot(tmp_path / "errors.png", made_up(steps), "made up")
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
    given += ["--steps", "2", "--out", str(out), "--arms", "bf16", "--json"]
    assert main(given) == 0
    assert "not compared yet: float32" in capsys.readouterr().err
    trained = [json.loads(line)["main_loss"] for line in (out / "bf16" / "metrics.jsonl").read_text().splitlines()]
    assert len(trained) == 2
    for name in set(ARMS) - {"bf16"}:
        (out / name).mkdir()
        lines = [json.dumps({"step": i + 1, "main_loss": 1.01 * loss}) for i, loss in enumerate(trained)]
        (out / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert main(given) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows["bf16"]["loss"] == pytest.approx(np.mean(trained))
    assert rows["fp8_dsv3"]["max_abs_error"] == pytest.approx(0.01)
    assert (out / "loss_error.png").exists()
