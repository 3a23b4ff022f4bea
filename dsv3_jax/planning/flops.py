"""Floating-point operations a token costs, counted from the model's shape.

A matmul of m·k·n multiply-adds counts 2·m·k·n. Norms, softmax, rope, routing and the optimizer are left out,
as is usual for model-FLOPs utilisation. Attention is causal: a token sees half of the sequence on average.
"""

from dsv3_jax.config.model import ModelConfig


def forward_flops_by_part(cfg: ModelConfig, seq_len: int) -> dict[str, float]:
    """Operations of one token's forward pass at training, by part of the model.

    Keys: mla_projections, attention, dense_ffn, experts, router, head, mtp (its projection, block and head).
    """
    moe = cfg.moe
    mla = 2.0 * _mla_weights(cfg)
    core = _attention_core(cfg, seq_len)
    experts = 2.0 * 3 * cfg.model_dim * moe.expert_dim * (moe.top_k + moe.num_shared_experts)
    router = 2.0 * cfg.model_dim * moe.num_experts
    head = 2.0 * cfg.model_dim * cfg.vocab_size
    joined = 2.0 * 2 * cfg.model_dim * cfg.model_dim
    return {
        "mla_projections": cfg.num_layers * mla,
        "attention": cfg.num_layers * core,
        "dense_ffn": cfg.num_dense_layers * 2.0 * 3 * cfg.model_dim * cfg.ffn_dim,
        "experts": cfg.num_moe_layers * experts,
        "router": cfg.num_moe_layers * router,
        "head": head,
        "mtp": cfg.mtp_depth * (joined + mla + core + experts + router + head),
    }


def train_flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """Operations of forward and backward for one token: three times the forward pass, without recomputation."""
    return 3.0 * sum(forward_flops_by_part(cfg, seq_len).values())


def _mla_weights(cfg: ModelConfig) -> int:
    mla = cfg.mla
    q_out = mla.num_heads * mla.qk_head_dim
    if mla.q_latent_dim is None:
        q = cfg.model_dim * q_out
    else:
        q = cfg.model_dim * mla.q_latent_dim + mla.q_latent_dim * q_out
    kv_down = cfg.model_dim * (mla.kv_latent_dim + mla.rope_head_dim)
    kv_up = mla.kv_latent_dim * mla.num_heads * (mla.nope_head_dim + mla.v_head_dim)
    return q + kv_down + kv_up + mla.num_heads * mla.v_head_dim * cfg.model_dim


def _attention_core(cfg: ModelConfig, seq_len: int) -> float:
    mla = cfg.mla
    mean_keys = (seq_len + 1) / 2
    return 2.0 * mla.num_heads * (mla.qk_head_dim + mla.v_head_dim) * mean_keys
