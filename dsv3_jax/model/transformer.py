"""The whole model: embedding, a stack of dense layers, a stack of MoE layers, norm, head, and the MTP modules."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.model.functions import Functions, functions_of
from dsv3_jax.model.layers import Remat, run_layers
from dsv3_jax.model.mla import Context
from dsv3_jax.model.moe.layer import Routing
from dsv3_jax.model.moe.router import stack_bias
from dsv3_jax.model.mtp import mtp
from dsv3_jax.model.parts import embed, rms_norm, unembed
from dsv3_jax.model.rope import rope_table
from dsv3_jax.typing import AnyArray, Array, Float, Int, Params, Variables


class Output(NamedTuple):
    """What `forward` returns; `router` has one row for each MoE layer of the main model."""

    logits: Float[Array, "B T V"]
    mtp_logits: tuple[Float[Array, "B _ V"], ...]
    """One for each depth k = 1…, [B, T-k, V]; row i predicts token i+1+k."""
    router: Routing | None


class Hidden(NamedTuple):
    """Everything before the head: what a loss needs. Routing has one row for each MoE layer, or MTP module."""

    hidden: Float[Array, "B T D"]
    """After the final norm; row t predicts token t+1."""
    routing: Routing | None
    mtp_hidden: Float[Array, "k B T D"] | None
    """Row t of depth k predicts token t+1+k; its last k rows are filler."""
    mtp_routing: Routing | None


def forward(
    cfg: ModelConfig,
    variables: Variables,
    tokens: Int[AnyArray, "B T"],
    positions: Int[AnyArray, "B T"] | None = None,
    segment_ids: Int[AnyArray, "B T"] | None = None,
    *,
    functions: Functions | None = None,
) -> Output:
    """Logits of every position, of the main model and of each MTP depth.

    Args:
        cfg: the model's shape.
        variables: `{"params", "router_state"}` from `init` or `load_pretrained`.
        tokens: ids in 0..V-1; ids outside read nothing sensible, so check them where they enter.
        positions: for rope; default 0..T-1.
        segment_ids: 0 for padding, 1.. for documents: a token sees only its own document, and padding goes to no
            expert. Default: one document a row.
        functions: what a layer is made of; default: `functions_of` the dtype that the parameters have.

    Materialises [B, T, V] float32; training goes through `hidden_states` and a chunked loss.
    """
    functions = functions or functions_of(variables["params"]["embed"]["w"].dtype)
    states = hidden_states(cfg, variables, tokens, positions, segment_ids, functions=functions)
    head, T = variables["params"]["unembed"], tokens.shape[1]
    mtp_hidden = () if states.mtp_hidden is None else states.mtp_hidden
    mtp_logits = tuple(
        unembed(head, hidden[:, : max(T - k, 0)], functions=functions) for k, hidden in enumerate(mtp_hidden, 1)
    )
    return Output(unembed(head, states.hidden, functions=functions), mtp_logits, states.routing)


def hidden_states(
    cfg: ModelConfig,
    variables: Variables,
    tokens: Int[AnyArray, "B T"],
    positions: Int[AnyArray, "B T"] | None = None,
    segment_ids: Int[AnyArray, "B T"] | None = None,
    *,
    functions: Functions | None = None,
    remat: Remat = "none",
    of_layer: Callable[[Params], Params] = lambda params: params,
    with_mtp: bool = True,
) -> Hidden:
    """Runs the model up to the head. Arguments as in `forward`; `remat` as in `rematerialised`, `of_layer` as in
    `run_layers`.
    """
    params, router_state = variables["params"], variables["router_state"]
    functions = functions or functions_of(params["embed"]["w"].dtype)
    tokens = jnp.asarray(tokens)
    ctx = context(cfg, tokens.shape, positions, segment_ids)
    settings: Any = {"cfg": cfg, "functions": functions, "remat": remat, "of_layer": of_layer}

    x, routing = embed(params["embed"], tokens, functions=functions), None
    if cfg.num_dense_layers:
        x, _, _ = run_layers(params["dense_layers"], None, x, ctx, **settings)
    if cfg.num_moe_layers:
        x, _, routing = run_layers(params["moe_layers"], stack_bias(router_state, "moe_layers"), x, ctx, **settings)
    hidden = final_norm(params, x, cfg=cfg)
    if not (cfg.mtp_depth and with_mtp):
        return Hidden(hidden, routing, None, None)
    mtp_biases = stack_bias(router_state, "mtp")
    return Hidden(hidden, routing, *mtp(params["mtp"], mtp_biases, params["embed"], hidden, tokens, ctx, **settings))


def context(
    cfg: ModelConfig,
    shape: tuple[int, ...],
    positions: Int[AnyArray, "B T"] | None = None,
    segment_ids: Int[AnyArray, "B T"] | None = None,
) -> Context:
    """What all layers read, for tokens of `shape` [B, T]; defaults as in `forward`."""
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None, :], shape)
    rope = rope_table(jnp.asarray(positions), rope_dim=cfg.mla.rope_head_dim, theta=cfg.rope_theta, yarn=cfg.yarn)
    if segment_ids is None:
        return Context(rope)
    segment_ids = jnp.asarray(segment_ids)
    return Context(rope, segment_ids, segment_ids > 0)


def final_norm(params: Params, x: Float[Array, "... D"], *, cfg: ModelConfig) -> Float[Array, "... D"]:
    """The norm before the head."""
    with jax.named_scope("final_norm"):
        return rms_norm(x, params["final_norm"]["scale"], eps=cfg.norm_eps)
