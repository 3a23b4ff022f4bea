"""The configuration reader: both dialects, the exact inverse, and a reason for every refusal."""

import dataclasses
import json

import pytest

from dsv3_jax.config.check import ConfigError
from dsv3_jax.config.model import MLAConfig, ModelConfig, MoEConfig, YarnConfig
from dsv3_jax.interop.hf_config import fp8_block, from_hf, to_hf

TINY = ("tiny_a", "tiny_b", "tiny_c", "tiny_d")

RELEASED = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}

V2_LITE = RELEASED | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "first_k_dense_replace": 1,
    "n_group": 1,
    "norm_topk_prob": False,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": None,
    "quantization_config": None,
    "rope_scaling": RELEASED["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_group": 1,
    "topk_method": "greedy",
}


def read(golden, name: str, file: str) -> dict:
    return json.loads((golden / "hf" / name / file).read_text())


def without(config: dict, *keys: str) -> dict:
    return {key: value for key, value in config.items() if key not in keys}


def test_released_671b_is_the_default_but_for_the_init_that_its_file_states():
    assert from_hf(RELEASED) == dataclasses.replace(ModelConfig(), init_std=0.02)


def test_we_write_every_released_key_with_the_released_value():
    written = to_hf(dataclasses.replace(ModelConfig(), init_std=0.02), "float8_e4m3fn")
    assert {key: written[key] for key in RELEASED} == RELEASED


@pytest.mark.parametrize("name", TINY)
def test_both_dialects_say_the_same(golden, name):
    official = from_hf(read(golden, name, "config.json"))
    assert from_hf(read(golden, name, "config_as_saved_by_transformers5.json")) == official


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_what_is_written_reads_back_the_same(golden, name, dtype):
    cfg = from_hf(read(golden, name, "config.json"))
    written = json.loads(json.dumps(to_hf(cfg, dtype)))
    assert from_hf(written) == cfg
    assert (fp8_block(written) == (128, 128)) == (dtype == "float8_e4m3fn")


@pytest.mark.parametrize("name", TINY)
def test_official_keys_of_the_golden_files_come_back(golden, name):
    config = read(golden, name, "config.json")
    dtype = "float8_e4m3fn" if "quantization_config" in config else config["torch_dtype"]
    written = to_hf(from_hf(config), dtype)
    assert {key: written.get(key) for key in config} == config


@pytest.mark.parametrize(
    "cfg",
    [
        ModelConfig(),
        ModelConfig(rope_theta=1234.5, norm_eps=1e-5, bos_id=7, eos_id=9, yarn=YarnConfig(mscale_all_dim=0.0)),
        ModelConfig(mtp_depth=0, moe=MoEConfig(num_shared_experts=0, normalize_weights=False)),
        ModelConfig(
            mtp_depth=0,
            mla=MLAConfig(q_latent_dim=None),
            moe=MoEConfig(score="softmax", has_bias=False, normalize_weights=False),
        ),
    ],
)
def test_round_trip(cfg):
    assert from_hf(json.loads(json.dumps(to_hf(cfg, "bfloat16")))) == cfg


def test_reads_v2_lite():
    cfg = from_hf(V2_LITE)
    assert cfg.mla.q_latent_dim is None
    assert (cfg.moe.score, cfg.moe.has_bias, cfg.moe.normalize_weights) == ("softmax", False, False)
    assert cfg.yarn is not None
    assert cfg.yarn.mscale == cfg.yarn.mscale_all_dim == 0.707
    assert from_hf(to_hf(cfg, "bfloat16")) == cfg
    grouped = from_hf(V2_LITE | {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3})
    assert (grouped.moe.num_groups, grouped.moe.groups_per_token) == (8, 3)
    assert to_hf(grouped, "bfloat16")["topk_method"] == "group_limited_greedy"


def test_null_means_absent():
    cfg = from_hf(RELEASED | {"n_group": None, "topk_group": None, "n_shared_experts": None, "rope_scaling": None})
    assert (cfg.moe.num_groups, cfg.moe.num_shared_experts, cfg.yarn) == (1, 0, None)


def test_yarn_without_mscale_is_what_the_released_code_assumes():
    scaling = without(RELEASED["rope_scaling"], "mscale", "mscale_all_dim", "beta_fast", "beta_slow")
    assert from_hf(RELEASED | {"rope_scaling": scaling}).yarn == YarnConfig(mscale=1.0, mscale_all_dim=0.0)


ROPE = RELEASED["rope_scaling"]
QUANT = RELEASED["quantization_config"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, r"LlamaForCausalLM.*unknown.*DeepseekV3ForCausalLM"),
        ({"architectures": None}, r"architectures=\[\] is unknown"),
        ({"attention_bias": True}, r"attention_bias=True.*no biases"),
        ({"mlp_bias": True}, r"mlp_bias=True.*no biases"),
        ({"tie_word_embeddings": True}, r"tie_word_embeddings=True.*own weights"),
        ({"moe_layer_freq": 2}, r"moe_layer_freq=2"),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu'.*SwiGLU"),
        ({"rope_interleave": False}, r"rope_interleave=False"),
        ({"num_key_value_heads": 8}, r"num_key_value_heads=8 differs from num_attention_heads=128"),
        ({"n_routed_experts": None}, r"'n_routed_experts' is null"),
        ({"hidden_size": "7168"}, r"hidden_size='7168' must be a whole number"),
        ({"hidden_size": True}, r"hidden_size=True must be a whole number"),
        ({"rms_norm_eps": "small"}, r"rms_norm_eps='small' must be a number"),
        ({"eos_token_id": [1, 2]}, r"eos_token_id=\[1, 2\]"),
        ({"scoring_func": "softmax"}, r"scoring_func='softmax'"),
        ({"topk_method": "greedy"}, r"topk_method='greedy'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, r"'linear'.*'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, r"'llama3'"),
        ({"rope_scaling": "yarn"}, r"rope_scaling='yarn' is not an object"),
        ({"rope_scaling": ROPE | {"attention_factor": 2.0}}, r"attention_factor=2.0"),
        ({"rope_scaling": ROPE | {"truncate": False}}, r"truncate=False"),
        ({"rope_scaling": ROPE | {"mscale": 0.7, "mscale_all_dim": 0}}, r"mscale=0.7 without mscale_all_dim"),
        ({"rope_scaling": without(ROPE, "factor")}, r"'factor' is missing"),
        ({"num_experts_per_tok": 999}, r"top_k=999"),
        ({"n_group": 7}, r"num_groups=7"),
    ],
)
def test_refuses_with_the_reason(change, reason):
    with pytest.raises(ConfigError, match=reason):
        from_hf(RELEASED | change)


@pytest.mark.parametrize("key", ["hidden_size", "kv_lora_rank", "n_routed_experts", "n_group", "routed_scaling_factor"])
def test_names_a_missing_key(key):
    with pytest.raises(ConfigError, match=f"'{key}' is missing"):
        from_hf(without(RELEASED, key))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"topk_method": "noaux_tc"}, r"topk_method='noaux_tc'"),
        ({"scoring_func": "sigmoid"}, r"scoring_func='sigmoid'"),
        ({"norm_topk_prob": True, "routed_scaling_factor": 16.0}, r"ambiguous"),
    ],
)
def test_refuses_what_v2_does_not_compute(change, reason):
    with pytest.raises(ConfigError, match=reason):
        from_hf(V2_LITE | change)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"quant_method": "awq"}, r"quant_method='awq'"),
        ({"quant_method": None}, r"quant_method=None"),
        ({"fmt": "e5m2"}, r"fmt='e5m2'"),
        ({"weight_block_size": None}, r"weight_block_size=None.*two positive numbers"),
        ({"weight_block_size": [128]}, r"weight_block_size=\[128\]"),
        ({"weight_block_size": [128, 0]}, r"weight_block_size=\[128, 0\]"),
    ],
)
def test_refuses_other_quantisations(change, reason):
    with pytest.raises(ConfigError, match=reason):
        fp8_block({"quantization_config": QUANT | change})


def test_reads_the_block_and_takes_power_of_two_scales_of_v3_1():
    assert fp8_block(RELEASED | {"quantization_config": QUANT | {"scale_fmt": "ue8m0"}}) == (128, 128)
    assert fp8_block({"quantization_config": QUANT | {"weight_block_size": [64, 32]}}) == (64, 32)
    assert fp8_block({}) is None


@pytest.mark.parametrize(
    ("cfg", "reason"),
    [
        (ModelConfig(latent_norm_eps=1e-5), r"latent_norm_eps=1e-05"),
        (ModelConfig(moe=MoEConfig(score="softmax")), r"score='softmax' with has_bias=True"),
        (ModelConfig(moe=MoEConfig(has_bias=False)), r"score='sigmoid' with has_bias=False"),
        (ModelConfig(moe=MoEConfig(score="softmax", has_bias=False)), r"ambiguous"),
        (ModelConfig(moe=MoEConfig(score="softmax", has_bias=False, scale=1.0)), r"mtp_depth=1"),
    ],
)
def test_does_not_write_what_no_architecture_computes(cfg, reason):
    with pytest.raises(ConfigError, match=reason):
        to_hf(cfg, "bfloat16")
