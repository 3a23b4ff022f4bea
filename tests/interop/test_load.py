"""Loading: the golden checkpoints tensor by tensor, FP8 as its own reference dequantises it, and every refusal."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import dsv3_jax as ds
from dsv3_jax.config.check import ConfigError, UserError
from dsv3_jax.interop.convert import to_official
from dsv3_jax.interop.hf_names import SCALE_SUFFIX, entries, flatten
from dsv3_jax.interop.safetensors_io import INDEX, SINGLE, CheckpointError, read_folder
from dsv3_jax.typing import Variables

TINY = ("tiny_a", "tiny_b", "tiny_c", "tiny_d")


def official_view(cfg: ds.ModelConfig, variables: Variables) -> dict[str, np.ndarray]:
    """Official name -> our numbers in the official order of dimensions."""
    flat = flatten(variables)
    return {e.key: to_official(np.asarray(flat[e.path])[e.index], e.input_axes) for e in entries(cfg)}


def rewrite(folder: Path, change) -> None:
    """Applies `change` to the {name: array} of a folder, and writes it back as one file."""
    tensors = {name: tensor.read() for name, tensor in read_folder(folder).items()}
    change(tensors)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    safetensors.numpy.save_file(tensors, folder / SINGLE)


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["tiny_a", "tiny_b", "tiny_d"])
def test_every_number_of_the_file_arrives(golden, name):
    cfg, variables = ds.load_pretrained(golden / "hf" / name)
    ours, stored = official_view(cfg, variables), read_folder(golden / "hf" / name)
    assert ours.keys() == stored.keys()
    for key, tensor in stored.items():
        np.testing.assert_array_equal(ours[key], tensor.read().astype(np.float32), err_msg=key)


def test_fp8_is_dequantised_as_the_reference_does(golden):
    folder = golden / "hf" / "tiny_c"
    expected = np.load(folder / "expected.npz")
    ours = official_view(*ds.load_pretrained(folder))
    names = [key.removeprefix("dequant/") for key in expected.files if key.startswith("dequant/")]
    assert len(names) == 2
    for name in names:
        np.testing.assert_array_equal(ours[name], expected[f"dequant/{name}"])
    for name, total in zip(expected["dequant_names"], expected["dequant_abs_sum"], strict=True):
        np.testing.assert_allclose(np.abs(ours[str(name)].astype(np.float64)).sum(), total, rtol=1e-12)


def test_golden_fp8_has_scales_in_other_shards(golden):
    """What the test above rests on."""
    stored = read_folder(golden / "hf" / "tiny_c")
    apart = [n for n in stored if n + SCALE_SUFFIX in stored and stored[n].file != stored[n + SCALE_SUFFIX].file]
    assert apart


def test_fp8_to_bfloat16_rounds_the_float32_product_once(golden):
    folder = golden / "hf" / "tiny_c"
    wide, narrow = (flatten(ds.load_pretrained(folder, dtype)[1]) for dtype in ("float32", "bfloat16"))
    for path, leaf in wide.items():
        kind = np.float32 if path.startswith("router_state") else ml_dtypes.bfloat16
        assert narrow[path].dtype == kind
        np.testing.assert_array_equal(np.asarray(narrow[path]), np.asarray(leaf).astype(kind))


@pytest.mark.parametrize("name", TINY)
def test_tree_is_that_of_init(golden, name):
    cfg, variables = ds.load_pretrained(golden / "hf" / name, dtype="bfloat16")
    expected = ds.abstract_params(cfg, "bfloat16")
    assert {p: (x.shape, x.dtype) for p, x in flatten(variables).items()} == {
        p: (spec.shape, spec.dtype) for p, spec in flatten(expected).items()
    }
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(variables))


@pytest.mark.parametrize("name", ["tiny_a", "tiny_b", "tiny_d"])
def test_transformers_5_config_reads_the_same_weights(copy_of_golden, golden, name, assert_same_bits):
    """Without tiny_c, which transformers writes dequantised."""
    folder = copy_of_golden(name)
    (folder / "config_as_saved_by_transformers5.json").replace(folder / "config.json")
    cfg, variables = ds.load_pretrained(folder)
    same_cfg, same = ds.load_pretrained(golden / "hf" / name)
    assert cfg == same_cfg
    assert_same_bits(variables, same)


def test_mtp_copies_may_be_left_out(copy_of_golden, golden, assert_same_bits):
    folder = copy_of_golden("tiny_c")

    def drop(tensors):
        del tensors["model.layers.2.embed_tokens.weight"], tensors["model.layers.2.shared_head.head.weight"]

    rewrite(folder, drop)
    assert_same_bits(ds.load_pretrained(folder)[1], ds.load_pretrained(golden / "hf" / "tiny_c")[1])


M = "model.layers.2."
"""The MTP module of tiny_c."""


def make_stale(name: str, original: str):
    """As a fine-tuning that leaves the MTP module's copy behind."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        assert np.array_equal(tensors[name].view(np.uint8), tensors[original].view(np.uint8))
        tensors[name][5, 7] += np.asarray(1, tensors[name].dtype)

    return change


def bad_scale(value: float):
    return lambda t: t.update({M + "mlp.experts.3.down_proj.weight_scale_inv": np.full((2, 1), value, np.float32)})


WITHOUT_MTP = {
    "not announced": (lambda t: None, 0, r"\d+ tensors of MTP modules, which this config.json does not announce"),
    "absent, as transformers saves": (
        lambda t: [t.pop(name) for name in list(t) if name.startswith(M)],
        1,
        rf"'{M}enorm.weight' .* is missing",
    ),
    "partly absent": (lambda t: t.pop(M + "eh_proj.weight"), 1, rf"'{M}eh_proj.weight' .* is missing"),
    "stale embedding": (
        make_stale(M + "embed_tokens.weight", "model.embed_tokens.weight"),
        1,
        rf"'{M}embed_tokens.weight' differs from the main model's 'model.embed_tokens.weight'",
    ),
    "stale head": (make_stale(M + "shared_head.head.weight", "lm_head.weight"), 1, r"shared_head.head.weight' differs"),
    "misshapen": (lambda t: t.update({M + "enorm.weight": np.ones(3, np.float32)}), 1, "enorm.weight' has shape"),
    "of a type that is not read": (lambda t: t.update({M + "enorm.weight": np.ones(64, np.int32)}), 1, "dtype I32"),
    "with parts of another kind": (lambda t: t.update({M + "x": np.ones(3, np.float32)}), 1, f"'{M}x' .* no place"),
    "damaged scale": (bad_scale(np.nan), 1, "negative or not finite"),
}


@pytest.mark.parametrize("name", WITHOUT_MTP)
def test_main_model_loads_without_its_mtp_modules(copy_of_golden, golden, without_mtp, assert_same_bits, name):
    change, announced, message = WITHOUT_MTP[name]
    folder = copy_of_golden("tiny_c")
    edit_config(folder, num_nextn_predict_layers=announced)
    rewrite(folder, change)
    lines: list[str] = []
    cfg, variables = ds.load_pretrained(folder, log=lines.append)
    expected_cfg, expected = without_mtp(*ds.load_pretrained(golden / "hf" / "tiny_c"))
    assert cfg == expected_cfg
    assert_same_bits(variables, expected)
    (line,) = lines
    assert re.search(rf"{folder}: loaded with mtp_depth=0, without .*{message}", line)


def test_modules_beyond_those_announced_are_left_out(copy_of_golden, golden, assert_same_bits, capsys):
    """By default the line goes to stderr; a clean load prints nothing."""
    expected = ds.load_pretrained(golden / "hf" / "tiny_c")
    assert capsys.readouterr() == ("", "")
    folder = copy_of_golden("tiny_c")
    rewrite(folder, lambda t: t.update({n.replace(M, "model.layers.3."): x for n, x in list(t.items()) if M in n}))
    cfg, variables = ds.load_pretrained(folder)
    assert cfg == expected[0]
    assert_same_bits(variables, expected[1])
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r".*mtp_depth=1, without \d+ tensors of MTP modules beyond num_nextn_predict_layers=1\n", err)


def test_ignorable_tensors_are_ignored(copy_of_golden):
    folder = copy_of_golden("tiny_a")
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}))
    ds.load_pretrained(folder)


def test_float16_is_read(copy_of_golden, golden):
    folder = copy_of_golden("tiny_a")
    tensors = {n: t.read().astype(np.float16) for n, t in read_folder(folder).items()}
    safetensors.numpy.save_file(tensors, folder / SINGLE)
    ours = official_view(*ds.load_pretrained(folder))
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(ours[key], tensor.astype(np.float32))


BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
GATE = "model.layers.1.mlp.gate.weight"
DOWN = "model.layers.1.mlp.experts.3.down_proj.weight"
BROKEN_A = {
    "missing tensor": (lambda t: t.pop(GATE), rf"'{GATE}' of shape \(8, 64\) is missing"),
    "missing bias": (lambda t: t.pop(BIAS), r"bias' .* is missing"),
    "wrong shape": (lambda t: t.update({DOWN: t[DOWN].T.copy()}), rf"'{DOWN}' has shape \(32, 64\).*\(64, 32\)"),
    "extra tensor": (
        lambda t: t.update({"model.layers.9.x": t[GATE]}),
        r"'model.layers.9.x' \(one of 1 such\).*beyond num_hidden",
    ),
    "NaN in a router bias": (lambda t: t[BIAS].fill(np.nan), rf"router bias '{BIAS}' holds a NaN or infinity"),
    "infinite router bias": (lambda t: t[BIAS].fill(np.inf), rf"router bias '{BIAS}' holds a NaN or infinity"),
    "float64": (lambda t: t.update({GATE: t[GATE].astype(np.float64)}), rf"'{GATE}' has dtype F64.*one of F32, BF16"),
    "extra bias": (lambda t: t.update({"model.layers.0.self_attn.q_a_proj.bias": t[GATE]}), r"q_a_proj.bias'"),
    "scale without FP8": (lambda t: t.update({DOWN + SCALE_SUFFIX: t[GATE]}), r"weight_scale_inv' \(one of 1"),
}


@pytest.mark.parametrize("name", BROKEN_A)
def test_weights_that_do_not_fit_the_config(copy_of_golden, name):
    folder = copy_of_golden("tiny_a")
    change, message = BROKEN_A[name]
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        ds.load_pretrained(folder)
    assert str(folder) in str(caught.value)


def with_scale(value: float):
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[DOWN + SCALE_SUFFIX][1, 0] = value

    return change


NORM = "model.layers.0.input_layernorm.weight"
E4M3 = ml_dtypes.float8_e4m3fn
BROKEN_C = {
    **{
        f"scale {value}": (with_scale(value), rf"scale '{DOWN}_scale_inv' holds a value that is negative or not finite")
        for value in (np.nan, np.inf, -1.0)
    },
    "integer scale": (
        lambda t: t.update({DOWN + SCALE_SUFFIX: np.ones((2, 1), np.int32)}),
        rf"'{DOWN}_scale_inv' has dtype I32, which is not read here; convert it to one of F32, BF16, F16, F8_E8M0",
    ),
    "vector": (
        lambda t: t.update({NORM: t[NORM].astype(E4M3), NORM + SCALE_SUFFIX: np.ones(1, np.float32)}),
        rf"'{NORM}' of shape \(\d+,\) is F8_E4M3, but only matrices",
    ),
    "three dimensions": (lambda t: t.update({DOWN: t[DOWN][None]}), rf"'{DOWN}' of shape \(1, .* only matrices"),
    "another FP8": (lambda t: t.update({DOWN: t[DOWN].astype(ml_dtypes.float8_e5m2)}), rf"'{DOWN}' has dtype F8_E5M2"),
    "missing scale": (lambda t: t.pop(DOWN + SCALE_SUFFIX), rf"scale '{DOWN}_scale_inv'.*missing from all shards"),
    "scale of another block": (
        lambda t: t.update({DOWN + SCALE_SUFFIX: np.ones((4, 1), np.float32)}),
        rf"'{DOWN}_scale_inv' has shape \(4, 1\), but config.json asks for \(2, 1\)",
    ),
}


@pytest.mark.parametrize("name", BROKEN_C)
def test_fp8_without_its_scales(copy_of_golden, name):
    folder = copy_of_golden("tiny_c")
    change, message = BROKEN_C[name]
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        ds.load_pretrained(folder)


@pytest.mark.parametrize("kind", [ml_dtypes.float8_e8m0fnu, ml_dtypes.bfloat16, np.float16])
def test_scales_of_fewer_bits_are_read(copy_of_golden, assert_same_bits, kind):
    """Powers of two, which every type holds: E8M0 as DeepSeek-V3.1 writes them."""
    folder = copy_of_golden("tiny_c")

    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in tensors:
            if name.endswith(SCALE_SUFFIX):
                tensors[name] = np.exp2(np.round(np.log2(tensors[name]))).astype(np.float32)

    rewrite(folder, change)
    expected = ds.load_pretrained(folder)[1]
    rewrite(folder, lambda t: t.update({n: x.astype(kind) for n, x in t.items() if n.endswith(SCALE_SUFFIX)}))
    assert_same_bits(ds.load_pretrained(folder)[1], expected)


def test_block_size_comes_from_the_config_alone(copy_of_golden):
    """64-blocks would have other scale shapes; without the entry the block is unknown."""
    folder = copy_of_golden("tiny_c")
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, quantization_config=config["quantization_config"] | {"weight_block_size": [64, 64]})
    with pytest.raises(CheckpointError, match=r"_scale_inv' has shape"):
        ds.load_pretrained(folder)
    edit_config(folder, quantization_config=None)
    with pytest.raises(CheckpointError, match=r"is F8_E4M3, but config.json has no quantization_config"):
        ds.load_pretrained(folder)


def test_truncated_and_missing_shards_are_named(copy_of_golden):
    folder = copy_of_golden("tiny_c")
    shard = folder / "model-00002-of-000002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model-00002-of-000002.safetensors: has \d+ bytes.*truncated"):
        ds.load_pretrained(folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-000002.safetensors: shard is missing"):
        ds.load_pretrained(folder)
    (folder / INDEX).unlink()
    with pytest.raises(CheckpointError, match="has neither"):
        ds.load_pretrained(folder)


def test_folder_that_is_none(tmp_path):
    with pytest.raises(CheckpointError, match="deepseek-ai/DeepSeek-V3: is not a folder"):
        ds.load_pretrained("deepseek-ai/DeepSeek-V3")
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        ds.load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{nope")
    with pytest.raises(CheckpointError, match="is not JSON"):
        ds.load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="must be a JSON object, not list"):
        ds.load_pretrained(tmp_path)


def test_unknown_architecture_and_dtype(copy_of_golden, golden):
    folder = copy_of_golden("tiny_a")
    edit_config(folder, architectures=["DeepseekV32ForCausalLM"])
    with pytest.raises(ConfigError, match="DeepseekV32ForCausalLM"):
        ds.load_pretrained(folder)
    with pytest.raises(ConfigError, match="dtype='float16' cannot be loaded"):
        ds.load_pretrained(golden / "hf" / "tiny_a", dtype="float16")


def test_every_refusal_is_a_user_error():
    assert issubclass(CheckpointError, UserError)
    assert issubclass(ConfigError, UserError)


def test_reads_v2(tmp_path, small, random_variables, assert_same_bits):
    moe = dataclasses.replace(small.moe, score="softmax", has_bias=False, normalize_weights=False, scale=16.0)
    cfg = dataclasses.replace(small, moe=moe, mtp_depth=0)
    variables = random_variables(cfg)
    ds.save_pretrained(tmp_path / "v2", cfg, variables, dtype="float32")
    loaded_cfg, loaded = ds.load_pretrained(tmp_path / "v2")
    assert loaded_cfg == cfg
    assert loaded["router_state"] == {}
    assert_same_bits(loaded, variables)
