"""One transformer layer: attention, then a dense or a mixture-of-experts feed-forward, each behind a norm."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.model.attention import attend_blocked
from dsv3_jax.model.mla import Attend
from dsv3_jax.model.mlp import mlp
from dsv3_jax.model.moe.layer import Route, RoutedExperts, Routing, local_experts, moe
from dsv3_jax.model.moe.router import route
from dsv3_jax.model.norm import rms_norm
from dsv3_jax.precision.policy import FLOAT32, Policy
from dsv3_jax.typing import Array, Bool, Float, Params


class Parts(NamedTuple):
    """The functions a layer is made of. To change an equation, replace one."""

    policy: Policy = FLOAT32
    attend: Attend = attend_blocked
    route: Route = route
    experts: RoutedExperts = local_experts


Mix = Callable[[Params, Float[Array, "B T D"]], tuple[Float[Array, "B T D"], Any]]
"""(MLA parameters, normed x) -> (what attention adds, what the caller wants kept of it)."""


def dense_block(params: Params, x: Float[Array, "B T D"], mix: Mix, *, cfg: ModelConfig, parts: Parts):
    """One of the first layers. Returns (x, kept by `mix`)."""
    x, kept = _add_attention(params, x, mix, cfg=cfg)
    normed = rms_norm(x, params["ffn_norm"]["scale"], eps=cfg.norm_eps)
    return x + mlp(params["mlp"], normed, policy=parts.policy), kept


def moe_block(
    params: Params,
    bias: Float[Array, "E"] | None,
    x: Float[Array, "B T D"],
    valid: Bool[Array, "B T"] | None,
    mix: Mix,
    *,
    cfg: ModelConfig,
    parts: Parts,
) -> tuple[Float[Array, "B T D"], Any, Routing, Float[Array, ""]]:
    """A mixture-of-experts layer. Returns (x, kept by `mix`, routing, balance loss without α)."""
    x, kept = _add_attention(params, x, mix, cfg=cfg)
    normed = rms_norm(x, params["ffn_norm"]["scale"], eps=cfg.norm_eps)
    added, routing, balance = moe(
        params["moe"], bias, normed, valid, cfg=cfg.moe, policy=parts.policy, route=parts.route, experts=parts.experts
    )
    return x + added, kept, routing, balance


def _add_attention(params: Params, x: Array, mix: Mix, *, cfg: ModelConfig) -> tuple[Array, Any]:
    added, kept = mix(params["mla"], rms_norm(x, params["attn_norm"]["scale"], eps=cfg.norm_eps))
    return checkpoint_name(x + added, "kept"), kept
