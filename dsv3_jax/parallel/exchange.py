"""The exchange of tokens between the devices that have the routed experts.

A token goes once to each peer that has any of its experts; that peer's weighted sum comes home. Two hops are an
exchange between nodes whose inner function is an exchange inside the node.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.parallel.rounds import in_rounds
from dsv3_jax.parallel.travel import RECEIVED, Wire, bring_home, send_out, to_peers
from dsv3_jax.precision.residuals import named
from dsv3_jax.typing import Array, Bool, Float, Int
from dsv3_kernels import BlockPlan, gather_rows, sum_rows
from dsv3_kernels.varying import varying_alike, varying_over

Experts = Callable[..., tuple[Array, Array]]
"""experts(params, x [N, D], ids [N, K], weights [N, K], *, is_first) -> Σ_k weights·FFN [N, D], choices dropped. Other
ids than those of its experts are no choice; `is_first` as in `in_rounds`."""

PLAN = "experts_plan"


class Hop(NamedTuple):
    """One exchange: how many peers along which mesh axis, and how many tokens go to each in one round."""

    axis: str
    peers: int
    room: int
    axes: tuple[str, ...]
    """Mesh axes of the collectives in a round: its own, and those of the hops inside."""


def exchange(
    params: Any,
    x: Float[Array, "N D"],
    ids: Int[Array, "N K"],
    weights: Float[Array, "N K"],
    *,
    hop: Hop,
    num_experts: int,
    inner: Experts,
    wire: Wire,
    drops: bool = False,
    is_first: bool = True,
) -> tuple[Float[Array, "N D"], Int[Array, ""]]:
    """`inner` on the peers that have the experts, each of `num_experts` / peers of them; and the choices dropped.

    Inside `jax.shard_map` only. Without `drops` tokens for which a round has no room go in further ones, as many as
    the longest queue of any device of `hop.axes` needs; with it, such choices are left out and counted.
    """
    x, ids, weights = varying_over(varying_alike(x, ids, weights), hop.axes)
    one_round = functools.partial(_one_round, hop=hop, per_peer=num_experts // hop.peers, inner=inner, wire=wire)
    if hop.room >= x.shape[0]:
        return one_round(jnp.int32(0), params, x, ids, weights, is_first=is_first)
    peer_NK, wants_NP, place_NP = _queues(ids, hop.peers, num_experts // hop.peers)
    if drops:
        out, dropped = one_round(jnp.int32(0), params, x, ids, weights, is_first=is_first)
        beyond_NP = jnp.pad(place_NP >= hop.room, ((0, 0), (0, 1)))
        return out, dropped + jnp.take_along_axis(beyond_NP, peer_NK, axis=1).sum(dtype=jnp.int32)
    longest = lax.pmax(wants_NP.sum(axis=0, dtype=jnp.int32).max(), hop.axes)
    num_rounds = checkpoint_name(-(-longest // hop.room), PLAN)
    return in_rounds(one_round, num_rounds, params, x, ids, weights, is_first=is_first)


def in_parts(
    params: Any,
    x: Float[Array, "N D"],
    ids: Int[Array, "N K"],
    weights: Float[Array, "N K"],
    *,
    max_choices: int,
    inner: Experts,
    is_first: bool = True,
) -> tuple[Float[Array, "N D"], Int[Array, ""]]:
    """`inner` on at most `max_choices` choices at a time, in further rounds if there are more; no collectives."""

    def one_round(index, params, x, ids, weights, *, is_first):
        place_NK = jnp.cumsum(ids.reshape(-1) >= 0, dtype=jnp.int32).reshape(ids.shape) - 1
        part = jnp.where(place_NK // max_choices == index, ids, -1)
        return inner(params, x, part, weights, is_first=is_first)

    num_rounds = checkpoint_name(-(-(ids >= 0).sum(dtype=jnp.int32) // max_choices), PLAN)
    return in_rounds(one_round, num_rounds, params, x, ids, weights, is_first=is_first)


def _one_round(index, params, x, ids, weights, *, is_first: bool, hop: Hop, per_peer: int, inner: Experts, wire: Wire):
    """Tokens at places index·room … of each queue."""
    with jax.named_scope("exchange_plan"):
        plan = named(plan_round(ids, index, hop=hop, per_peer=per_peer), PLAN)
        ids_MK = ids.at[plan.token_of].get(mode="fill", fill_value=-1)
        ids_MK -= jnp.repeat(plan.block_expert * per_peer, hop.room)[:, None]
        ids_MK = jnp.where((ids_MK >= 0) & (ids_MK < per_peer), ids_MK, -1)
    with jax.named_scope("exchange_out"):
        arrived = send_out(gather_rows(x, plan), hop.axis, wire)
        arrived_ids, arrived_weights = named(to_peers((ids_MK, gather_rows(weights, plan)), hop.axis), RECEIVED)
    out, dropped = inner(params, arrived, arrived_ids, arrived_weights, is_first=is_first)
    with jax.named_scope("exchange_home"):
        return sum_rows(bring_home(out, hop.axis, wire), plan), dropped


def plan_round(ids: Int[Array, "N K"], index: Int[Array, ""], *, hop: Hop, per_peer: int) -> BlockPlan:
    """Where tokens go in round `index`: a block of `hop.room` rows for each peer, of tokens in their order.

    Its pairs are a token and a peer that has any of its experts, each once: min(K, peers) for a token.
    """
    peer_NK, wants_NP, place_NP = _queues(ids, hop.peers, per_peer)
    if hop.peers <= ids.shape[1]:
        peer_NX = jnp.where(wants_NP, jnp.arange(hop.peers, dtype=jnp.int32)[None, :], hop.peers)
        place_NX = place_NP
    else:
        peer_NX = jnp.where(_is_first(peer_NK), peer_NK, hop.peers)
        place_NX = jnp.take_along_axis(place_NP, jnp.minimum(peer_NX, hop.peers - 1), axis=1)
    pairs, rows = peer_NX.size, hop.peers * hop.room
    place_NX -= index * hop.room
    goes_NX = (peer_NX < hop.peers) & (place_NX >= 0) & (place_NX < hop.room)
    slot_NX = jnp.where(goes_NX, peer_NX * hop.room + place_NX, rows)
    pair_M = varying_alike(jnp.full(rows, pairs, jnp.int32), ids)[0]
    pair_M = pair_M.at[slot_NX.reshape(-1)].set(jnp.arange(pairs, dtype=jnp.int32), mode="drop")
    return BlockPlan(slot_NX, pair_M // peer_NX.shape[1], pair_M, jnp.arange(hop.peers, dtype=jnp.int32))


def _queues(
    ids: Int[Array, "N K"], peers: int, per_peer: int
) -> tuple[Int[Array, "N K"], Bool[Array, "N P"], Int[Array, "N P"]]:
    """The peer of each choice (`peers` where there is none), who wants to go to which, and the places in its queue."""
    is_choice = (ids >= 0) & (ids < peers * per_peer)
    peer_NK = jnp.where(is_choice, ids // per_peer, peers)
    wants_NP = jax.nn.one_hot(peer_NK, peers, dtype=bool).any(axis=1)
    return peer_NK, wants_NP, jnp.cumsum(wants_NP, axis=0, dtype=jnp.int32) - 1


def _is_first(peer_NK: Int[Array, "N K"]) -> Bool[Array, "N K"]:
    """Which choices are the first of their token on that peer."""
    earlier = jnp.tril(jnp.ones((peer_NK.shape[1],) * 2, bool), -1)
    return ~((peer_NK[:, :, None] == peer_NK[:, None, :]) & earlier[None]).any(axis=2)
