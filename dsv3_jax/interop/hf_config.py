"""The official config.json <-> `ModelConfig`, with the reason for what we cannot represent."""

from collections.abc import Mapping
from typing import Any

from dsv3_jax.config.check import check
from dsv3_jax.config.model import MLAConfig, ModelConfig, MoEConfig, YarnConfig
from dsv3_jax.interop.fields import real, whole
from dsv3_jax.interop.hf_names import FP8_BLOCK

V2, V3 = "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"

_FIXED = {
    "attention_bias": (False, "our attention has no biases"),
    "mlp_bias": (False, "our feed-forward has no biases"),
    "tie_word_embeddings": (False, "our output head has its own weights"),
    "moe_layer_freq": (1, "every layer after first_k_dense_replace is a mixture of experts here"),
    "hidden_act": ("silu", "our feed-forward is SwiGLU"),
    "rope_interleave": (True, "our rope turns neighbours (2i, 2i+1), as the released weights are stored"),
}
"""Keys with one value that we can represent, which is also the meaning of a missing key."""


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Reads an official config.json, or one that transformers 5 wrote (`rope_parameters`).

    Architectures: DeepseekV3ForCausalLM, and DeepseekV2ForCausalLM (softmax scores, no bias).
    Raises: `ConfigError` with key, value and reason for what `ModelConfig` cannot represent.
    """
    architectures = config.get("architectures") or []
    check(
        len(architectures) == 1 and architectures[0] in (V2, V3),
        f"config.json: architectures={architectures!r} is unknown; this model reads [{V3!r}] or [{V2!r}].",
    )
    is_v3 = architectures[0] == V3
    for key, (value, reason) in _FIXED.items():
        found = config.get(key, value)
        check(found == value, f"config.json: {key}={found!r} cannot be represented: {reason}; only {value!r} is read.")
    num_heads = whole(config, "num_attention_heads")
    num_kv_heads = whole(config, "num_key_value_heads", num_heads)
    check(
        num_kv_heads == num_heads,
        f"config.json: num_key_value_heads={num_kv_heads} differs from num_attention_heads={num_heads}; "
        "latent attention has one key and value for each head.",
    )
    theta, yarn = _rope(config)
    return ModelConfig(
        vocab_size=whole(config, "vocab_size"),
        model_dim=whole(config, "hidden_size"),
        num_layers=whole(config, "num_hidden_layers"),
        num_dense_layers=whole(config, "first_k_dense_replace"),
        ffn_dim=whole(config, "intermediate_size"),
        mla=MLAConfig(
            num_heads=num_heads,
            q_latent_dim=None if config.get("q_lora_rank") is None else whole(config, "q_lora_rank"),
            kv_latent_dim=whole(config, "kv_lora_rank"),
            nope_head_dim=whole(config, "qk_nope_head_dim"),
            rope_head_dim=whole(config, "qk_rope_head_dim"),
            v_head_dim=whole(config, "v_head_dim"),
        ),
        moe=_moe_v3(config) if is_v3 else _moe_v2(config),
        mtp_depth=whole(config, "num_nextn_predict_layers", 0),
        max_position=whole(config, "max_position_embeddings"),
        rope_theta=theta,
        yarn=yarn,
        norm_eps=real(config, "rms_norm_eps", 1e-6),
        init_std=real(config, "initializer_range", 0.02),
        bos_id=whole(config, "bos_token_id"),
        eos_id=whole(config, "eos_token_id"),
    )


def to_hf(cfg: ModelConfig, dtype: str) -> dict[str, Any]:
    """Writes the official keys; `dtype` as in `save_pretrained`. `from_hf(to_hf(cfg, dtype)) == cfg`.

    Raises: `ConfigError` when no official architecture computes what `cfg` says.
    """
    moe = cfg.moe
    kinds = {("sigmoid", True): V3, ("softmax", False): V2}
    check(
        (moe.score, moe.has_bias) in kinds,
        f"MoEConfig score={moe.score!r} with has_bias={moe.has_bias} has no official architecture; "
        "exported are 'sigmoid' with a bias (V3) and 'softmax' without (V2).",
    )
    check(
        cfg.latent_norm_eps == 1e-6,
        f"latent_norm_eps={cfg.latent_norm_eps} has no official key; the released code uses 1e-6 (ModelConfig).",
    )
    architecture = kinds[moe.score, moe.has_bias]
    is_v3 = architecture == V3
    if not is_v3:
        _check_v2(moe.normalize_weights, moe.scale)
        check(
            cfg.mtp_depth == 0,
            f"mtp_depth={cfg.mtp_depth}: {V2} has no multi-token prediction; set mtp_depth=0 and drop params['mtp'].",
        )
    hf: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": "deepseek_v3" if is_v3 else "deepseek_v2",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.model_dim,
        "intermediate_size": cfg.ffn_dim,
        "num_hidden_layers": cfg.num_layers,
        "first_k_dense_replace": cfg.num_dense_layers,
        "num_attention_heads": cfg.mla.num_heads,
        "num_key_value_heads": cfg.mla.num_heads,
        "q_lora_rank": cfg.mla.q_latent_dim,
        "kv_lora_rank": cfg.mla.kv_latent_dim,
        "qk_nope_head_dim": cfg.mla.nope_head_dim,
        "qk_rope_head_dim": cfg.mla.rope_head_dim,
        "v_head_dim": cfg.mla.v_head_dim,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert_dim,
        "n_group": moe.num_groups,
        "topk_group": moe.groups_per_token,
        "topk_method": "noaux_tc" if is_v3 else "greedy" if moe.num_groups == 1 else "group_limited_greedy",
        "scoring_func": moe.score,
        "norm_topk_prob": moe.normalize_weights,
        "routed_scaling_factor": moe.scale,
        "moe_layer_freq": 1,
        "max_position_embeddings": cfg.max_position,
        "rope_theta": _short(cfg.rope_theta),
        "rope_scaling": None if cfg.yarn is None else _rope_scaling(cfg.yarn),
        "rms_norm_eps": cfg.norm_eps,
        "initializer_range": cfg.init_std,
        "bos_token_id": cfg.bos_id,
        "eos_token_id": cfg.eos_id,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "ep_size": 1,
        "pretraining_tp": 1,
        "use_cache": True,
        "torch_dtype": "float32" if dtype == "float32" else "bfloat16",
    }
    if is_v3:
        hf["num_nextn_predict_layers"] = cfg.mtp_depth
    if dtype == "float8_e4m3fn":
        hf["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": list(FP8_BLOCK),
        }
    return hf


def fp8_block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of an FP8 block, from `quantization_config`; None when nothing is quantised.

    The block cannot be told from the shapes, as the last one may be ragged.
    """
    quantisation = config.get("quantization_config")
    if quantisation is None:
        return None
    check(isinstance(quantisation, Mapping), f"config.json: quantization_config={quantisation!r} is not an object.")
    for key, value in (("quant_method", "fp8"), ("fmt", "e4m3")):
        found = quantisation.get(key, value if key == "fmt" else None)
        check(
            found == value,
            f"config.json: quantization_config.{key}={found!r} cannot be read; only {value!r} with blocks "
            "(dequantise the checkpoint to bfloat16 first).",
        )
    block = quantisation.get("weight_block_size")
    check(
        isinstance(block, (list, tuple)) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block),
        f"config.json: quantization_config.weight_block_size={block!r} must be two positive numbers such as "
        f"{list(FP8_BLOCK)}; one scale for a whole tensor is not read.",
    )
    return block[0], block[1]


def _moe_v3(config: Mapping[str, Any]) -> MoEConfig:
    """noaux_tc: sigmoid scores, a bias for the choice, groups ranked by their two best."""
    for key, value in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        found = config.get(key, value)
        check(found == value, f"config.json: {key}={found!r} is not what {V3} computes; expected {value!r}.")
    return MoEConfig(
        **_moe_sizes(config),
        num_groups=_groups(config, "n_group"),
        groups_per_token=_groups(config, "topk_group"),
        score="sigmoid",
        has_bias=True,
        normalize_weights=bool(config.get("norm_topk_prob", True)),
        scale=real(config, "routed_scaling_factor"),
    )


def _moe_v2(config: Mapping[str, Any]) -> MoEConfig:
    """Softmax scores without a bias; "group_limited_greedy" ranks groups by their best."""
    method = config.get("topk_method", "greedy")
    check(
        method in ("greedy", "group_limited_greedy"),
        f"config.json: topk_method={method!r} is not what {V2} computes; use 'greedy' or 'group_limited_greedy'.",
    )
    found = config.get("scoring_func", "softmax")
    check(found == "softmax", f"config.json: scoring_func={found!r} is not what {V2} computes; expected 'softmax'.")
    is_grouped = method == "group_limited_greedy"
    normalize_weights, scale = bool(config.get("norm_topk_prob", False)), real(config, "routed_scaling_factor", 1.0)
    _check_v2(normalize_weights, scale)
    return MoEConfig(
        **_moe_sizes(config),
        num_groups=whole(config, "n_group") if is_grouped else 1,
        groups_per_token=whole(config, "topk_group") if is_grouped else 1,
        score="softmax",
        has_bias=False,
        normalize_weights=normalize_weights,
        scale=scale,
    )


def _check_v2(normalize_weights: bool, scale: float) -> None:
    check(
        not normalize_weights or scale == 1.0,
        f"norm_topk_prob=True with routed_scaling_factor={scale} is ambiguous in {V2}: implementations differ in "
        "whether normalised weights are scaled; use norm_topk_prob=False or a factor of 1.",
    )


def _moe_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    return {
        "num_experts": whole(config, "n_routed_experts"),
        "num_shared_experts": whole(config, "n_shared_experts", 0),
        "top_k": whole(config, "num_experts_per_tok"),
        "expert_dim": whole(config, "moe_intermediate_size"),
    }


def _groups(config: Mapping[str, Any], key: str) -> int:
    """A null says that experts are not grouped."""
    return 1 if key in config and config[key] is None else whole(config, key)


def _rope(config: Mapping[str, Any]) -> tuple[float, YarnConfig | None]:
    """(theta, YaRN) from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (official)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    check(isinstance(rope, Mapping), f"config.json: rope_scaling={rope!r} is not an object.")
    theta = real(rope, "rope_theta") if "rope_theta" in rope else real(config, "rope_theta", 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    check(
        kind in ("default", "yarn"),
        f"config.json: rope type {kind!r} cannot be represented; only 'default' (none) and 'yarn' are read.",
    )
    if kind == "default":
        return theta, None
    for key, value in (("attention_factor", None), ("truncate", True)):
        found = rope.get(key, value)
        check(
            found == value,
            f"config.json: rope {key}={found!r} cannot be represented; DeepSeek's YaRN has only {value!r}.",
        )
    yarn = YarnConfig(
        factor=real(rope, "factor"),
        original_max_position=whole(rope, "original_max_position_embeddings"),
        beta_fast=real(rope, "beta_fast", 32.0),
        beta_slow=real(rope, "beta_slow", 1.0),
        mscale=real(rope, "mscale", 1.0),
        mscale_all_dim=real(rope, "mscale_all_dim", 0.0),
    )
    check(
        yarn.mscale_all_dim != 0.0 or yarn.mscale == 1.0,
        f"config.json: rope mscale={yarn.mscale} without mscale_all_dim is ambiguous: DeepSeek's code uses it, "
        "transformers ignores it; give both.",
    )
    return theta, yarn


def _rope_scaling(yarn: YarnConfig) -> dict[str, Any]:
    return {
        "type": "yarn",
        "factor": _short(yarn.factor),
        "original_max_position_embeddings": yarn.original_max_position,
        "beta_fast": _short(yarn.beta_fast),
        "beta_slow": _short(yarn.beta_slow),
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }


def _short(value: float) -> float | int:
    """10000.0 -> 10000, as the released files write it."""
    return int(value) if float(value).is_integer() else value
