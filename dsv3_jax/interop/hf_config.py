"""The official config.json <-> `ModelConfig`, with the reason for what we cannot represent."""

from collections.abc import Mapping
from typing import Any

from dsv3_jax.config.check import ConfigError, check
from dsv3_jax.config.model import MLAConfig, ModelConfig, MoEConfig
from dsv3_jax.interop.fields import agreed, as_whole, flag, group, real, shown, token_ids, whole, word
from dsv3_jax.interop.hf_names import FP8_BLOCK
from dsv3_jax.interop.hf_rope import read_rope, rope_scaling, short

V2, V3 = "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"

_MODEL_TYPES = {"deepseek_v2": V2, "deepseek_v3": V3, "kimi_k2": V3}
"""What a file without `architectures` says."""

_FIXED = {
    "attention_bias": (False, "our attention has no biases"),
    "mlp_bias": (False, "our feed-forward has no biases"),
    "tie_word_embeddings": (False, "our output head has its own weights"),
    "moe_layer_freq": (1, "every layer after first_k_dense_replace is a mixture of experts here"),
    "hidden_act": ("silu", "our feed-forward is SwiGLU"),
    "rope_interleave": (True, "our rope rotates neighbours (2i, 2i+1), as the released weights are stored"),
}
"""Keys with one value that we can represent, which is also the meaning of a missing key."""

_READERS = {bool: flag, int: whole, str: word}


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Reads an official config.json, or one that transformers 5 wrote (`rope_parameters`).

    Architectures: DeepseekV3ForCausalLM (Kimi-K2 and Moonlight too); DeepseekV2ForCausalLM (softmax scores, no bias).
    Of several ids that end a text the first is `eos_id`; `stop_tokens.stop_ids` gives all of a folder.
    Raises: `ConfigError` with key, value and reason for what `ModelConfig` cannot represent, for a value that is not
        of its key's type, and for two keys that contradict each other.
    """
    try:
        return _model(config)
    except ConfigError as error:
        if str(error).startswith("config.json"):
            raise
        raise ConfigError(f"config.json describes a model that cannot be: {error}") from error


def to_hf(cfg: ModelConfig, dtype: str) -> dict[str, Any]:
    """Writes the official keys; `dtype` as in `save_pretrained`. `from_hf(to_hf(cfg, dtype)) == cfg`, or it raises.

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
        "rope_theta": short(cfg.rope_theta),
        "rope_scaling": None if cfg.yarn is None else rope_scaling(cfg.yarn),
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
    check(from_hf(hf) == cfg, f"{cfg} has no official keys that mean the same; change it to what from_hf reads.")
    return hf


def fp8_block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of an FP8 block, from `quantization_config`; None when nothing is quantised.

    The block cannot be told from the shapes, as the last one may be ragged.
    """
    quantisation = group(config, "quantization_config")
    if not quantisation:
        return None
    for key, value in (("quant_method", "fp8"), ("fmt", "e4m3")):
        found = quantisation.get(key, value if key == "fmt" else None)
        check(
            found == value,
            f"config.json: quantization_config.{key}={shown(found)} cannot be read; only {value!r} with blocks "
            "(dequantise the checkpoint to bfloat16 first).",
        )
    block = quantisation.get("weight_block_size")
    check(
        isinstance(block, list | tuple) and len(block) == 2,
        f"config.json: quantization_config.weight_block_size={shown(block)} must be two positive numbers such as "
        f"{list(FP8_BLOCK)}; one scale for a whole tensor is not read.",
    )
    rows, columns = (as_whole(size, "config.json: quantization_config.weight_block_size") for size in block or ())
    check(
        rows > 0 and columns > 0,
        f"config.json: quantization_config.weight_block_size={shown(block)} must be two positive numbers.",
    )
    return rows, columns


def _model(config: Mapping[str, Any]) -> ModelConfig:
    is_v3 = _architecture(config) == V3
    for key, (value, reason) in _FIXED.items():
        found = _READERS[type(value)](config, key, value)
        check(
            found == value,
            f"config.json: {key}={shown(found)} cannot be represented: {reason}; only {value!r} is read.",
        )
    num_heads = whole(config, "num_attention_heads")
    num_kv_heads = whole(config, "num_key_value_heads", num_heads)
    check(
        num_kv_heads == num_heads,
        f"config.json: num_key_value_heads={num_kv_heads} differs from num_attention_heads={num_heads}; "
        "latent attention has one key and value for each head.",
    )
    num_layers, num_dense_layers = whole(config, "num_hidden_layers"), whole(config, "first_k_dense_replace")
    # With first_k_dense_replace beyond the layers an MTP module would be dense, but ours have experts.
    mtp_depth = whole(config, "num_nextn_predict_layers", 0) if num_dense_layers <= num_layers else 0
    vocab_size = whole(config, "vocab_size")
    eos_ids = token_ids(config, "eos_token_id", vocab_size=vocab_size)
    check(
        "eos_token_id" in config, "config.json: 'eos_token_id' is missing; set it, to null where nothing ends a text."
    )
    theta, yarn = read_rope(config)
    return ModelConfig(
        vocab_size=vocab_size,
        model_dim=whole(config, "hidden_size"),
        num_layers=num_layers,
        num_dense_layers=min(num_dense_layers, num_layers),
        ffn_dim=whole(config, "intermediate_size"),
        mla=_mla(config, num_heads),
        moe=_moe_v3(config) if is_v3 else _moe_v2(config),
        mtp_depth=mtp_depth,
        max_position=whole(config, "max_position_embeddings"),
        rope_theta=theta,
        yarn=yarn,
        norm_eps=real(config, "rms_norm_eps", 1e-6),
        init_std=real(config, "initializer_range", 0.02),
        bos_id=None if config.get("bos_token_id") is None else whole(config, "bos_token_id"),
        eos_id=eos_ids[0] if eos_ids else None,
    )


def _architecture(config: Mapping[str, Any]) -> str:
    """V2 or V3: what `architectures` names (serving engines read it), else `model_type` (transformers reads that)."""
    names, kind = config.get("architectures"), word(config, "model_type", "")
    meant = _MODEL_TYPES.get(kind)
    check(names is None or isinstance(names, list | tuple), f"config.json: architectures={shown(names)} is no list.")
    if not names:
        check(
            meant is not None,
            f"config.json: architectures={shown(names)} and model_type={shown(kind)} name no model that is read here; "
            f"set architectures to [{V3!r}] or [{V2!r}].",
        )
        return str(meant)
    check(
        names[0] in (V2, V3) and all(name == names[0] for name in names),
        f"config.json: architectures={shown(names)} is unknown; this model reads [{V3!r}] or [{V2!r}].",
    )
    check(
        meant in (None, names[0]),
        f"config.json: architectures={shown(names)} contradicts model_type={shown(kind)}, and programs differ in which "
        "of them they take; correct one or delete it.",
    )
    return names[0]


def _mla(config: Mapping[str, Any], num_heads: int) -> MLAConfig:
    """The sizes of attention; `qk_head_dim` and `head_dim`, which transformers writes, must follow from them."""
    check(
        "q_lora_rank" in config,
        "config.json: 'q_lora_rank' is missing; set it, to null where queries have one full matrix.",
    )
    nope, rope = whole(config, "qk_nope_head_dim"), whole(config, "qk_rope_head_dim")
    for key, name, size in (
        ("qk_head_dim", "qk_nope_head_dim + qk_rope_head_dim", nope + rope),
        ("head_dim", "qk_rope_head_dim", rope),
    ):
        agreed({name: size, key: whole(config, key, size)})
    return MLAConfig(
        num_heads=num_heads,
        q_latent_dim=None if config["q_lora_rank"] is None else whole(config, "q_lora_rank"),
        kv_latent_dim=whole(config, "kv_lora_rank"),
        nope_head_dim=nope,
        rope_head_dim=rope,
        v_head_dim=whole(config, "v_head_dim"),
    )


def _moe_v3(config: Mapping[str, Any]) -> MoEConfig:
    """noaux_tc: sigmoid scores, a bias for the choice, groups ranked by their two best."""
    for key, value in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        found = word(config, key, value)
        check(found == value, f"config.json: {key}={shown(found)} is not what {V3} computes; expected {value!r}.")
    return MoEConfig(
        **_moe_sizes(config),
        num_groups=_null_as(1, config, "n_group"),
        groups_per_token=_null_as(1, config, "topk_group"),
        score="sigmoid",
        has_bias=True,
        normalize_weights=flag(config, "norm_topk_prob", True),
        scale=real(config, "routed_scaling_factor"),
    )


def _moe_v2(config: Mapping[str, Any]) -> MoEConfig:
    """Softmax scores without a bias; "group_limited_greedy" ranks groups by their best."""
    method = word(config, "topk_method", "greedy")
    check(
        method in ("greedy", "group_limited_greedy"),
        f"config.json: topk_method={shown(method)} is not what {V2} computes; use 'greedy' or 'group_limited_greedy'.",
    )
    found = word(config, "scoring_func", "softmax")
    check(
        found == "softmax", f"config.json: scoring_func={shown(found)} is not what {V2} computes; expected 'softmax'."
    )
    is_grouped = method == "group_limited_greedy"
    normalize_weights, scale = flag(config, "norm_topk_prob", False), real(config, "routed_scaling_factor", 1.0)
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
    """A null for the shared experts says that there are none; transformers also takes other names of the routed."""
    names = ("n_routed_experts", "num_experts", "num_local_experts")
    stated = agreed({name: whole(config, name) for name in names if config.get(name) is not None})
    return {
        "num_experts": whole(config, "n_routed_experts") if stated is None else stated,
        "num_shared_experts": _null_as(0, config, "n_shared_experts"),
        "top_k": whole(config, "num_experts_per_tok"),
        "expert_dim": whole(config, "moe_intermediate_size"),
    }


def _null_as(value: int, config: Mapping[str, Any], key: str) -> int:
    """The whole number at `key`, which must be there; `value` for a null."""
    return value if key in config and config[key] is None else whole(config, key)
