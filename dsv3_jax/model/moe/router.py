"""Choice of experts: sigmoid affinities, node-limited groups, balance by bias without auxiliary loss."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config.model import MoEConfig
from dsv3_jax.typing import Array, Bool, Float, Int, Params

ScoreName = Literal["sigmoid", "softmax"]


def router_logits(params: Params, x: Float[Array, "... D"]) -> Float[Array, "... E"]:
    """uᵀe for every expert, always in float32: a choice must not depend on the compute dtype."""
    logits = jnp.einsum("...d,de->...e", x.astype(jnp.float32), params["w"].astype(jnp.float32))
    return checkpoint_name(logits, "router_logits")


def affinity(logits: Float[Array, "... E"], *, score: ScoreName) -> Float[Array, "... E"]:
    """s: sigmoid of the logits in V3 (eq. 15), softmax over the experts in V2."""
    return jax.nn.sigmoid(logits) if score == "sigmoid" else jax.nn.softmax(logits, axis=-1)


def route(
    logits: Float[Array, "N E"],
    bias: Float[Array, "E"] | None,
    *,
    num_groups: int,
    groups_per_token: int,
    top_k: int,
    score: ScoreName = "sigmoid",
    normalize_weights: bool = True,
    scale: float = 1.0,
) -> tuple[Float[Array, "N K"], Int[Array, "N K"]]:
    """Chooses K experts per token from a few groups (eq. 12-16, section "Node-Limited Routing").

    The bias steers the choice only: returned weights come from unbiased affinities, divided by their sum and
    multiplied by `scale` (the released routed_scaling_factor). With a bias, groups are ranked by the sum of
    their two best biased affinities; without one (V2), by their best. Experts of other groups are never chosen,
    even when all biased affinities are negative.
    """
    N, E = logits.shape
    affinity_NE = affinity(logits, score=score)
    biased_NE = jax.lax.stop_gradient(affinity_NE)
    if bias is not None:
        biased_NE = biased_NE + jax.lax.stop_gradient(bias)[None, :]
    if groups_per_token < num_groups:
        biased_NGe = biased_NE.reshape(N, num_groups, E // num_groups)
        best_in_group = 1 if bias is None else 2
        group_NG = jax.lax.top_k(biased_NGe, best_in_group)[0].sum(axis=-1)
        best_Ng = jax.lax.top_k(group_NG, groups_per_token)[1]
        open_NG = jax.nn.one_hot(best_Ng, num_groups, dtype=bool).any(axis=1)
        biased_NE = jnp.where(open_NG[:, :, None], biased_NGe, -jnp.inf).reshape(N, E)
    ids_NK = jax.lax.top_k(biased_NE, top_k)[1]
    weights_NK = jnp.take_along_axis(affinity_NE, ids_NK, axis=-1)
    if normalize_weights:
        weights_NK = weights_NK / (weights_NK.sum(axis=-1, keepdims=True) + 1e-20)
    return weights_NK * scale, ids_NK


def expert_load(ids: Int[Array, "N K"], valid: Bool[Array, "N"] | None, *, num_experts: int) -> Int[Array, "E"]:
    """How many valid tokens chose each expert."""
    counted = jnp.ones(ids.shape, jnp.int32) if valid is None else jnp.broadcast_to(valid[:, None], ids.shape)
    return jnp.zeros(num_experts, jnp.int32).at[ids].add(counted.astype(jnp.int32))


def sequence_balance_loss(
    logits: Float[Array, "B T E"], valid: Bool[Array, "B T"] | None, *, top_k: int, score: ScoreName
) -> Float[Array, ""]:
    """Σ f_i·P_i of each sequence, averaged over sequences, without the factor α (eq. 17-20).

    f_i is the share of tokens whose unbiased top-K holds expert i, times N_r/K_r; P_i the mean of the normalised
    affinities. Equals 1 under perfect balance. Only P_i carries a gradient.
    """
    B, T, E = logits.shape
    valid = jnp.ones((B, T), bool) if valid is None else valid
    tokens_B = jnp.maximum(valid.sum(axis=1), 1).astype(jnp.float32)
    affinity_BTE = affinity(logits, score=score)
    chosen_BTK = jax.lax.top_k(jax.lax.stop_gradient(affinity_BTE), top_k)[1]
    row_BTK = jnp.broadcast_to(jnp.arange(B)[:, None, None], chosen_BTK.shape)
    counted_BTK = jnp.broadcast_to(valid[:, :, None], chosen_BTK.shape).astype(jnp.float32)
    count_BE = jnp.zeros((B, E), jnp.float32).at[row_BTK, chosen_BTK].add(counted_BTK)
    f_BE = count_BE * (E / top_k) / tokens_B[:, None]
    share_BTE = affinity_BTE / (affinity_BTE.sum(axis=-1, keepdims=True) + 1e-20)
    P_BE = jnp.where(valid[:, :, None], share_BTE, 0.0).sum(axis=1) / tokens_B[:, None]
    return (f_BE * P_BE).sum(axis=-1).mean()


def routing(cfg: MoEConfig) -> dict:
    """The keyword arguments of `route` that a configuration fixes."""
    names = ("num_groups", "groups_per_token", "top_k", "score", "normalize_weights", "scale")
    return {name: getattr(cfg, name) for name in names}


def stack_bias(router_state: Params, stack: str) -> Float[Array, "*L E"] | None:
    """The router biases of "moe_layers" or of "mtp"; None without that stack, or where routing has no bias."""
    if stack not in router_state:
        return None
    layers = router_state["mtp"]["block"] if stack == "mtp" else router_state[stack]
    return layers["moe"]["router"]["bias"]
