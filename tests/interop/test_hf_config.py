"""The configuration reader: both dialects, the exact inverse, and a reason for every refusal."""

import dataclasses
import json
import math

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


KIMI_K2 = RELEASED | {
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 163584,
    "eos_token_id": [163586, 163585],
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "rope_scaling": RELEASED["rope_scaling"] | {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "seq_aux": True,
    "topk_group": 1,
    "vocab_size": 163840,
}

MOONLIGHT = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "bos_token_id": None,
    "eos_token_id": 163585,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11264,
    "kv_lora_rank": 512,
    "max_position_embeddings": 8192,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 163840,
}

FAMILY = {
    "Kimi-K2": (
        KIMI_K2,
        ModelConfig(
            vocab_size=163840,
            num_dense_layers=1,
            mla=MLAConfig(num_heads=64),
            moe=MoEConfig(num_experts=384, num_groups=1, groups_per_token=1, scale=2.827),
            mtp_depth=0,
            max_position=131072,
            rope_theta=50000.0,
            yarn=YarnConfig(factor=32.0, beta_fast=1.0, beta_slow=1.0),
            init_std=0.02,
            bos_id=163584,
            eos_id=163586,
        ),
    ),
    "Moonlight-16B-A3B": (
        MOONLIGHT,
        ModelConfig(
            vocab_size=163840,
            model_dim=2048,
            num_layers=27,
            num_dense_layers=1,
            ffn_dim=11264,
            mla=MLAConfig(num_heads=16, q_latent_dim=None),
            moe=MoEConfig(
                num_experts=64, num_shared_experts=2, top_k=6, expert_dim=1408, num_groups=1, groups_per_token=1,
                scale=2.446,
            ),
            mtp_depth=0,
            max_position=8192,
            rope_theta=50000.0,
            yarn=None,
            norm_eps=1e-5,
            init_std=0.02,
            bos_id=None,
            eos_id=163585,
        ),
    ),
    "DeepSeek-V2": (
        V2_LITE
        | {"first_k_dense_replace": 1, "n_group": 8, "n_routed_experts": 160, "n_shared_experts": 2,
           "num_experts_per_tok": 6, "num_hidden_layers": 60, "q_lora_rank": 1536, "routed_scaling_factor": 16.0,
           "topk_group": 3, "topk_method": "group_limited_greedy"},
        ModelConfig(
            num_layers=60,
            num_dense_layers=1,
            moe=MoEConfig(
                num_experts=160, num_shared_experts=2, top_k=6, num_groups=8, groups_per_token=3, score="softmax",
                normalize_weights=False, has_bias=False, scale=16.0,
            ),
            mtp_depth=0,
            yarn=YarnConfig(mscale=0.707, mscale_all_dim=0.707),
            init_std=0.02,
        ),
    ),
}  # fmt: skip


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


@pytest.mark.parametrize("name", FAMILY)
def test_reads_members_of_the_family(name):
    config, expected = FAMILY[name]
    assert from_hf(config) == expected
    assert from_hf(to_hf(expected, "bfloat16")) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"eos_token_id": [1, 7, 9]}, {"eos_id": 1}),
        ({"eos_token_id": [5]}, {"eos_id": 5}),
        ({"bos_token_id": None, "eos_token_id": None}, {"bos_id": None, "eos_id": None}),
        ({"architectures": None, "model_type": "deepseek_v3"}, {}),
        ({"architectures": [], "model_type": "kimi_k2"}, {}),
        ({"first_k_dense_replace": 99}, {"num_dense_layers": 61, "mtp_depth": 0}),
        ({"vocab_size": 129280.0, "hidden_size": 7168.0, "moe_layer_freq": 1.0}, {}),
        ({"max_position_embeddings": 1e5}, {"max_position": 100000}),
        ({"num_local_experts": 256, "num_experts": 256, "head_dim": 64, "qk_head_dim": 192, "dtype": "float16"}, {}),
    ],
)  # fmt: skip
def test_reads_what_transformers_reads(change, expected):
    released = dataclasses.replace(ModelConfig(), init_std=0.02)
    assert from_hf(RELEASED | change) == dataclasses.replace(released, **expected)


def test_absent_bos_and_other_name_of_experts():
    config = without(RELEASED, "bos_token_id", "n_routed_experts") | {"num_local_experts": 256}
    assert from_hf(config) == dataclasses.replace(ModelConfig(), init_std=0.02, bos_id=None)


def test_null_means_absent():
    cfg = from_hf(RELEASED | {"n_group": None, "topk_group": None, "n_shared_experts": None, "rope_scaling": None})
    assert (cfg.moe.num_groups, cfg.moe.num_shared_experts, cfg.yarn) == (1, 0, None)


ROPE = RELEASED["rope_scaling"]
QUANT = RELEASED["quantization_config"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, r"LlamaForCausalLM.*unknown.*DeepseekV3ForCausalLM"),
        ({"architectures": None}, r"architectures=None and model_type='' name no model"),
        ({"architectures": [], "model_type": "llama"}, r"model_type='llama' name no model"),
        ({"architectures": "DeepseekV3ForCausalLM"}, r"architectures='DeepseekV3ForCausalLM' is no list"),
        ({"architectures": ["DeepseekV3ForCausalLM", "LlamaForCausalLM"]}, r"LlamaForCausalLM.*unknown"),
        ({"model_type": "deepseek_v2"}, r"architectures=.*contradicts model_type='deepseek_v2'"),
        ({"q_lora_rank": 0}, r"q_latent_dim=0 must be positive"),
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
        ({"eos_token_id": []}, r"eos_token_id=\[\] names no token"),
        ({"eos_token_id": [1, -2]}, r"eos_token_id=-2 is outside vocab_size"),
        ({"eos_token_id": [1, 129280]}, r"eos_token_id=129280 is outside vocab_size"),
        ({"eos_token_id": [1, True]}, r"eos_token_id=True must be a whole number"),
        ({"bos_token_id": [0]}, r"bos_token_id=\[0\] must be a whole number"),
        ({"bos_token_id": -1}, r"bos_id=-1 is outside vocab_size"),
        ({"hidden_size": 7168.5}, r"hidden_size=7168.5 must be a whole number"),
        ({"hidden_size": -7168}, r"^config.json describes a model that cannot be: model_dim=-7168 must be positive"),
        ({"hidden_size": 10**5000}, r"hidden_size=\(a number of 16610 bits\) must be a whole number"),
        ({"rope_theta": 10**400}, r"rope_theta=\(a number of 1329 bits\) must be a number, and finite"),
        ({"rms_norm_eps": math.nan}, r"rms_norm_eps=nan must be a number, and finite"),
        ({"routed_scaling_factor": math.inf}, r"routed_scaling_factor=inf must be a number, and finite"),
        ({"num_nextn_predict_layers": math.inf}, r"num_nextn_predict_layers=inf must be a whole number"),
        ({"norm_topk_prob": "false"}, r"norm_topk_prob='false' must be true or false"),
        ({"norm_topk_prob": 0}, r"norm_topk_prob=0 must be true or false"),
        ({"norm_topk_prob": None}, r"norm_topk_prob=None must be true or false"),
        ({"tie_word_embeddings": 0}, r"tie_word_embeddings=0 must be true or false"),
        ({"moe_layer_freq": True}, r"moe_layer_freq=True must be a whole number"),
        ({"scoring_func": 1}, r"scoring_func=1 must be a text"),
        ({"scoring_func": "softmax"}, r"scoring_func='softmax'"),
        ({"topk_method": "greedy"}, r"topk_method='greedy'"),
        ({"num_experts_per_tok": 999}, r"top_k=999"),
        ({"n_group": 7}, r"num_groups=7"),
    ],
)
def test_refuses_with_the_reason(change, reason):
    with pytest.raises(ConfigError, match=reason):
        from_hf(RELEASED | change)


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        ({"num_experts": 8}, ("n_routed_experts", "num_experts")),
        ({"num_local_experts": 8}, ("n_routed_experts", "num_local_experts")),
        ({"head_dim": 128}, ("qk_rope_head_dim", "head_dim")),
        ({"qk_head_dim": 128}, ("qk_nope_head_dim", "qk_head_dim")),
        ({"num_key_value_heads": 8}, ("num_attention_heads", "num_key_value_heads")),
    ],
)
def test_names_two_keys_that_contradict_each_other(change, keys):
    with pytest.raises(ConfigError) as caught:
        from_hf(RELEASED | change)
    assert all(key in str(caught.value) for key in keys)


@pytest.mark.parametrize(
    "key",
    [
        *("hidden_size", "kv_lora_rank", "q_lora_rank", "n_routed_experts", "n_shared_experts", "n_group"),
        *("routed_scaling_factor", "eos_token_id"),
    ],
)
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
        ({"weight_block_size": [128, True]}, r"weight_block_size=True must be a whole number"),
        ({"weight_block_size": [128, math.inf]}, r"weight_block_size=inf must be a whole number"),
    ],
)
def test_refuses_other_quantisations(change, reason):
    with pytest.raises(ConfigError, match=reason):
        fp8_block({"quantization_config": QUANT | change})


def test_reads_the_block_and_takes_power_of_two_scales_of_v3_1():
    assert fp8_block(RELEASED | {"quantization_config": QUANT | {"scale_fmt": "ue8m0"}}) == (128, 128)
    assert fp8_block({"quantization_config": QUANT | {"weight_block_size": [64.0, 32]}}) == (64, 32)
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
