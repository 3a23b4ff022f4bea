"""DeepSeekMoE: shared experts plus the routed ones a token chose."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config.model import MoEConfig
from dsv3_jax.model.mlp import mlp
from dsv3_jax.model.moe.dispatch import BlockPlan, block_size_for, plan_blocks
from dsv3_jax.model.moe.experts import routed_ffn
from dsv3_jax.model.moe.router import expert_load, route, router_logits, routing, sequence_balance_loss
from dsv3_jax.precision.fp8_experts import BLOCK_ROWS
from dsv3_jax.precision.policy import Policy
from dsv3_jax.typing import Array, Bool, Float, Int, Params

Route = Callable[..., tuple[Float[Array, "N K"], Int[Array, "N K"]]]
RoutedExperts = Callable[..., Float[Array, "N D"]]


class Routing(NamedTuple):
    """What the router of one layer decided (or of many, with a leading axis)."""

    ids: Int[Array, "*L N K"]
    weights: Float[Array, "*L N K"]
    load: Int[Array, "*L E"]
    """Tokens an expert received; padding does not count."""


def local_experts(
    params: Params,
    x: Float[Array, "N D"],
    ids: Int[Array, "N K"],
    weights: Float[Array, "N K"],
    *,
    policy: Policy,
) -> Float[Array, "N D"]:
    """Σ_k weight·FFN_expert(x), dropless, on one device: sort by expert, multiply block by block, sum back."""
    num_experts = params["down"].shape[0]
    if policy.routed_experts is not None:
        plan = _kept(plan_blocks(ids, num_experts, block_size=BLOCK_ROWS))
        return policy.routed_experts(x, params, weights, plan, dtype=policy.compute_dtype)
    plan = _kept(plan_blocks(ids, num_experts, block_size=block_size_for(ids.size, num_experts)))
    return routed_ffn(x.astype(policy.compute_dtype), params, weights, plan)


def _kept(plan: BlockPlan) -> BlockPlan:
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, "kept"), plan)


def moe(
    params: Params,
    bias: Float[Array, "E"] | None,
    x: Float[Array, "B T D"],
    valid: Bool[Array, "B T"] | None,
    *,
    cfg: MoEConfig,
    policy: Policy,
    route: Route = route,
    experts: RoutedExperts = local_experts,
) -> tuple[Float[Array, "B T D"], Routing, Float[Array, ""]]:
    """Σ shared(x) + Σ g·routed(x) (eq. 12, without the residual), what was routed, and the balance loss (eq. 17).

    `valid` marks tokens that are not padding: only they count in loads and losses. The balance loss lacks its α.
    """
    B, T, D = x.shape
    logits_BTE = router_logits(params["router"], x)
    E = logits_BTE.shape[-1]
    weights_NK, ids_NK = route(logits_BTE.reshape(-1, E), bias, **routing(cfg))
    valid_N = None if valid is None else valid.reshape(-1)
    routed = Routing(ids_NK, weights_NK, expert_load(ids_NK, valid_N, num_experts=E))
    balance = sequence_balance_loss(logits_BTE, valid, top_k=cfg.top_k, score=cfg.score)
    out = experts(params["experts"], x.reshape(-1, D), ids_NK, weights_NK, policy=policy).reshape(B, T, D)
    if cfg.num_shared_experts:
        out = out + mlp(params["shared"], x, policy=policy)
    return out, routed, balance
