"""DeepSeekMoE: shared experts plus the routed ones a token chose."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.config.model import MoEConfig
from dsv3_jax.model.functions import Functions
from dsv3_jax.model.moe.router import expert_load, router_logits, routing, sequence_balance_loss
from dsv3_jax.model.parts import ffn
from dsv3_jax.typing import Array, Bool, Float, Int, Params


class Routing(NamedTuple):
    """What the router of one layer decided (or of many, with a leading axis)."""

    ids: Int[Array, "*L N K"]
    weights: Float[Array, "*L N K"]
    load: Int[Array, "*L E"]
    """Tokens an expert received; padding does not count."""
    balance_loss: Float[Array, "*L"]
    """Eq. 17, without the factor α."""
    dropped: Int[Array, "*L"]
    """Choices that no expert computed for want of room; 0 on one device."""


def moe(
    params: Params,
    bias: Float[Array, "E"] | None,
    x: Float[Array, "B T D"],
    valid: Bool[Array, "B T"] | None,
    *,
    cfg: MoEConfig,
    functions: Functions,
    first_expert: int | Int[Array, ""] = 0,
) -> tuple[Float[Array, "B T D"], Routing]:
    """Σ shared(x) + Σ g·routed(x) (eq. 12, without the residual), and what was routed.

    `valid` marks tokens that are not padding: only they are routed, and count in loads and losses. The experts' own
    weights may be those of several layers, one after another; this layer's then begin at `first_expert`.
    """
    chosen_BTK, decided = choose(params["router"], bias, x, valid, cfg=cfg, functions=functions)
    routed = x, chosen_BTK, decided.weights.reshape(chosen_BTK.shape)
    settings: Any = {"functions": functions, "num_experts": cfg.num_experts, "first_expert": first_expert}
    out, dropped = functions.routed_experts(params["experts"], *routed, **settings)
    if cfg.num_shared_experts:
        with jax.named_scope("shared_experts"):
            out = out + ffn(params["shared"], x, functions=functions)
    return out, decided._replace(dropped=dropped)


def choose(
    params: Params, bias: Array | None, x: Array, valid: Array | None, *, cfg: MoEConfig, functions: Functions
) -> tuple[Int[Array, "B T K"], Routing]:
    """Each token's experts, -1 for padding, and the routing, in which nothing is dropped yet; arguments as in `moe`."""
    shape, E = (*x.shape[:2], cfg.top_k), cfg.num_experts
    with jax.named_scope("router"):
        logits_BTE = router_logits(params, x)
        weights_NK, ids_NK = functions.route(logits_BTE.reshape(-1, E), bias, **routing(cfg))
        load = expert_load(ids_NK, None if valid is None else valid.reshape(-1), num_experts=E)
        balance = sequence_balance_loss(logits_BTE, valid, top_k=cfg.top_k, score=cfg.score)
        ids_BTK = ids_NK.reshape(shape)
        chosen_BTK = ids_BTK if valid is None else jnp.where(valid[:, :, None], ids_BTK, -1)
    return chosen_BTK, Routing(ids_NK, weights_NK, load, balance, jnp.int32(0))
