"""The steps of a serving engine over a paged latent cache: a chunk of prompts, a few tokens of each sequence.

Every shape is static and every length is data: sequences grow, come and go without a compilation.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.model.functions import Functions
from dsv3_jax.model.parts import unembed
from dsv3_jax.model.transformer import context, final_norm
from dsv3_jax.serving.paged_cache import Chunk, Decoding, PagedCache, open_pool
from dsv3_jax.serving.steps import all_layers
from dsv3_jax.typing import Array, Float, Int, Variables
from dsv3_kernels import plan_decode


class Step(NamedTuple):
    """What a step computed beside the cache's rows."""

    logits: Float[Array, "B *T V"]
    """Float32: behind each new token, or behind each sequence's last one."""
    hidden: Float[Array, "B T D"]
    """Of every new token, after the final norm; what stands beyond a sequence's count means nothing."""
    load: Int[Array, "l E"] | None
    """Tokens that each expert of each MoE layer received."""


def paged_decode(
    cfg: ModelConfig,
    variables: Variables,
    tokens: Int[Array, "B T"],
    counts: Int[Array, "B"],
    cache: PagedCache,
    *,
    functions: Functions,
    implementation: str | None = None,
) -> tuple[PagedCache, Step]:
    """Appends T tokens to each sequence (one, or one with drafts) and computes logits behind each of them.

    `counts` is T for a sequence that takes part and 0 for one that does not: its length stays, its logits mean
    nothing. Rows may also be successive tokens of one sequence, with its pages and a length more each: in every layer
    all of them are written before any attends. Absorbed form of MLA; `variables` come from `decoding_weights`.
    `implementation` as in `dsv3_kernels`.
    """
    step = _absorbed(cfg, tokens, counts, cache, implementation=implementation)
    hidden, load, cache = _append(cfg, variables, tokens, counts, cache, step, functions=functions)
    return cache, Step(unembed(variables["params"]["unembed"], hidden, functions=functions), hidden, load)


def paged_prefill(
    cfg: ModelConfig,
    variables: Variables,
    tokens: Int[Array, "B T"],
    counts: Int[Array, "B"],
    cache: PagedCache,
    *,
    functions: Functions,
    implementation: str | None = None,
) -> tuple[PagedCache, Step]:
    """Appends the first `counts` of T tokens to each sequence, and computes logits [B, V] behind the last of them.

    A long prompt may come in chunks: each attends to what the cache has of the sequence, whether this request wrote it
    or another with the same beginning. Naive form of MLA: expands every cached row that `page_table` has room for, so
    give a table no wider than needed. `variables` come from `decoding_weights`.
    """
    step = Chunk(open_pool(cache, counts, implementation=implementation))
    return _read(cfg, variables, tokens, counts, cache, step, functions=functions)


def paged_extend(
    cfg: ModelConfig,
    variables: Variables,
    tokens: Int[Array, "B T"],
    counts: Int[Array, "B"],
    cache: PagedCache,
    *,
    functions: Functions,
    implementation: str | None = None,
) -> tuple[PagedCache, Step]:
    """`paged_prefill` in the absorbed form of MLA, which expands nothing: its cost follows lengths, not the table.

    Cheaper for chunks that `extends` says, and always for the short rest of a prompt whose beginning is in the cache.
    """
    step = _absorbed(cfg, tokens, counts, cache, implementation=implementation)
    return _read(cfg, variables, tokens, counts, cache, step, functions=functions)


def extends(cfg: ModelConfig, num_tokens: int) -> bool:
    """Whether chunks of `num_tokens` take fewer multiplications in the absorbed form, whatever lies before them.

    A key costs each head C·(I + W) to expand; then a query multiplies I + R + W elements of it, and 2·C + R absorbed.
    """
    mla = cfg.mla
    expanding = mla.kv_latent_dim * (mla.nope_head_dim + mla.v_head_dim)
    absorbed, expanded = 2 * mla.kv_latent_dim + mla.rope_head_dim, mla.qk_head_dim + mla.v_head_dim
    return num_tokens * absorbed <= expanding + num_tokens * expanded


def _absorbed(
    cfg: ModelConfig, tokens: Array, counts: Array, cache: PagedCache, *, implementation: str | None
) -> Decoding:
    pool = open_pool(cache, counts, implementation=implementation)
    lengths, settings = cache.lengths + counts, {"num_heads": cfg.mla.num_heads, "implementation": implementation}
    return Decoding(pool, plan_decode(lengths, num_queries=tokens.shape[1], **settings))


def _read(
    cfg: ModelConfig,
    variables: Variables,
    tokens: Int[Array, "B T"],
    counts: Int[Array, "B"],
    cache: PagedCache,
    step: Any,
    *,
    functions: Functions,
) -> tuple[PagedCache, Step]:
    """A step whose logits are those behind each sequence's last token."""
    hidden, load, cache = _append(cfg, variables, tokens, counts, cache, step, functions=functions)
    last = jnp.maximum(counts - 1, 0)[:, None, None]
    of_last = jnp.take_along_axis(hidden, last, axis=1)[:, 0]
    return cache, Step(unembed(variables["params"]["unembed"], of_last, functions=functions), hidden, load)


def _append(
    cfg: ModelConfig,
    variables: Variables,
    tokens: Int[Array, "B T"],
    counts: Int[Array, "B"],
    cache: PagedCache,
    step: Any,
    *,
    functions: Functions,
) -> tuple[Float[Array, "B T D"], Int[Array, "l E"] | None, PagedCache]:
    """Normed hidden states of the new tokens, the experts' loads, and the cache with the tokens' rows."""
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    ctx = context(cfg, tokens.shape, cache.lengths[:, None] + index)._replace(valid=index < counts[:, None])
    x, step, routing = all_layers(cfg, variables, tokens, ctx, step, functions=functions)
    pages = step.pool.pages.reshape(cache.pages.shape)
    hidden, load = final_norm(variables["params"], x, cfg=cfg), None if routing is None else routing.load
    return hidden, load, cache._replace(pages=pages, lengths=cache.lengths + counts)
