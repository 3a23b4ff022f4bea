"""A whole run in FP8: trained, saved with bfloat16 moments, exported in FP8, read back, completed."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import dsv3_jax as ds
from dsv3_jax.config.check import ConfigError
from dsv3_jax.config.load import load_config
from dsv3_jax.interop.export import export
from dsv3_jax.model.functions import functions_for
from dsv3_jax.training.state import abstract_state
from train import main

FP8 = functions_for("fp8_dsv3")

MIDGET = Path(__file__).parent / "midget.py"


@pytest.mark.parametrize(
    ("sets", "dtype"),
    [
        (["precision=fp8_dsv3"], "bfloat16"),
        (["precision=mixed"], "float32"),
        (["precision=fp8_dsv3", "train.optimizer.moment_dtype=float32"], "float32"),
        (["precision=mixed", "train.optimizer.moment_dtype=bfloat16"], "bfloat16"),
    ],
)
def test_the_recipe_decides_how_moments_are_stored_unless_told(sets, dtype):
    cfg = load_config(MIDGET, sets)
    assert cfg.moment_dtype == dtype
    state = abstract_state(cfg)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32"}
    moments = {leaf.dtype.name for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim}
    assert moments == {dtype}


def test_unknown_precisions_and_moments_are_refused():
    with pytest.raises(ConfigError, match="precision"):
        load_config(MIDGET, ["precision=fp8"])
    with pytest.raises(ConfigError, match="moment_dtype=float16: not one of recipe, float32, bfloat16"):
        load_config(MIDGET, ["train.optimizer.moment_dtype=float16"])


@pytest.mark.slow
def test_a_run_in_fp8_learns_is_exported_and_generates(tmp_path: Path):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(4):
        (text / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 120)
    run_dir = tmp_path / "run"
    sets = ["precision=fp8_dsv3", f"data.paths={text}", "data.heldout_fraction=0.2", "train.remat=paper"]
    assert main(["--config", str(MIDGET), "--run-dir", str(run_dir), "--set", *sets]) == 0
    losses = [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-4:]) < 0.9 * losses[0]
    cfg = export(run_dir, tmp_path / "fp8", dtype="float8_e4m3fn")
    _, variables = ds.load_pretrained(tmp_path / "fp8", dtype="float32")
    prompt = np.arange(2, 10)[None, :]
    for functions in (None, FP8):
        ids = ds.generate(cfg, variables, prompt, max_new_tokens=3, functions=functions)
        assert ids.shape == (1, 3)
        assert (ids < cfg.vocab_size).all()
