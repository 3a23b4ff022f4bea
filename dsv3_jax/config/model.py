"""The shape of a DeepSeek-V3 model.

The defaults are the released 671B model; a smaller one is `dataclasses.replace` away.
Every dimension that contradicts another is refused here, so nothing below has to check.
"HF" names the keys of an official config.json that state the same.
"""

import dataclasses
from typing import Literal

from dsv3_jax.config.check import check, check_finite


@dataclasses.dataclass(frozen=True)
class YarnConfig:
    """YaRN context extension (arXiv 2309.00071; report section 4.3).

    Applied at all lengths, as in the released weights, not only past `original_max_position`.
    """

    factor: float = 40.0
    """The paper's s. HF: rope_scaling.factor"""
    original_max_position: int = 4096
    """HF: rope_scaling.original_max_position_embeddings"""
    beta_fast: float = 32.0
    """The paper's β; equal to `beta_slow` (Kimi-K2), the blend of slow and fast pairs is one step.
    HF: rope_scaling.beta_fast"""
    beta_slow: float = 1.0
    """The paper's α. HF: rope_scaling.beta_slow"""
    mscale: float = 1.0
    """HF: rope_scaling.mscale"""
    mscale_all_dim: float = 1.0
    """HF: rope_scaling.mscale_all_dim"""

    def __post_init__(self) -> None:
        check_finite(self)
        check(self.factor >= 1.0, f"factor={self.factor} shrinks the context; use 1.0 or more (YarnConfig.factor).")
        check(
            self.original_max_position > 0,
            f"original_max_position={self.original_max_position} must be positive (YarnConfig).",
        )
        check(
            self.beta_fast >= self.beta_slow > 0,
            f"beta_fast={self.beta_fast} must be at least beta_slow={self.beta_slow}, and that above 0 (YarnConfig).",
        )
        for name in ("mscale", "mscale_all_dim"):
            check(getattr(self, name) >= 0, f"{name}={getattr(self, name)} is negative; use 0 for none (YarnConfig).")


@dataclasses.dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention (report section 2.1.1)."""

    num_heads: int = 128
    """The paper's n_h. HF: num_attention_heads, num_key_value_heads"""
    q_latent_dim: int | None = 1536
    """The paper's d'_c; None: one full query matrix, as in V2-Lite. HF: q_lora_rank"""
    kv_latent_dim: int = 512
    """The paper's d_c. HF: kv_lora_rank"""
    nope_head_dim: int = 128
    """The paper's d_h, of queries and keys without rope. HF: qk_nope_head_dim"""
    rope_head_dim: int = 64
    """The paper's d_h^R. HF: qk_rope_head_dim"""
    v_head_dim: int = 128
    """The paper's d_h, of values. HF: v_head_dim"""

    def __post_init__(self) -> None:
        check_finite(self)
        for name in ("num_heads", "kv_latent_dim", "nope_head_dim", "rope_head_dim", "v_head_dim"):
            check(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive (MLAConfig.{name}).")
        check(
            self.q_latent_dim is None or self.q_latent_dim > 0,
            f"q_latent_dim={self.q_latent_dim} must be positive, or None for a full query matrix (MLAConfig).",
        )
        check(
            self.rope_head_dim % 2 == 0,
            f"rope_head_dim={self.rope_head_dim} is odd, but rope rotates pairs; use an even number (MLAConfig).",
        )

    @property
    def qk_head_dim(self) -> int:
        return self.nope_head_dim + self.rope_head_dim


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """DeepSeekMoE (report section 2.1.2)."""

    num_experts: int = 256
    """The paper's N_r. HF: n_routed_experts"""
    num_shared_experts: int = 1
    """The paper's N_s. HF: n_shared_experts"""
    top_k: int = 8
    """The paper's K_r. HF: num_experts_per_tok"""
    expert_dim: int = 2048
    """Width of an expert. HF: moe_intermediate_size"""
    num_groups: int = 8
    """Experts lie in equal groups, one a node. HF: n_group"""
    groups_per_token: int = 4
    """Groups that a token may use, the paper's M. HF: topk_group"""
    score: Literal["sigmoid", "softmax"] = "sigmoid"
    """What makes affinities of logits. HF: scoring_func"""
    normalize_weights: bool = True
    """Weights of the chosen experts sum to `scale`. HF: norm_topk_prob"""
    has_bias: bool = True
    """A bias steers the choice, and groups are ranked by the sum of their two best experts (V3, "noaux_tc"); without
    it groups are ranked by their best expert (V2). HF: topk_method"""
    scale: float = 2.5
    """Not printed in the report. HF: routed_scaling_factor"""

    def __post_init__(self) -> None:
        check_finite(self)
        for name in ("num_experts", "top_k", "expert_dim", "num_groups", "groups_per_token", "scale"):
            check(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive (MoEConfig.{name}).")
        check(
            self.num_shared_experts >= 0,
            f"num_shared_experts={self.num_shared_experts} is negative; use 0 for none (MoEConfig).",
        )
        check(
            self.num_experts % self.num_groups == 0,
            f"num_experts={self.num_experts} is not divisible by num_groups={self.num_groups}; "
            "groups must be equal (MoEConfig).",
        )
        check(
            self.groups_per_token <= self.num_groups,
            f"groups_per_token={self.groups_per_token} exceeds num_groups={self.num_groups} (MoEConfig).",
        )
        reachable = self.groups_per_token * (self.num_experts // self.num_groups)
        check(
            self.top_k <= reachable,
            f"top_k={self.top_k} exceeds the {reachable} experts of groups_per_token={self.groups_per_token} "
            "groups; raise groups_per_token or lower top_k (MoEConfig).",
        )
        check(
            self.score in ("sigmoid", "softmax"),
            f"score={self.score!r} is unknown; use 'sigmoid' or 'softmax' (MoEConfig.score).",
        )
        if self.has_bias and self.num_groups > 1:
            check(
                self.num_experts // self.num_groups >= 2,
                f"num_groups={self.num_groups} leaves one expert a group, but groups are ranked by their two best; "
                "use fewer groups (MoEConfig).",
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything the model's functions read. The defaults are DeepSeek-V3 (671B)."""

    vocab_size: int = 129280
    """HF: vocab_size"""
    model_dim: int = 7168
    """The paper's d. HF: hidden_size"""
    num_layers: int = 61
    """Without MTP modules. HF: num_hidden_layers"""
    num_dense_layers: int = 3
    """The first layers, whose feed-forward is dense; the others have `moe`. HF: first_k_dense_replace"""
    ffn_dim: int = 18432
    """Width of a dense feed-forward. HF: intermediate_size"""
    mla: MLAConfig = MLAConfig()
    moe: MoEConfig = MoEConfig()
    mtp_depth: int = 1
    """Modules of multi-token prediction, the paper's D. HF: num_nextn_predict_layers"""
    max_position: int = 163840
    """HF: max_position_embeddings"""
    rope_theta: float = 10000.0
    """HF: rope_theta"""
    yarn: YarnConfig | None = YarnConfig()
    """None: no extension. HF: rope_scaling"""
    norm_eps: float = 1e-6
    """HF: rms_norm_eps"""
    latent_norm_eps: float = 1e-6
    """Of the norms of latents; the released code has 1e-6 there, whatever `norm_eps` is. HF: none"""
    init_std: float = 0.006
    """Weights start as N(0, `init_std`²) (report section 4.2). HF: initializer_range"""
    bos_id: int | None = 0
    """None: texts begin without a mark, so their first token is not predicted. HF: bos_token_id"""
    eos_id: int | None = 1
    """None: nothing ends a text; such a model generates on, and is not trained here. HF: eos_token_id"""

    def __post_init__(self) -> None:
        check_finite(self)
        for name in ("vocab_size", "model_dim", "num_layers", "ffn_dim", "max_position", "init_std", "rope_theta"):
            check(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive (ModelConfig.{name}).")
        check(
            0 <= self.num_dense_layers <= self.num_layers,
            f"num_dense_layers={self.num_dense_layers} must lie in 0..num_layers={self.num_layers} (ModelConfig).",
        )
        check(self.mtp_depth >= 0, f"mtp_depth={self.mtp_depth} is negative; use 0 for none (ModelConfig).")
        for name in ("norm_eps", "latent_norm_eps"):
            check(getattr(self, name) >= 0, f"{name}={getattr(self, name)} is negative (ModelConfig.{name}).")
        check(
            self.yarn is None or self.rope_theta > 1,
            f"rope_theta={self.rope_theta} must exceed 1, as YaRN divides by its logarithm (ModelConfig.rope_theta).",
        )
        for name, value in (("bos_id", self.bos_id), ("eos_id", self.eos_id)):
            check(
                value is None or 0 <= value < self.vocab_size,
                f"{name}={value} is outside vocab_size={self.vocab_size} (ModelConfig.{name}).",
            )

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers
