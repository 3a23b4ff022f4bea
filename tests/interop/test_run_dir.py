"""`ds.load`: the same variables, whether a run or an official folder holds them."""

import jax.numpy as jnp
import pytest

import dsv3_jax as ds
from dsv3_jax.config.check import ConfigError
from dsv3_jax.training.checkpoint_files import CheckpointError


def test_a_run_gives_its_newest_checkpoint_or_its_average(run_dir, small, random_variables, assert_same_bits) -> None:
    cfg, variables = ds.load(run_dir)
    assert cfg == small
    newest, average = random_variables(small, seed=2), random_variables(small, seed=12)
    assert_same_bits(variables, newest)
    assert_same_bits(ds.load(str(run_dir), average=True)[1], {**newest, "params": average["params"]})
    narrow = {**newest, "params": random_variables(small, "bfloat16", seed=2)["params"]}
    assert_same_bits(ds.load(run_dir, dtype="bfloat16")[1], narrow)


def test_a_corrupt_checkpoint_is_passed_over(
    run_dir, damage_newest, small, random_variables, assert_same_bits, capsys
) -> None:
    damage_newest(run_dir)
    assert_same_bits(ds.load(run_dir)[1], random_variables(small, seed=1))
    assert "is corrupt" in capsys.readouterr().err


def test_functions_that_a_run_replaced_are_named(run_dir, small, random_variables, save_checkpoint, capsys) -> None:
    ds.load(run_dir)
    assert capsys.readouterr().err == ""
    save_checkpoint(run_dir, 3, small, random_variables(small), None, functions={"route": "equal_route"})
    ds.load(run_dir)
    assert "was trained with functions of its own (route by equal_route); what uses" in capsys.readouterr().err


def test_an_official_folder_is_read_as_load_pretrained_reads_it(golden, assert_same_bits) -> None:
    folder = golden / "hf" / "tiny_a"
    cfg, variables = ds.load(folder, dtype="bfloat16")
    expected_cfg, expected = ds.load_pretrained(folder, "bfloat16")
    assert cfg == expected_cfg
    assert_same_bits(variables, expected)
    assert variables["params"]["embed"]["w"].dtype == jnp.bfloat16


def test_what_cannot_be_loaded_is_refused_with_the_reason(golden, run_dir, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    cases = [
        (tmp_path / "nowhere", {}, "nowhere: is not a folder; give a run dir of train.py or an official folder"),
        (run_dir / "tokenizer.json", {}, "tokenizer.json: is not a folder"),
        (tmp_path / "empty", {}, "empty: holds neither checkpoints/ nor config.json; give a run dir of train.py that"),
        (golden / "hf" / "tiny_a", {"average": True}, "is an official folder, which has no moving average"),
        (run_dir, {"dtype": "float16"}, "dtype='float16' cannot be loaded; use 'float32' or 'bfloat16'"),
        ("", {}, "a path is empty"),
    ]
    for path, how, message in cases:
        with pytest.raises(ConfigError, match=message):
            ds.load(path, **how)
    with pytest.raises(CheckpointError, match="begun holds no whole checkpoint; train with --run-dir"):
        ds.load(tmp_path / "begun")
