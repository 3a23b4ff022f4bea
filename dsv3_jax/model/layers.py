"""Transformer layers: one of them, a stack, and what its backward pass saves."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config.check import check
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.model.functions import Functions
from dsv3_jax.model.mla import Cache, Context, mla
from dsv3_jax.model.moe.layer import Routing, moe
from dsv3_jax.model.parts import ffn, rms_norm
from dsv3_jax.typing import Array, Float, Int, Params

Remat = Literal["none", "paper", "received", "full", "offload"]

ATTENTION = ("mla_q_down", "mla_kv_down", "mla_attended", "mla_added", "mtp_joined")
RECEIVED = ("experts_received", "experts_plan")
FEED_FORWARD = ("router_logits", *RECEIVED, "experts_gate_up", "ffn_gate_up")
PAPER = ATTENTION + FEED_FORWARD
"""What large matmuls give, but for MLA's up-projections: those, norms, attention and SwiGLU are computed again
(report section 3.2.3). `checkpoint_name` gives each name once, where the tensor is made."""


def attention(
    params: Params,
    x: Float[Array, "B T D"],
    ctx: Context,
    cache: Cache | None,
    *,
    cfg: ModelConfig,
    functions: Functions,
) -> tuple[Float[Array, "B T D"], Cache | None]:
    """What attention adds to the stream, MLA(RMSNorm(x)) (eq. 1-11), and the cache with this layer's new rows."""
    with jax.named_scope("attention"):
        normed = rms_norm(x, params["attn_norm"]["scale"], eps=cfg.norm_eps)
        return mla(params["mla"], normed, ctx, cache, cfg=cfg, functions=functions)


def feed_forward(
    params: Params,
    bias: Float[Array, "E"] | None,
    x: Float[Array, "B T D"],
    ctx: Context,
    *,
    cfg: ModelConfig,
    functions: Functions,
    first_expert: int | Int[Array, ""] = 0,
) -> tuple[Float[Array, "B T D"], Routing | None]:
    """What the feed-forward adds to the stream, dense or of experts (eq. 12-16), and what was routed."""
    with jax.named_scope("feed_forward"):
        normed = rms_norm(x, params["ffn_norm"]["scale"], eps=cfg.norm_eps)
        if "mlp" in params:
            return ffn(params["mlp"], normed, functions=functions), None
        routed = params["moe"], bias, normed, ctx.valid
        return moe(*routed, cfg=cfg.moe, functions=functions, first_expert=first_expert)


def layer(
    params: Params,
    bias: Float[Array, "E"] | None,
    x: Float[Array, "B T D"],
    ctx: Context,
    cache: Cache | None = None,
    *,
    cfg: ModelConfig,
    functions: Functions,
    first_expert: int | Int[Array, ""] = 0,
) -> tuple[Float[Array, "B T D"], Cache | None, Routing | None]:
    """x + attention(x), then + feed_forward of that."""
    added, cache = attention(params, x, ctx, cache, cfg=cfg, functions=functions)
    x = checkpoint_name(x + added, "mla_added")
    added, routing = feed_forward(params, bias, x, ctx, cfg=cfg, functions=functions, first_expert=first_expert)
    return x + added, cache, routing


def run_layers(
    stack: Params,
    biases: Float[Array, "L E"] | None,
    x: Float[Array, "B T D"],
    ctx: Context,
    cache: Cache | None = None,
    *,
    cfg: ModelConfig,
    functions: Functions,
    remat: Remat = "none",
    of_layer: Callable[[Params], Params] = lambda params: params,
) -> tuple[Float[Array, "B T D"], Any, Routing | None]:
    """x, cache and routing after the layers of `stack`, whose leaves have a leading layer axis: all of one kind, or a
    slice of them.

    `of_layer` makes a layer's parameters from what the stack holds of them, such as a gather of shards; under
    rematerialisation its result is not saved. With a cache, experts stay out of the scan, and each layer reads its
    own where they lie: slicing them layer by layer would copy all, chosen or not.
    """
    experts, num_layers = None, jax.tree.leaves(stack)[0].shape[0]
    if cache is not None and "moe" in stack:
        experts = jax.tree.map(lambda w: w.reshape(-1, *w.shape[2:]), stack["moe"]["experts"])
        stack = {**stack, "moe": {name: leaf for name, leaf in stack["moe"].items() if name != "experts"}}

    def step(carry: Any, of_stack: Any) -> tuple[Any, Routing | None]:
        x, cache = carry
        params, bias, index = of_stack
        params, first_expert = of_layer(params), 0
        if experts is not None:
            params, first_expert = {**params, "moe": {**params["moe"], "experts": experts}}, index * cfg.moe.num_experts
        settings: Any = {"cfg": cfg, "functions": functions, "first_expert": first_expert}
        x, cache, routing = layer(params, bias, x, ctx, cache, **settings)
        return (x, cache), routing

    indices = None if experts is None else jnp.arange(num_layers, dtype=jnp.int32)
    (x, cache), routing = jax.lax.scan(rematerialised(step, remat), (x, cache), (stack, biases, indices))
    return x, cache, routing


def rematerialised(step: Callable, remat: Remat) -> Callable:
    """`step` of a scan over layers, of which the backward pass saves: "none" everything, "paper" what `PAPER` names,
    "received" of that what other devices sent, "offload" it all in the host's memory, "full" the arguments only.

    Naming what to save is the only way: a policy that names what not to save saves its input.
    """
    check(remat in get_args(Remat), f"remat={remat!r} is unknown; use one of {', '.join(get_args(Remat))}.")
    if remat == "none":
        return step
    policies, names = jax.checkpoint_policies, {"full": (), "received": RECEIVED}.get(remat, PAPER)
    policy = policies.save_only_these_names(*names)
    if remat == "offload":
        where: Any = {"names_which_can_be_saved": (), "offload_src": "device", "offload_dst": "pinned_host"}
        policy = policies.save_and_offload_only_these_names(names_which_can_be_offloaded=names, **where)
    return jax.checkpoint(step, prevent_cse=False, policy=policy)
