"""Multi-token prediction: sequential modules that share the main model's embedding and head (report section 2.2)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.model.functions import Functions
from dsv3_jax.model.layers import Remat, layer, rematerialised
from dsv3_jax.model.mla import Context
from dsv3_jax.model.moe.layer import Routing
from dsv3_jax.model.parts import embed, rms_norm
from dsv3_jax.precision import plain_linear
from dsv3_jax.typing import Array, Float, Int, Params


def mtp_depth(
    params: Params, bias: Array | None, embedded: Array, hidden: Array, ctx: Context, *, cfg: Any, functions: Functions
) -> tuple[Float[Array, "B T D"], Routing]:
    """One module: M_k·[RMSNorm(Emb(t_{i+k})); RMSNorm(h_i)], a layer, a norm (eq. 21-22), for the shared head."""
    x = join(params, embedded, hidden, cfg=cfg, functions=functions)
    x, _, routing = layer(params["block"], bias, x, ctx, cfg=cfg, functions=functions)
    assert routing is not None
    return rms_norm(x, params["norm"]["scale"], eps=cfg.norm_eps), routing


def join(
    params: Params, embedded: Array, hidden: Array, *, cfg: ModelConfig, functions: Functions
) -> Float[Array, "B T D"]:
    """M_k·[RMSNorm(Emb(t_{i+k})); RMSNorm(h_i)] (eq. 21): what enters a module's layer.

    The report writes the hidden state first; the released weights have the embedding first, and so have we.
    """
    normed = [
        rms_norm(embedded, params["embed_norm"]["scale"], eps=cfg.norm_eps),
        rms_norm(hidden, params["hidden_norm"]["scale"], eps=cfg.norm_eps),
    ]
    joined = plain_linear.linear(jnp.concatenate(normed, axis=-1), params["proj"]["w"], dtype=functions.compute_dtype)
    return checkpoint_name(joined, "mtp_joined")


def mtp(
    params: Params,
    biases: Float[Array, "k E"] | None,
    embedding: Params,
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    ctx: Context,
    *,
    cfg: ModelConfig,
    functions: Functions,
    remat: Remat = "none",
    of_layer: Callable[[Params], Params] = lambda params: params,
) -> tuple[Float[Array, "k B T D"], Routing]:
    """Runs every depth k = 1… in turn (eq. 21-23); the result goes through the shared head. Row t of depth k predicts
    token t+1+k; the last k rows are filler.

    `hidden` is the main model's state after its final norm, as in the released weights; depth k+1 likewise takes
    depth k's state after its own norm. A row whose token t+k lies in another document, or past the end, becomes
    padding: it attends to nothing of use and counts in no load. `of_layer` as in `run_layers`.
    """

    def step(carry: Any, module: Any) -> tuple[Any, Any]:
        hidden, ahead, ahead_segments, depth = carry
        module_params, bias = module
        ahead = shift(ahead)
        ahead_segments = None if ahead_segments is None else shift(ahead_segments)
        embedded = embed(embedding, ahead, functions=functions)
        there = where_the_token_is(ctx, ahead_segments, tokens.shape, depth)
        settings: Any = {"cfg": cfg, "functions": functions}
        with jax.named_scope("mtp"):
            hidden, routing = mtp_depth(of_layer(module_params), bias, embedded, hidden, there, **settings)
        return (hidden, ahead, ahead_segments, depth + 1), (hidden, routing)

    start = (hidden, tokens, ctx.segment_ids, jnp.int32(1))
    return jax.lax.scan(rematerialised(step, remat), start, (params, biases))[1]


def where_the_token_is(ctx: Context, ahead_segments: Array | None, shape: tuple[int, ...], depth: Array) -> Context:
    """`ctx` with every row as padding whose token `depth` ahead is past the end or in another document."""
    valid = jnp.broadcast_to(jnp.arange(shape[1])[None, :] < shape[1] - depth, shape)
    if ctx.segment_ids is None or ahead_segments is None:
        return ctx._replace(valid=valid)
    segments = jnp.where(ahead_segments == ctx.segment_ids, ctx.segment_ids, 0)
    return ctx._replace(segment_ids=segments, valid=valid & (segments > 0))


def shift(ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Each row's ids one to the left, 0 at the end."""
    return jnp.pad(ids[:, 1:], ((0, 0), (0, 1)))
