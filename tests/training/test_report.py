"""What a run writes beside its checkpoints agrees with them: metrics, held-out rows, averages, the HF folder."""

import contextlib
import io
import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import dsv3_jax as ds
from dsv3_jax.config.load import load_config
from dsv3_jax.config.run import RunConfig
from dsv3_jax.data.build_folder import prepare
from dsv3_jax.data.loader import heldout_batches
from dsv3_jax.training.checkpoint import load_variables
from dsv3_jax.training.evaluate import Evaluation, evaluate, make_evaluator
from dsv3_jax.training.schedules import bias_speed, learning_rate, mtp_weight
from train import main

MIDGET = Path(__file__).parent / "midget.py"
NUM_STEPS, EVAL_EVERY, EMA_EVERY = 6, 3, 2


class FinishedRun(NamedTuple):
    """A run that saved a checkpoint after each of its steps, and what it printed."""

    folder: Path
    cfg: RunConfig
    printed: str

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def variables(self, step: int, scratch: Path, *, use_average: bool = False) -> dict[str, Any]:
        """Those of the checkpoint of `step`, alone in a copy of the folder."""
        name = f"{step:012d}"
        shutil.copytree(self.folder / "checkpoints" / name, scratch / name / "checkpoints" / name, dirs_exist_ok=True)
        return load_variables(scratch / name, use_average=use_average)[1]

    def evaluation(self, variables: dict[str, Any], max_batches: int | None) -> Evaluation:
        data = prepare(self.cfg.data, self.cfg.model, self.folder, log=lambda line: None)
        batches = heldout_batches(
            data.tokenizer,
            data.heldout,
            batch_size=self.cfg.train.batch.micro,
            seq_len=self.cfg.train.seq_len,
            overlap=self.cfg.data.heldout_overlap,
            max_batches=max_batches,
        )
        found = evaluate(make_evaluator(self.cfg), variables, batches)
        assert found is not None
        return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    text = tmp_path_factory.mktemp("text")
    for name in ("scanner.py", "decoder.py", "encoder.py", "tool.py"):
        (text / name).write_text((Path(json.__file__).parent / name).read_text()[:2000])
    folder = tmp_path_factory.mktemp("end") / "run"
    sets = [f"data.paths={text}", "data.heldout_fraction=0.4", f"train.total_tokens={NUM_STEPS * 2 * 16}"]
    sets += ["train.batch.full=2", "train.batch.ramp_tokens=0", f"train.ema_every={EMA_EVERY}", "train.ema_decay=0.5"]
    output = {"checkpoint_every": 1, "keep_checkpoints": NUM_STEPS, "eval_every": EVAL_EVERY, "eval_batches": 2}
    sets += [f"train.output.{name}={value}" for name, value in output.items()]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["--config", str(MIDGET), "--run-dir", str(folder), "--set", *sets]) == 0
    return FinishedRun(folder, load_config(MIDGET, sets), printed.getvalue())


def test_rates_are_those_of_the_tokens_at_the_end_of_a_step(run: FinishedRun) -> None:
    rows, train = run.rows("metrics.jsonl"), run.cfg.train
    assert [row["tokens"] for row in rows] == [32 * step for step in range(1, NUM_STEPS + 1)]
    for row in rows:
        assert row["learning_rate"] == np.float32(learning_rate(row["tokens"], train.lr)) > 0
        assert row["mtp_weight"] == np.float32(mtp_weight(row["tokens"], train.auxiliary))
        assert row["bias_speed"] == np.float32(bias_speed(row["tokens"], train.auxiliary))


def test_the_average_moves_every_so_many_steps(run: FinishedRun, tmp_path: Path) -> None:
    averages = [run.variables(step, tmp_path, use_average=True)["params"] for step in range(1, NUM_STEPS + 1)]
    heads = [average["unembed"]["w"] for average in averages]
    moved = [bool((before != after).any()) for before, after in itertools.pairwise(heads)]
    assert moved == [step % EMA_EVERY == 0 for step in range(2, NUM_STEPS + 1)]


def test_a_heldout_row_is_the_evaluation_of_its_steps_checkpoint(run: FinishedRun, tmp_path: Path) -> None:
    tokens = {row["step"]: row["tokens"] for row in run.rows("metrics.jsonl")}
    rows = run.rows("heldout.jsonl")
    assert [row["step"] for row in rows][:2] == [EVAL_EVERY, 2 * EVAL_EVERY]
    for row in rows[:2]:
        expected = run.evaluation(run.variables(row["step"], tmp_path), max_batches=2)
        assert row["tokens"] == tokens[row["step"]]
        assert row["loss"] == pytest.approx(expected.loss, rel=1e-6)
        assert row["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)


def test_model_and_average_are_both_evaluated_at_the_end(run: FinishedRun, tmp_path: Path) -> None:
    for label, use_average in (("this model", False), ("moving average", True)):
        variables = run.variables(NUM_STEPS, tmp_path, use_average=use_average)
        expected = run.evaluation(variables, max_batches=None)
        found = re.search(rf"{label}\s+([\d.]+)\s+([\d.]+)", run.printed)
        assert found, run.printed
        assert float(found[1]) == pytest.approx(expected.bits_per_byte, abs=6e-5)
        assert float(found[2]) == pytest.approx(expected.loss, abs=6e-5)


def test_the_hf_folder_holds_the_last_checkpoints_weights(run: FinishedRun, tmp_path: Path) -> None:
    trained = run.variables(NUM_STEPS, tmp_path)
    _, exported = ds.load_pretrained(run.folder / "hf", dtype="bfloat16")
    for ours, theirs in zip(jax.tree.leaves(trained), jax.tree.leaves(exported), strict=True):
        np.testing.assert_array_equal(np.asarray(ours).astype(theirs.dtype), theirs)
