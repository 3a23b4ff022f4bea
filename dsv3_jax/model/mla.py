"""Multi-head latent attention (report section 2.1.1)."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.model.functions import Functions
from dsv3_jax.model.parts import rms_norm
from dsv3_jax.model.rope import RopeTable, apply_rope, softmax_scale
from dsv3_jax.typing import Array, Bool, Float, Int, Params


class Context(NamedTuple):
    """What all layers read beside their parameters."""

    rope: RopeTable
    segment_ids: Int[Array, "B T"] | None = None
    """A token sees its own segment only; None: one document a row."""
    valid: Bool[Array, "B T"] | None = None
    """Tokens that are not padding; None: all."""


class Queries(NamedTuple):
    """q^C and q^R, the latter after rope (eq. 7-9)."""

    nope: Float[Array, "B T H I"]
    rope: Float[Array, "B T H R"]


class Latents(NamedTuple):
    """What a cache stores of a token: C + R elements a layer, in place of 2·H·(I + R)."""

    kv: Float[Array, "B T C"]
    """c^KV after its norm (eq. 1)."""
    k_rope: Float[Array, "B T R"]
    """k^R after rope, one for all heads (eq. 3)."""


@runtime_checkable
class Cache(Protocol):
    """Earlier tokens' latents, of all layers; a pytree that `run_layers` carries from layer to layer."""

    def attend(
        self, params: Params, q: Queries, down: Array, ctx: Context, *, cfg: ModelConfig, functions: Functions
    ) -> tuple[Array, Any]:
        """What the heads give [B, T, H, W], and the cache with this layer's new rows, ready for the next layer.

        `down` [B, T, C + R] is W^DKV·x beside W^KR·x, before norm and rope.
        """
        raise NotImplementedError


def mla(
    params: Params,
    x: Float[Array, "B T D"],
    ctx: Context,
    cache: Cache | None = None,
    *,
    cfg: ModelConfig,
    functions: Functions,
) -> tuple[Float[Array, "B T D"], Any]:
    """u = W^O·[o_1; …; o_h] (eq. 1-11), over the tokens of x itself or over `cache`, which is returned longer."""
    q = queries(params, x, ctx.rope, cfg=cfg, functions=functions)
    down_BTX = checkpoint_name(functions.project(x, params["kv_down"]), "mla_kv_down")
    if cache is None:
        new = latents(params, down_BTX, ctx.rope, cfg=cfg)
        out_BTHW = attend_expanded(params, q, new, ctx, cfg=cfg, functions=functions)
    else:
        out_BTHW, cache = cache.attend(params, q, down_BTX, ctx, cfg=cfg, functions=functions)
    w_XD = params["out"].reshape(-1, params["out"].shape[-1])
    return functions.project_attended(out_BTHW.reshape(*x.shape[:2], -1), w_XD), cache


def queries(
    params: Params, x: Float[Array, "B T D"], rope: RopeTable, *, cfg: ModelConfig, functions: Functions
) -> Queries:
    """q^C and q^R, through the query latent where there is one (eq. 6-9)."""
    if cfg.mla.q_latent_dim is None:
        q_BTX = functions.project(x, params["q"].reshape(cfg.model_dim, -1))
    else:
        down_BTQ = checkpoint_name(functions.project(x, params["q_down"]), "mla_q_down")
        latent_BTQ = rms_norm(down_BTQ, params["q_norm"], eps=cfg.latent_norm_eps)
        q_BTX = functions.project(latent_BTQ, params["q_up"].reshape(cfg.mla.q_latent_dim, -1))
    q_BTHX = q_BTX.reshape(*x.shape[:2], cfg.mla.num_heads, cfg.mla.qk_head_dim)
    q_nope, q_rope = jnp.split(q_BTHX, [cfg.mla.nope_head_dim], axis=-1)
    return Queries(q_nope, apply_rope(q_rope, rope))


def latents(params: Params, down: Float[Array, "B T X"], rope: RopeTable, *, cfg: ModelConfig) -> Latents:
    """c^KV and k^R from what the down projection gave (eq. 1 and 3)."""
    kv, k_rope = jnp.split(down, [cfg.mla.kv_latent_dim], axis=-1)
    return Latents(rms_norm(kv, params["kv_norm"], eps=cfg.latent_norm_eps), apply_rope(k_rope, rope))


def attend_expanded(
    params: Params, q: Queries, new: Latents, ctx: Context, *, cfg: ModelConfig, functions: Functions
) -> Float[Array, "B T H W"]:
    """Naive form: keys and values of every head, k^C and v^C, from the latents (eq. 2, 4, 5, 10)."""
    kv_BTX = functions.project(new.kv, params["kv_up"].reshape(cfg.mla.kv_latent_dim, -1))
    kv_BTHX = kv_BTX.reshape(*new.kv.shape[:2], cfg.mla.num_heads, -1)
    k_nope, v = jnp.split(kv_BTHX, [cfg.mla.nope_head_dim], axis=-1)
    k = join_rope(k_nope, new.k_rope)
    return functions.attend(jnp.concatenate(q, axis=-1), k, v, ctx.segment_ids, scale=softmax_scale(cfg.mla, cfg.yarn))


def join_rope(k_nope: Float[Array, "B S H I"], k_rope: Float[Array, "B S R"]) -> Float[Array, "B S H X"]:
    """k = [k^C; k^R], the same k^R for every head (eq. 4)."""
    for_heads = jnp.broadcast_to(k_rope[:, :, None, :], (*k_nope.shape[:3], k_rope.shape[-1]))
    return jnp.concatenate([k_nope, for_heads], axis=-1)
