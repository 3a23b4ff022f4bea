"""Multi-head latent attention, naive for training and absorbed for decoding."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.model.attention import attend_blocked
from dsv3_jax.model.latent_attention import attend_latent
from dsv3_jax.model.norm import rms_norm
from dsv3_jax.model.rope import RopeTable, apply_rope, softmax_scale
from dsv3_jax.precision.policy import Policy
from dsv3_jax.typing import Array, Bool, Float, Int, Params

Attend = Callable[..., Float[Array, "B T H W"]]


class Latents(NamedTuple):
    """What decoding keeps of a token: C + R numbers a layer, in place of 2·H·(I + R)."""

    kv: Float[Array, "B T C"]
    """c^KV after its norm (eq. 1)."""
    k_rope: Float[Array, "B T R"]
    """k^R after rope, one for all heads (eq. 3)."""


def queries(
    params: Params, x: Float[Array, "B T D"], rope: RopeTable, *, cfg: ModelConfig, policy: Policy
) -> tuple[Float[Array, "B T H I"], Float[Array, "B T H R"]]:
    """q^C and q^R, through the query latent where there is one (eq. 6-9)."""
    if cfg.mla.q_latent_dim is None:
        q_BTX = policy.linear(x, params["q"].reshape(cfg.model_dim, -1))
    else:
        down_BTQ = checkpoint_name(policy.linear(x, params["q_down"]), "kept")
        latent_BTQ = rms_norm(down_BTQ, params["q_norm"], eps=cfg.latent_norm_eps)
        q_BTX = policy.linear(latent_BTQ, params["q_up"].reshape(cfg.mla.q_latent_dim, -1))
    q_BTHX = q_BTX.reshape(*x.shape[:2], cfg.mla.num_heads, cfg.mla.qk_head_dim)
    q_nope, q_rope = jnp.split(q_BTHX, [cfg.mla.nope_head_dim], axis=-1)
    return q_nope, apply_rope(q_rope, rope)


def latents(params: Params, x: Float[Array, "B T D"], rope: RopeTable, *, cfg: ModelConfig, policy: Policy) -> Latents:
    """c^KV and k^R (eq. 1 and 3)."""
    down_BTX = checkpoint_name(policy.linear(x, params["kv_down"]), "kept")
    kv, k_rope = jnp.split(down_BTX, [cfg.mla.kv_latent_dim], axis=-1)
    return Latents(rms_norm(kv, params["kv_norm"], eps=cfg.latent_norm_eps), apply_rope(k_rope, rope))


def mla(
    params: Params,
    x: Float[Array, "B T D"],
    rope: RopeTable,
    segment_ids: Int[Array, "B T"] | None,
    *,
    cfg: ModelConfig,
    policy: Policy,
    attend: Attend = attend_blocked,
) -> tuple[Float[Array, "B T D"], Latents]:
    """Naive form: expands keys and values of every head (eq. 1-11). Also returns what a cache would keep."""
    q_nope, q_rope = queries(params, x, rope, cfg=cfg, policy=policy)
    cached = latents(params, x, rope, cfg=cfg, policy=policy)
    kv_BTX = policy.linear(cached.kv, params["kv_up"].reshape(cfg.mla.kv_latent_dim, -1))
    kv_BTHX = kv_BTX.reshape(*x.shape[:2], cfg.mla.num_heads, -1)
    k_nope, v = jnp.split(kv_BTHX, [cfg.mla.nope_head_dim], axis=-1)
    k_rope = jnp.broadcast_to(cached.k_rope[:, :, None, :], q_rope.shape)
    out_BTHW = attend(
        jnp.concatenate([q_nope, q_rope], axis=-1),
        jnp.concatenate([k_nope, k_rope], axis=-1),
        v,
        segment_ids,
        scale=softmax_scale(cfg.mla, cfg.yarn),
    )
    return _project_out(params, out_BTHW, policy=policy), cached


def absorb(params: Params, *, cfg: ModelConfig) -> dict[str, Array]:
    """Splits W^UK from W^UV and turns both as decoding multiplies them: `k_up` [H, I, C], `v_up` [H, C, W].

    Done once for many steps, on one layer or on a stack: turning them costs as much as the attention of a step.
    """
    k_up, v_up = jnp.split(params["kv_up"], [cfg.mla.nope_head_dim], axis=-1)
    rest = {name: leaf for name, leaf in params.items() if name != "kv_up"}
    return rest | {"k_up": jnp.moveaxis(k_up, -3, -1), "v_up": jnp.moveaxis(v_up, -2, -3)}


def mla_absorbed(
    params: Params,
    x: Float[Array, "B T D"],
    rope: RopeTable,
    cache: Float[Array, "B S X"],
    visible: Bool[Array, "B T S"],
    *,
    cfg: ModelConfig,
    policy: Policy,
) -> Float[Array, "B T D"]:
    """Absorbed form: W^UK moves into the query, W^UV behind attention, so heads read the latents themselves.

    `params` come from `absorb`. `cache` already holds the new tokens' rows; `visible` marks the rows that each query
    may read.
    """
    attend = functools.partial(attend_latent, cache=cache, visible=visible)
    return mla_absorbed_over(params, x, rope, attend, cfg=cfg, policy=policy)


def mla_absorbed_over(
    params: Params,
    x: Float[Array, "B T D"],
    rope: RopeTable,
    attend: Attend,
    *,
    cfg: ModelConfig,
    policy: Policy,
) -> Float[Array, "B T D"]:
    """`mla_absorbed` over any cache: `attend(q_latent, q_rope, scale=…)` gives [B, T, H, C]."""
    q_nope, q_rope = queries(params, x, rope, cfg=cfg, policy=policy)
    q_latent = jnp.einsum("bthi,hic->bthc", q_nope, params["k_up"].astype(policy.compute_dtype))
    out_BTHC = attend(q_latent, q_rope, scale=softmax_scale(cfg.mla, cfg.yarn))
    out_BTHW = jnp.einsum("bthc,hcw->bthw", out_BTHC, params["v_up"].astype(policy.compute_dtype))
    return _project_out(params, out_BTHW, policy=policy)


def mla_expanded_over(
    params: Params,
    x: Float[Array, "B T D"],
    rope: RopeTable,
    cached: Latents,
    attend: Callable[..., Float[Array, "B T H W"]],
    *,
    cfg: ModelConfig,
    policy: Policy,
) -> Float[Array, "B T D"]:
    """Naive form over a cache, for many queries at once: expands the cached latents to keys and values of every head.

    `params` come from `absorb`. `attend(q, k, v, scale=…)` gives [B, T, H, W]; it knows where the queries stand.
    """
    q_nope, q_rope = queries(params, x, rope, cfg=cfg, policy=policy)
    k_nope = jnp.einsum("bsc,hic->bshi", cached.kv, params["k_up"].astype(policy.compute_dtype))
    v = jnp.einsum("bsc,hcw->bshw", cached.kv, params["v_up"].astype(policy.compute_dtype))
    k_rope = jnp.broadcast_to(cached.k_rope[:, :, None, :], (*k_nope.shape[:3], cached.k_rope.shape[-1]))
    out_BTHW = attend(
        jnp.concatenate([q_nope, q_rope], axis=-1),
        jnp.concatenate([k_nope, k_rope], axis=-1),
        v,
        scale=softmax_scale(cfg.mla, cfg.yarn),
    )
    return _project_out(params, out_BTHW, policy=policy)


def _project_out(params: Params, out_BTHW: Array, *, policy: Policy) -> Float[Array, "B T D"]:
    """u = W^O·[o_1; …; o_h] (eq. 11)."""
    B, T = out_BTHW.shape[:2]
    w_XD = params["out"].reshape(-1, params["out"].shape[-1])
    return policy.attention_linear(out_BTHW.reshape(B, T, -1), w_XD)
