"""Loading: the golden checkpoints tensor by tensor, FP8 as its own reference dequantises it, and every refusal."""

import dataclasses
import json
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
from dsv3_jax.interop.safetensors_io import INDEX, SINGLE, CheckpointError, read_folder, write_file
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
    write_file(folder / SINGLE, [(n, t.shape, t.dtype.name) for n, t in tensors.items()], tensors.items(), {})


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


def test_mtp_tensors_that_transformers_drops(copy_of_golden, golden, without_mtp, assert_same_bits):
    folder = copy_of_golden("tiny_c")

    def drop(tensors):
        for name in [name for name in tensors if name.startswith("model.layers.2.")]:
            del tensors[name]

    rewrite(folder, drop)
    cfg, variables = ds.load_pretrained(folder)
    expected_cfg, expected = without_mtp(*ds.load_pretrained(golden / "hf" / "tiny_c"))
    assert cfg == expected_cfg
    assert_same_bits(variables, expected)


def test_mtp_copies_may_be_left_out(copy_of_golden, golden, assert_same_bits):
    folder = copy_of_golden("tiny_c")

    def drop(tensors):
        del tensors["model.layers.2.embed_tokens.weight"], tensors["model.layers.2.shared_head.head.weight"]

    rewrite(folder, drop)
    assert_same_bits(ds.load_pretrained(folder)[1], ds.load_pretrained(golden / "hf" / "tiny_c")[1])


@pytest.mark.parametrize("name", ["embed_tokens.weight", "shared_head.head.weight"])
def test_mtp_with_its_own_embedding_is_refused(copy_of_golden, name):
    folder = copy_of_golden("tiny_c")
    key = f"model.layers.2.{name}"

    def change(tensors):
        tensors[key][5, 7] += np.asarray(1, tensors[key].dtype)

    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=f"'{key}' differs from the main model's.*cannot be represented"):
        ds.load_pretrained(folder)


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


GATE = "model.layers.1.mlp.gate.weight"
DOWN = "model.layers.1.mlp.experts.3.down_proj.weight"
BROKEN_A = {
    "missing tensor": (lambda t: t.pop(GATE), rf"'{GATE}' of shape \(8, 64\) is missing"),
    "missing bias": (lambda t: t.pop("model.layers.2.mlp.gate.e_score_correction_bias"), r"bias' .* is missing"),
    "wrong shape": (lambda t: t.update({DOWN: t[DOWN].T.copy()}), rf"'{DOWN}' has shape \(32, 64\).*\(64, 32\)"),
    "extra tensor": (lambda t: t.update({"model.layers.9.x": t[GATE]}), r"'model.layers.9.x' \(one of 1 such\)"),
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


BROKEN_C = {
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
