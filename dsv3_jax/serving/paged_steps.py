"""The steps of a serving engine over a paged latent cache: a chunk of prompts, a few tokens of each sequence.

Every shape is static and every length is data: sequences grow, come and go without a compilation.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.model.embedding import embed, unembed
from dsv3_jax.model.mla import Latents, mla_absorbed_over, mla_expanded_over
from dsv3_jax.model.moe.few_tokens import stacked_experts
from dsv3_jax.model.norm import rms_norm
from dsv3_jax.model.rope import RopeTable, rope_table
from dsv3_jax.precision.policy import Policy
from dsv3_jax.serving.layers import scan_layers, sliced_experts
from dsv3_jax.typing import Array, DType, Float, Int, Params, Variables
from dsv3_kernels import cache_read, cache_write, mla_decode, mla_prefill, plan_decode

PAGE_SIZE = 64
"""Tokens a page."""


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


def paged_decode(
    cfg: ModelConfig,
    variables: Variables,
    tokens: Int[Array, "B T"],
    counts: Int[Array, "B"],
    cache: PagedCache,
    *,
    policy: Policy,
    implementation: str | None = None,
) -> tuple[PagedCache, Float[Array, "B T V"]]:
    """Appends T tokens to each sequence (one, or one with drafts) and returns float32 logits behind each of them.

    `counts` is T for a sequence that takes part and 0 for one that does not: its length stays, its logits mean
    nothing. Absorbed form of MLA; `variables` come from `decoding_weights`. `implementation` as in `dsv3_kernels`.
    """
    lengths = cache.lengths + counts
    plan = plan_decode(lengths, num_queries=tokens.shape[1], num_heads=cfg.mla.num_heads, implementation=implementation)

    def attention(mla_params: Params, normed: Array, rope: RopeTable, pages: Array, page_table: Array) -> Array:
        def attend(q_latent, q_rope, *, scale):
            run = partial(mla_decode, plan=plan, softmax_scale=scale, implementation=implementation)
            return run(q_latent, q_rope, pages, page_table, lengths)[0]

        return mla_absorbed_over(mla_params, normed, rope, attend, cfg=cfg, policy=policy)

    x, cache = _paged_step(
        cfg, variables, tokens, counts, cache, attention, stacked_experts, policy=policy, implementation=implementation
    )
    return cache, unembed(variables["params"]["unembed"], x, policy=policy)


def paged_prefill(
    cfg: ModelConfig,
    variables: Variables,
    tokens: Int[Array, "B T"],
    counts: Int[Array, "B"],
    cache: PagedCache,
    *,
    policy: Policy,
    implementation: str | None = None,
) -> tuple[PagedCache, Float[Array, "B V"]]:
    """Appends the first `counts` of T tokens to each sequence, and returns float32 logits behind the last of them.

    A long prompt may come in chunks: each attends to what the cache has of the sequence, whether this request wrote it
    or another with the same beginning. Naive form of MLA: expands every cached row that `page_table` has room for, so
    give a table no wider than needed. `variables` come from `decoding_weights`.
    """
    lengths = cache.lengths + counts

    def attention(mla_params: Params, normed: Array, rope: RopeTable, pages: Array, page_table: Array) -> Array:
        rows = cache_read(pages, page_table, lengths, dtype=policy.compute_dtype)
        cached = Latents(*jnp.split(rows, [cfg.mla.kv_latent_dim], axis=-1))

        def attend(q, k, v, *, scale):
            run = partial(mla_prefill, softmax_scale=scale, q_starts=cache.lengths, implementation=implementation)
            return run(q, k, v)[0]

        return mla_expanded_over(mla_params, normed, rope, cached, attend, cfg=cfg, policy=policy)

    x, cache = _paged_step(
        cfg, variables, tokens, counts, cache, attention, sliced_experts, policy=policy, implementation=implementation
    )
    last = jnp.maximum(counts - 1, 0)[:, None, None]
    hidden = jnp.take_along_axis(x, last, axis=1)[:, 0]
    return cache, unembed(variables["params"]["unembed"], hidden, policy=policy)


def _paged_step(
    cfg: ModelConfig,
    variables: Variables,
    tokens: Int[Array, "B T"],
    counts: Int[Array, "B"],
    cache: PagedCache,
    attention,
    experts,
    *,
    policy: Policy,
    implementation: str | None,
) -> tuple[Float[Array, "B T D"], PagedCache]:
    """Writes the new rows layer by layer, attends, and returns normed hidden states with the longer cache."""
    L, N, page_size, W = cache.pages.shape
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    positions = cache.lengths[:, None] + index
    rope = rope_table(positions, rope_dim=cfg.mla.rope_head_dim, theta=cfg.rope_theta, yarn=cfg.yarn)

    def mix_into(pages, layer):
        # All layers' pages are one pool: a layer's own begin at layer · N. So nothing is sliced out or put back.
        is_page = (cache.page_table >= 0) & (cache.page_table < N)
        page_table = jnp.where(is_page, cache.page_table + layer * N, -1)

        def mix(mla_params, normed):
            down = policy.linear(normed, mla_params["kv_down"])
            written = cache_write(
                pages,
                down,
                mla_params["kv_norm"],
                rope.cos,
                rope.sin,
                page_table,
                cache.lengths,
                counts,
                eps=cfg.latent_norm_eps,
                implementation=implementation,
            )
            return attention(mla_params, normed, rope, written, page_table), written

        return mix

    x = embed(variables["params"]["embed"], tokens, policy=policy)
    pool = cache.pages.reshape(L * N, page_size, W)
    valid = index < counts[:, None]
    x, pool = scan_layers(cfg, variables, x, pool, mix_into, experts=experts, policy=policy, valid=valid)
    hidden = rms_norm(x, variables["params"]["final_norm"]["scale"], eps=cfg.norm_eps)
    return hidden, cache._replace(pages=pool.reshape(cache.pages.shape), lengths=cache.lengths + counts)
