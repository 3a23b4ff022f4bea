"""How many tokens a device may send to one peer, and how many rows its experts have."""

import math
from fractions import Fraction
from typing import NamedTuple

from dsv3_jax.config.model import MoEConfig


class Room(NamedTuple):
    """What one round of an exchange holds on each device."""

    node: int
    """Tokens to one node; all there are where there is one node."""
    expert: int
    """Tokens to one peer of the node."""
    choices: int
    """(token, expert) choices that the experts of a device compute."""


def room_for(num_tokens: int, cfg: MoEConfig, *, nodes: int, peers: int, capacity: float | None) -> Room:
    """For `num_tokens` of each device, experts on `nodes` of `peers` devices each.

    `capacity` is a factor of the mean: of what each would get if every token chose its experts, among those that its
    groups allow, by chance. None: whatever tokens choose, different experts each, has room.
    """
    K, E = cfg.top_k, cfg.num_experts
    devices = nodes * peers
    if capacity is None:
        node, expert = num_tokens, nodes * num_tokens
        return Room(node, expert, peers * expert * min(K, E // devices))

    def bounded(mean: Fraction, most: int) -> int:
        return min(max(math.ceil(Fraction(capacity) * mean), 1), most)

    node = bounded(num_tokens * copies_of_a_token(cfg, nodes) / nodes, num_tokens)
    passing = nodes * node if nodes > 1 else num_tokens
    expert = bounded(num_tokens * copies_of_a_token(cfg, devices) / peers, passing) if peers > 1 else passing
    return Room(node, expert, bounded(Fraction(num_tokens * K), peers * expert * min(K, E // devices)))


def copies_of_a_token(cfg: MoEConfig, places: int) -> Fraction:
    """Among how many of `places`, which share the experts equally, the experts of a token lie: the mean by chance."""
    among_experts = _found_in(places, cfg.num_experts, cfg.top_k)
    if cfg.num_groups % places:
        return among_experts
    return min(among_experts, _found_in(places, cfg.num_groups, cfg.groups_per_token))


def _found_in(places: int, items: int, chosen: int) -> Fraction:
    """In how many of `places` of items/places items each some of `chosen` random items are."""
    return places * (1 - Fraction(math.comb(items - items // places, chosen), math.comb(items, chosen)))
