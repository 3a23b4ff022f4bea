"""The functions of a layer whose routed experts lie on many devices."""

import dataclasses
from functools import partial
from typing import Any

from dsv3_jax.config.model import MoEConfig
from dsv3_jax.config.parallel import Overflow
from dsv3_jax.model.functions import Functions
from dsv3_jax.parallel.axes import EXPERT, EXPERTS, NODE
from dsv3_jax.parallel.exchange import Experts, Hop, exchange, in_parts
from dsv3_jax.parallel.room import room_for
from dsv3_jax.parallel.travel import FP8, PLAIN
from dsv3_jax.typing import Array, Float, Int, Params


def exchanged(
    functions: Functions, cfg: MoEConfig, mesh: Any, *, capacity: float | None, overflow: Overflow
) -> Functions:
    """`functions` whose `routed_experts` sends tokens to the devices that have their experts.

    For use inside a `jax.shard_map` that is manual over all axes of `mesh` (anything whose `shape` maps axes to
    sizes), where each device has an equal part of the experts, in order. An axis of size 1 has no collectives.
    """
    nodes, peers = (mesh.shape[axis] for axis in EXPERTS)
    if nodes * peers == 1:
        return functions
    settings: Any = {"cfg": cfg, "nodes": nodes, "peers": peers, "capacity": capacity, "overflow": overflow}
    return dataclasses.replace(functions, routed_experts=partial(_routed_experts, local=functions, **settings))


def _routed_experts(
    params: Params,
    x: Float[Array, "B T D"],
    ids: Int[Array, "B T K"],
    weights: Float[Array, "B T K"],
    *,
    functions: Functions,
    num_experts: int,
    first_expert: int = 0,
    local: Functions,
    cfg: MoEConfig,
    nodes: int,
    peers: int,
    capacity: float | None,
    overflow: Overflow,
) -> tuple[Float[Array, "B T D"], Int[Array, ""]]:
    """In the compute dtype from the start: rounding to it after quantising would round twice."""
    N, D, K = x.shape[0] * x.shape[1], x.shape[2], ids.shape[2]
    room, drops = room_for(N, cfg, nodes=nodes, peers=peers, capacity=capacity), overflow == "drop"
    received = peers * room.expert if peers > 1 else nodes * room.node
    if room.choices < received * K:
        functions = dataclasses.replace(functions, dispatch=partial(functions.dispatch, max_pairs=room.choices))

    def experts(params: Params, x: Array, ids: Array, weights: Array, **_: bool) -> tuple[Array, Array]:
        settings: Any = {"num_experts": num_experts // (nodes * peers), "first_expert": first_expert}
        out, dropped = local.routed_experts(params, x[None], ids[None], weights[None], functions=functions, **settings)
        return out[0], dropped

    hops: Experts = experts
    if capacity is not None and not drops and room.choices < received * min(K, cfg.num_experts // (nodes * peers)):
        hops = partial(in_parts, max_choices=room.choices, inner=hops)
    settings: Any = {"wire": FP8 if functions.name == "fp8_dsv3" else PLAIN, "drops": drops}
    if peers > 1:
        inside = Hop(EXPERT, peers, room.expert, (EXPERT,))
        hops = partial(exchange, hop=inside, num_experts=num_experts // nodes, inner=hops, **settings)
    if nodes > 1:
        between = Hop(NODE, nodes, room.node, EXPERTS if peers > 1 else (NODE,))
        hops = partial(exchange, hop=between, num_experts=num_experts, inner=hops, **settings)
    flat = x.reshape(N, D).astype(functions.compute_dtype), ids.reshape(N, K), weights.reshape(N, K)
    out, dropped = hops(params, *flat)
    return out.reshape(x.shape), dropped
