"""The comparison of precisions: its arithmetic on made-up losses, and one arm trained by the program."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.bench.made_by import MADE_BY, record
from dsv3_jax.bench.precision import ARMS, config_of, main, source_of
from dsv3_jax.bench.precision_errors import BASE, LAST, WINDOW, read_losses, seeds_in, summary, table
from dsv3_jax.bench.precision_plot import plot
from dsv3_jax.config.load import from_dict, load_config

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
        write_losses(tmp_path / folder, [float(step) for step in range(steps)])
    (tmp_path / "seed_notes").mkdir()
    seeds = seeds_in(tmp_path)
    assert [seed for seed, _ in seeds] == [0, 2, 10]
    runs = {name: {seed: folder / name for seed, folder in seeds} for name in ARMS}
    found = read_losses(runs, steps=3)
    assert {name: list(by_seed) for name, by_seed in found.items()} == {"bf16": [0, 2, 10]}
    assert found["bf16"][10].tolist() == [0, 1, 2]


def write_losses(run_dir: Path, losses: list[float]) -> None:
    run_dir.mkdir(parents=True)
    lines = [json.dumps({"step": i + 1, "main_loss": loss}) + "\n" for i, loss in enumerate(losses)]
    (run_dir / "metrics.jsonl").write_text("".join(lines))


def write_run(
    out: Path, name: str, losses: list[float], *overrides: str, seed: int = 0, data: str = "a", **other
) -> Path:
    """A run as if this version had trained it."""
    run_dir = out / f"seed{seed}" / name
    write_losses(run_dir, losses)
    cfg = config_of(load_config(MIDGET, overrides), ARMS[name], seed=seed, steps=len(losses), data_dir=out / "data")
    record(run_dir, {**source_of(cfg, name), **other}, {"train": data})
    return run_dir


def test_a_run_is_tied_to_what_made_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """No loss is printed that another configuration, code, data or nobody knows what has made."""
    given = [str(MIDGET), "--steps", "3", "--out", str(tmp_path), "--arms", BASE, "--json"]
    base = write_run(tmp_path, BASE, [2.0] * 3)
    write_run(tmp_path, "fp8_dsv3", [2.1] * 3)
    write_run(tmp_path, "float32", [2.2] * 3, code="0" * 12)
    write_run(tmp_path, "bf16_again", [2.3] * 3, data="b")
    write_run(tmp_path, "fp8_dsv3", [2.4] * 3, "train.lr.peak=0.5", seed=1)
    assert main(given) == 0
    printed = capsys.readouterr()
    assert {name: row["loss"] for name, row in json.loads(printed.out).items()} == {BASE: 2.0, "fp8_dsv3": 2.1}
    for left_out in (r"float32 is left out: code: 0{12} -> ", "bf16_again is left out: it has learned from other data"):
        assert re.search(left_out, printed.err)
    assert "seed1/fp8_dsv3 is left out: train.lr.peak: 0.5 -> 0.01" in printed.err
    for change, message in (
        ("train.lr.peak=0.5", "train.lr.peak: 0.01 -> 0.5"),
        ("data.paths=x", "data.paths: [] -> "),
    ):
        assert main([*given, "--set", change]) == 2
        assert f"seed0/{BASE} was made by another command ({message}" in capsys.readouterr().err
    for damage in ("{}", "[]", "x"):
        (base / MADE_BY).write_text(damage)
        assert main(given) == 2
        assert f"{MADE_BY} is damaged" in capsys.readouterr().err
    (base / MADE_BY).unlink()
    assert main(given) == 2
    assert f"has no {MADE_BY}" in capsys.readouterr().err


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
    made_by = json.loads((out / "seed3" / "fp8_dsv3" / MADE_BY).read_text())
    trained = read_losses({"fp8_dsv3": {3: out / "seed3" / "fp8_dsv3"}}, steps=2)["fp8_dsv3"][3]
    write_losses(out / "seed3" / "bf16", [loss / 1.01 for loss in trained])
    cfg = from_dict({**made_by["config"], "precision": "mixed"})
    record(out / "seed3" / "bf16", source_of(cfg, "bf16"), made_by["data"])
    assert main(given) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows["fp8_dsv3"]["loss"] == pytest.approx(np.mean(trained))
    assert rows["fp8_dsv3"]["max_abs_error"] == pytest.approx(0.01)
    assert (out / "loss_error.png").exists()
