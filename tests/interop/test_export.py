"""The export of a run: its newest whole checkpoint, its tokenizer, and exit code 2 for a user error."""

import dataclasses
import shutil
import subprocess
import sys

import jax
import tokenizers

import dsv3_jax as ds
from dsv3_jax.interop.export import export, main
from dsv3_jax.interop.hf_names import ragged_tensor


def test_newest_checkpoint_becomes_a_folder(run_dir, tmp_path, small, random_variables, assert_same_bits):
    assert export(run_dir, tmp_path / "out", "float32") == small
    cfg, variables = ds.load_pretrained(tmp_path / "out")
    assert cfg == small
    assert_same_bits(variables, random_variables(small, seed=2))
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode("").ids == [small.bos_id]


def test_moving_average_on_request(run_dir, tmp_path, small, random_variables, assert_same_bits):
    export(run_dir, tmp_path / "out", "float32", use_average=True)
    _, variables = ds.load_pretrained(tmp_path / "out")
    expected = {"params": random_variables(small, seed=12)["params"]}
    assert_same_bits({"params": variables["params"]}, expected)
    assert_same_bits({"bias": variables["router_state"]}, {"bias": random_variables(small, seed=2)["router_state"]})


def test_corrupt_newest_checkpoint_falls_back(
    run_dir, damage_newest, tmp_path, small, random_variables, assert_same_bits, capsys
):
    damage_newest(run_dir)
    assert main([str(run_dir), str(tmp_path / "out"), "--dtype", "float32"]) == 0
    assert "corrupt" in capsys.readouterr().out
    assert_same_bits(ds.load_pretrained(tmp_path / "out")[1], random_variables(small, seed=1))


def test_command_line(run_dir, tmp_path, repository, small):
    command = [sys.executable, "-m", "dsv3_jax.interop.export", run_dir, tmp_path / "out"]
    env = {"PYTHONPATH": f"{repository}:{repository / 'kernels'}", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=repository, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"wrote {tmp_path / 'out'} (bfloat16)"
    assert ds.load_pretrained(tmp_path / "out", "bfloat16")[0] == small


def test_user_errors_have_exit_code_2_and_one_message(run_dir, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    cases = {
        "is not a folder": [str(tmp_path / "nowhere"), str(tmp_path / "out")],
        "holds no whole checkpoint": [str(tmp_path / "empty"), str(tmp_path / "out")],
        "not an earlier export of ours": [str(run_dir), str(tmp_path / "full")],
        "is not a folder; give a run dir of train.py or": [str(run_dir / "tokenizer.json"), str(tmp_path / "out")],
        "a path is empty": [str(run_dir), ""],
        "which the export would replace": [str(run_dir), str(run_dir), "--overwrite"],
        "max_shard_size='huge' is not a size": [str(run_dir), str(tmp_path / "out"), "--max-shard-size", "huge"],
    }
    for message, arguments in cases.items():
        assert main(arguments) == 2
        said = capsys.readouterr()
        assert said.err.startswith("error: ")
        assert message in said.err
        assert said.err.count("\n") == 1
        assert not (tmp_path / "out").exists()
    assert main([str(run_dir), str(tmp_path / "full"), "--overwrite"]) == 0


def test_an_official_folder_in_another_dtype_and_without_mtp(golden, tmp_path, without_mtp, assert_same_bits, capsys):
    source = golden / "hf" / "tiny_c"
    assert main([str(source), str(tmp_path / "out"), "--no-mtp"]) == 0
    cfg, variables = ds.load_pretrained(tmp_path / "out", "bfloat16")
    expected_cfg, expected = without_mtp(*ds.load_pretrained(source, "bfloat16"))
    assert cfg == expected_cfg
    assert_same_bits(variables, expected)
    assert main([str(source), str(tmp_path / "out"), "--average"]) == 2
    assert "which has no moving average" in capsys.readouterr().err


def test_fp8_blocks_that_transformers_misreads_are_named(golden, tmp_path, capsys):
    source = str(golden / "hf" / "tiny_c")
    assert main([source, str(tmp_path / "out"), "--dtype", "float8_e4m3fn"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "scales them wrongly" in line]
    assert len(said) == 1
    assert said[0].startswith("model.layers.0.self_attn.")
    assert main([source, str(tmp_path / "out")]) == 0
    assert "scales them wrongly" not in capsys.readouterr().out


def test_the_released_model_has_one_kind_of_ragged_tensor(small):
    ragged = ragged_tensor(ds.ModelConfig())
    assert ragged is not None
    assert (ragged.key, ragged.shape) == ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", (576, 7168))
    assert ragged_tensor(small) is not None
    assert ragged_tensor(dataclasses.replace(small, model_dim=128, ffn_dim=100)) is None


def test_run_without_an_average(run_dir, tmp_path, small, random_variables, save_checkpoint, capsys):
    shutil.rmtree(run_dir / "checkpoints")
    save_checkpoint(run_dir, 1, small, random_variables(small), None)
    assert main([str(run_dir), str(tmp_path / "out"), "--average"]) == 2
    assert "has no average" in capsys.readouterr().err


def test_tokenizer_that_does_not_fit_is_refused(run_dir, tmp_path, small, save_checkpoint, capsys):
    shutil.rmtree(run_dir / "checkpoints")
    tiny = dataclasses.replace(small, vocab_size=8)
    save_checkpoint(run_dir, 1, tiny, ds.init(tiny, jax.random.key(0)), None)
    assert main([str(run_dir), str(tmp_path / "out")]) == 2
    assert "vocab_size=8" in capsys.readouterr().err
