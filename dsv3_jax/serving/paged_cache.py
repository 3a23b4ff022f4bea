"""A cache of latents in pages that any sequence may own, and how a step of either kind attends over it."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.serving import PAGE_SIZE
from dsv3_jax.model.attention import attend
from dsv3_jax.model.functions import Functions
from dsv3_jax.model.mla import Context, Queries, join_rope
from dsv3_jax.model.rope import softmax_scale
from dsv3_jax.serving.absorbed import attend_absorbed, into_latents, out_of_latents
from dsv3_jax.typing import Array, DType, Float, Int, Params
from dsv3_kernels import cache_read, cache_write, mla_decode


class PagedCache(NamedTuple):
    """Latent rows of all layers in pages that any sequence may own; one table serves every layer."""

    pages: Float[Array, "L N 64 C+R"] | Int[Array, "L N 64 656"]
    """In the compute dtype, or uint8: FP8 rows (C = 512, R = 64)."""
    page_table: Int[Array, "B P"]
    """The pages of each sequence, in order; -1 where it has none. Rows that fall there are dropped."""
    lengths: Int[Array, "B"]
    """Tokens of each sequence in the cache."""


def empty_pages(cfg: ModelConfig, num_pages: int, dtype: DType) -> Array:
    """Zeros for `PagedCache.pages`; uint8 makes FP8 rows."""
    width = 656 if jnp.dtype(dtype) == jnp.uint8 else cfg.mla.kv_latent_dim + cfg.mla.rope_head_dim
    return jnp.zeros((cfg.num_layers, num_pages, PAGE_SIZE, width), dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pool:
    """The pages of all layers as one pool while a step runs: a layer's own begin at its number times N.

    So nothing is sliced out or put back.
    """

    pages: Array
    """[L·N, 64, …]"""
    page_table: Int[Array, "B P"]
    """Of the layer whose turn it is."""
    lengths: Int[Array, "B"]
    """Of the sequences before the step."""
    counts: Int[Array, "B"]
    """How many of the step's tokens each sequence has."""
    pages_a_layer: int = dataclasses.field(metadata={"static": True})
    implementation: str | None = dataclasses.field(metadata={"static": True})

    def write(self, params: Params, down: Float[Array, "B T X"], ctx: Context, *, cfg: ModelConfig) -> "Pool":
        """With the new tokens' rows of this layer, behind those of each sequence."""
        pages = cache_write(
            self.pages,
            down,
            params["kv_norm"],
            ctx.rope.cos,
            ctx.rope.sin,
            self.page_table,
            self.lengths,
            self.counts,
            eps=cfg.latent_norm_eps,
            implementation=self.implementation,
        )
        return dataclasses.replace(self, pages=pages)

    def read(self, dtype: DType) -> Float[Array, "B S X"]:
        """Every row that the table has room for, the new ones included."""
        return cache_read(self.pages, self.page_table, self.lengths + self.counts, dtype=dtype)

    def next_layer(self) -> "Pool":
        """The table shifted by one layer's pages."""
        table = jnp.where(self.page_table < 0, -1, self.page_table + self.pages_a_layer)
        return dataclasses.replace(self, page_table=table)


def open_pool(cache: PagedCache, counts: Int[Array, "B"], *, implementation: str | None) -> Pool:
    """The pool before the first layer."""
    L, N = cache.pages.shape[:2]
    is_page = (cache.page_table >= 0) & (cache.page_table < N)
    table = jnp.where(is_page, cache.page_table, -1)
    pages = cache.pages.reshape(L * N, *cache.pages.shape[2:])
    return Pool(pages, table, cache.lengths, counts, N, implementation)


class Decoding(NamedTuple):
    """A step in the absorbed form, of a few tokens a sequence or of a short chunk; parameters come from `absorb`."""

    pool: Pool
    plan: Any
    """Of `dsv3_kernels.plan_decode`, for all layers."""

    def attend(
        self,
        params: Params,
        q: Queries,
        down: Float[Array, "B T X"],
        ctx: Context,
        *,
        cfg: ModelConfig,
        functions: Functions,
    ) -> tuple[Float[Array, "B T H W"], "Decoding"]:
        """By `dsv3_kernels.mla_decode`, which computes `attention.attend`; another core reads rows out of the pages."""
        pool = self.pool.write(params, down, ctx, cfg=cfg)
        if functions.attend is attend:
            to_the_end = down.shape[1] - pool.counts  # where `mla_decode` takes a sequence's last tokens to stand
            queries = _rolled(into_latents(params, q), to_the_end)
            q_latent, q_rope = jnp.split(queries, [cfg.mla.kv_latent_dim], axis=-1)
            out = mla_decode(
                q_latent,
                q_rope,
                pool.pages,
                pool.page_table,
                pool.lengths + pool.counts,
                plan=self.plan,
                softmax_scale=softmax_scale(cfg.mla, cfg.yarn),
                implementation=pool.implementation,
            )[0]
            heads = out_of_latents(params, _rolled(out, -to_the_end))
        else:
            rows = pool.read(functions.compute_dtype)
            segments = jnp.ones(down.shape[:2], jnp.int32), jnp.ones(rows.shape[:2], jnp.int32)
            heads = attend_absorbed(params, q, rows, *segments, pool.lengths, cfg=cfg, functions=functions)
        return heads, Decoding(pool.next_layer(), self.plan)


def _rolled(x: Float[Array, "B T H X"], by: Int[Array, "B"]) -> Float[Array, "B T H X"]:
    """Each sequence's tokens moved to the right, those of the end to the beginning."""
    T = x.shape[1]
    if T == 1:
        return x
    come_from = (jnp.arange(T, dtype=jnp.int32)[None, :] - by[:, None]) % T
    return jnp.take_along_axis(x, come_from[:, :, None, None], axis=1)


class Chunk(NamedTuple):
    """A step of many tokens a sequence, a prompt or a part of one, in the naive form; parameters as for `Decoding`."""

    pool: Pool

    def attend(
        self,
        params: Params,
        q: Queries,
        down: Float[Array, "B T X"],
        ctx: Context,
        *,
        cfg: ModelConfig,
        functions: Functions,
    ) -> tuple[Float[Array, "B T H W"], "Chunk"]:
        """Expands every row that the table has room for to keys and values of all heads."""
        pool = self.pool.write(params, down, ctx, cfg=cfg)
        kv, k_rope = jnp.split(pool.read(functions.compute_dtype), [cfg.mla.kv_latent_dim], axis=-1)
        k_nope = jnp.einsum("bsc,hic->bshi", kv, params["k_up"].astype(kv.dtype))
        v = jnp.einsum("bsc,hcw->bshw", kv, params["v_up"].astype(kv.dtype))
        heads = functions.attend(
            jnp.concatenate(q, axis=-1),
            join_rope(k_nope, k_rope),
            v,
            scale=softmax_scale(cfg.mla, cfg.yarn),
            q_starts=pool.lengths,
        )
        return heads, Chunk(pool.next_layer())
