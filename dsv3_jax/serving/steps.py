"""The two steps of generation over a contiguous latent cache: prefill of a prompt, decoding of one token."""

from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.model.functions import Functions
from dsv3_jax.model.layers import run_layers
from dsv3_jax.model.mla import Context
from dsv3_jax.model.moe.experts import expert_ffn
from dsv3_jax.model.moe.layer import Routing
from dsv3_jax.model.moe.router import stack_bias
from dsv3_jax.model.parts import embed, unembed
from dsv3_jax.model.transformer import context, final_norm
from dsv3_jax.serving.absorbed import absorb
from dsv3_jax.serving.latent_cache import LatentCache, Prompts, empty_cache
from dsv3_jax.typing import Array, Float, Int, Variables


def prefill(
    cfg: ModelConfig,
    variables: Variables,
    tokens: Int[Array, "B T"],
    padding: Int[Array, "B"],
    *,
    cache_size: int,
    functions: Functions,
) -> tuple[LatentCache, Float[Array, "B V"]]:
    """Reads whole prompts, padded on the left, into a fresh cache of `cache_size` rows.

    Uses the naive form of MLA. Returns the cache and the float32 logits after each prompt's last token.
    """
    T = tokens.shape[1]
    index = jnp.arange(T, dtype=jnp.int32)[None, :] - padding[:, None]
    ctx = context(cfg, tokens.shape, jnp.maximum(index, 0), (index >= 0).astype(jnp.int32))
    prompts = Prompts(empty_cache(cfg, padding, cache_size=cache_size, functions=functions))
    weights = cast_experts(variables, functions=functions)
    x, prompts, _ = all_layers(cfg, weights, tokens, ctx, prompts, functions=functions)
    hidden = final_norm(variables["params"], x[:, -1], cfg=cfg)
    logits = unembed(variables["params"]["unembed"], hidden, functions=functions)
    return prompts.cache.next_step(T), logits


def decode(
    cfg: ModelConfig,
    variables: Variables,
    tokens: Int[Array, "B"],
    cache: LatentCache,
    *,
    functions: Functions,
) -> tuple[LatentCache, Float[Array, "B V"]]:
    """Appends one token to each sequence and returns float32 logits for the next. Absorbed form of MLA.

    `variables` come from `decoding_weights`. The cache must have a free row (`length` < S).
    """
    ctx = context(cfg, (tokens.shape[0], 1), (cache.length - cache.padding)[:, None])
    x, cache, _ = all_layers(cfg, variables, tokens[:, None], ctx, cache, functions=functions)
    hidden = final_norm(variables["params"], x[:, 0], cfg=cfg)
    return cache.next_step(1), unembed(variables["params"]["unembed"], hidden, functions=functions)


def decoding_weights(cfg: ModelConfig, variables: Variables, *, functions: Functions) -> dict:
    """`variables` as decoding reads them: every layer's MLA absorbed, its experts cast to the compute dtype.

    Do it once, before the loop over steps.
    """
    params = dict(variables["params"])
    for name in ("dense_layers", "moe_layers"):
        if name in params:
            params[name] = {**params[name], "mla": absorb(params[name]["mla"], cfg=cfg)}
    return cast_experts({**variables, "params": params}, functions=functions)


def cast_experts(variables: Variables, *, functions: Functions) -> dict:
    """`variables` with the routed experts in the compute dtype: a layer that casts them casts those of all layers.

    Only `expert_ffn` does; FP8, for one, quantises what is stored.
    """
    params = variables["params"]
    if "moe_layers" not in params or functions.expert_ffn is not expert_ffn:
        return {**variables}
    moe = params["moe_layers"]["moe"]
    experts = jax.tree.map(lambda w: w.astype(functions.compute_dtype), moe["experts"])
    moe_layers = {**params["moe_layers"], "moe": {**moe, "experts": experts}}
    return {**variables, "params": {**params, "moe_layers": moe_layers}}


def all_layers(
    cfg: ModelConfig,
    variables: Variables,
    tokens: Int[Array, "B T"],
    ctx: Context,
    cache: Any,
    *,
    functions: Functions,
) -> tuple[Float[Array, "B T D"], Any, Routing | None]:
    """Embedding and both stacks of layers over a cache.

    Returns the stream before the final norm, the cache, and what the MoE layers routed.
    """
    params, routing, settings = variables["params"], None, {"cfg": cfg, "functions": functions}
    x = embed(params["embed"], tokens, functions=functions)
    if cfg.num_dense_layers:
        x, cache, _ = run_layers(params["dense_layers"], None, x, ctx, cache, **settings)
    if cfg.num_moe_layers:
        biases = stack_bias(variables["router_state"], "moe_layers")
        x, cache, routing = run_layers(params["moe_layers"], biases, x, ctx, cache, **settings)
    return x, cache, routing
