"""The two steps of generation over a contiguous latent cache: prefill of a prompt, decoding of one token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.model.embedding import embed, unembed
from dsv3_jax.model.mla import Latents, absorb, latents, mla_absorbed
from dsv3_jax.model.moe.few_tokens import stacked_experts
from dsv3_jax.model.norm import rms_norm
from dsv3_jax.model.rope import rope_table
from dsv3_jax.model.transformer import hidden_states
from dsv3_jax.precision.policy import Policy
from dsv3_jax.serving.layers import scan_layers
from dsv3_jax.typing import Array, Float, Int, Variables


class LatentCache(NamedTuple):
    """C + R numbers (512 + 64 in V3) a token and layer; the dense layers come first.

    All sequences end at the same row, so a batch of unequal prompts is padded on the left: rows below
    `padding[b]` hold nothing, and row s of sequence b is position s - padding[b].
    """

    rows: Float[Array, "L B S C+R"]
    padding: Int[Array, "B"]
    length: Int[Array, ""]
    """Rows in use."""


def prefill(
    cfg: ModelConfig,
    variables: Variables,
    tokens: Int[Array, "B T"],
    padding: Int[Array, "B"],
    *,
    cache_size: int,
    policy: Policy,
) -> tuple[LatentCache, Float[Array, "B V"]]:
    """Reads whole prompts, padded on the left, into a fresh cache of `cache_size` rows.

    Uses the naive form of MLA. Returns the cache and the float32 logits after each prompt's last token.
    """
    T = tokens.shape[1]
    index = jnp.arange(T, dtype=jnp.int32)[None, :] - padding[:, None]
    states = hidden_states(
        cfg,
        variables,
        tokens,
        jnp.maximum(index, 0),
        (index >= 0).astype(jnp.int32),
        policy=policy,
        keep=_cache_rows,
        with_mtp=False,
    )
    rows = jnp.concatenate([kept for kept in states.kept if kept is not None])
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, cache_size - T), (0, 0)))
    logits = unembed(variables["params"]["unembed"], states.hidden[:, -1], policy=policy)
    return LatentCache(rows, padding, jnp.int32(T)), logits


def decoding_weights(cfg: ModelConfig, variables: Variables) -> dict:
    """`variables` as `decode` reads them: every layer's MLA absorbed. Do it once, before the loop over steps."""
    params = dict(variables["params"])
    for stack in ("dense_layers", "moe_layers"):
        if stack in params:
            params[stack] = {**params[stack], "mla": absorb(params[stack]["mla"], cfg=cfg)}
    return {**variables, "params": params}


def decode(
    cfg: ModelConfig,
    variables: Variables,
    tokens: Int[Array, "B"],
    cache: LatentCache,
    *,
    policy: Policy,
) -> tuple[LatentCache, Float[Array, "B V"]]:
    """Appends one token to each sequence and returns float32 logits for the next. Absorbed form of MLA.

    `variables` come from `decoding_weights`. The cache must have a free row (`length` < S).
    """
    params = variables["params"]
    position = (cache.length - cache.padding)[:, None]
    rope = rope_table(position, rope_dim=cfg.mla.rope_head_dim, theta=cfg.rope_theta, yarn=cfg.yarn)
    row_ids = jnp.arange(cache.rows.shape[2])[None, :]
    visible_BTS = ((row_ids >= cache.padding[:, None]) & (row_ids <= cache.length))[:, None, :]

    def mix_into(rows, layer):
        def mix(mla_params, normed):
            new = _cache_rows(latents(mla_params, normed, rope, cfg=cfg, policy=policy))
            updated = jax.lax.dynamic_update_slice(rows, new[None].astype(rows.dtype), (layer, 0, cache.length, 0))
            of_layer = jax.lax.dynamic_index_in_dim(updated, layer, keepdims=False)
            return mla_absorbed(mla_params, normed, rope, of_layer, visible_BTS, cfg=cfg, policy=policy), updated

        return mix

    x = embed(params["embed"], tokens[:, None], policy=policy)
    x, rows = scan_layers(cfg, variables, x, cache.rows, mix_into, experts=stacked_experts, policy=policy)
    hidden = rms_norm(x[:, 0], params["final_norm"]["scale"], eps=cfg.norm_eps)
    logits = unembed(params["unembed"], hidden, policy=policy)
    return cache._replace(rows=rows, length=cache.length + 1), logits


def _cache_rows(kept: Latents) -> Float[Array, "B T X"]:
    return jnp.concatenate([kept.kv, kept.k_rope], axis=-1)
