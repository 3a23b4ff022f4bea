"""A contiguous cache of latents, for sequences that all end at the same row."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.model.functions import Functions
from dsv3_jax.model.mla import Context, Latents, Queries, attend_expanded, latents
from dsv3_jax.serving.absorbed import attend_absorbed
from dsv3_jax.typing import Array, Float, Int, Params


class LatentCache(NamedTuple):
    """C + R elements (512 + 64 in V3) a token and layer; the dense layers come first.

    A batch of unequal prompts is padded on the left: rows below `padding[b]` hold nothing, and row s of sequence b is
    position s - padding[b].
    """

    rows: Float[Array, "L B S C+R"]
    padding: Int[Array, "B"]
    length: Int[Array, ""]
    """Rows in use, those of the step that runs not counted."""
    layer: Int[Array, ""]
    """Whose turn it is: 0 between steps."""

    def attend(
        self,
        params: Params,
        q: Queries,
        down: Float[Array, "B T X"],
        ctx: Context,
        *,
        cfg: ModelConfig,
        functions: Functions,
    ) -> tuple[Float[Array, "B T H W"], "LatentCache"]:
        """Absorbed form over all rows so far, the new ones included; `params` come from `absorb`."""
        B, T = down.shape[:2]
        cache = self.write(latents(params, down, ctx.rope, cfg=cfg))
        rows = jax.lax.dynamic_index_in_dim(cache.rows, self.layer, keepdims=False)
        is_token = (jnp.arange(rows.shape[1])[None, :] >= self.padding[:, None]).astype(jnp.int32)
        starts, segments = jnp.broadcast_to(self.length, (B,)), jnp.ones((B, T), jnp.int32)
        out = attend_absorbed(params, q, rows, segments, is_token, starts, cfg=cfg, functions=functions)
        return out, cache._replace(layer=self.layer + 1)

    def write(self, new: Latents) -> "LatentCache":
        """With the new tokens' rows of this layer behind those in use."""
        rows = jnp.concatenate(new, axis=-1)[None].astype(self.rows.dtype)
        return self._replace(rows=jax.lax.dynamic_update_slice(self.rows, rows, (self.layer, 0, self.length, 0)))

    def next_step(self, num_tokens: int) -> "LatentCache":
        """After all layers have written `num_tokens` rows each."""
        return self._replace(length=self.length + num_tokens, layer=jnp.zeros_like(self.layer))


class Prompts(NamedTuple):
    """An empty cache that whole prompts are read into: a token attends to those of its own prompt."""

    cache: LatentCache

    def attend(
        self,
        params: Params,
        q: Queries,
        down: Float[Array, "B T X"],
        ctx: Context,
        *,
        cfg: ModelConfig,
        functions: Functions,
    ) -> tuple[Float[Array, "B T H W"], "Prompts"]:
        """Naive form, as in training; `params` as they are stored."""
        new = latents(params, down, ctx.rope, cfg=cfg)
        out = attend_expanded(params, q, new, ctx, cfg=cfg, functions=functions)
        cache = self.cache.write(new)
        return out, Prompts(cache._replace(layer=cache.layer + 1))


def empty_cache(cfg: ModelConfig, padding: Int[Array, "B"], *, cache_size: int, functions: Functions) -> LatentCache:
    """Room for `cache_size` rows of each sequence."""
    width = cfg.mla.kv_latent_dim + cfg.mla.rope_head_dim
    rows = jnp.zeros((cfg.num_layers, padding.shape[0], cache_size, width), functions.compute_dtype)
    return LatentCache(rows, padding, jnp.int32(0), jnp.int32(0))
