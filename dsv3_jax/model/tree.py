"""The parameter tree as a table: shape, logical axes and first value of every leaf."""

import dataclasses
from functools import partial
from typing import Any, Literal

import jax

from dsv3_jax.config.model import ModelConfig

Tree = dict[str, Any]
"""Nested dict of `Leaf`."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array. `axes` names each dimension for the sharding rules; None is never sharded."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Literal["normal", "ones", "zeros"] = "normal"
    """Weights N(0, init_std²), norms 1, router biases 0."""


def model_tree(cfg: ModelConfig) -> Tree:
    """The whole model. A stack has a leading axis of layers, and is absent where there are none."""
    V, D, bias = cfg.vocab_size, cfg.model_dim, router_state_tree(cfg)
    dense_layer, moe_layer = layer_tree(cfg, mlp=ffn_tree(D, cfg.ffn_dim)), layer_tree(cfg, moe=moe_tree(cfg))
    params = {
        "embed": {"w": Leaf((V, D), ("vocab", "embed"))},
        "final_norm": {"scale": norm(D)},
        "unembed": {"w": Leaf((D, V), ("embed", "vocab"))},
        **_stacks(cfg, dense_layers=dense_layer, moe_layers=moe_layer, mtp=mtp_tree(cfg)),
    }
    router_state = _stacks(cfg, moe_layers={"moe": bias}, mtp={"block": {"moe": bias}}) if bias else {}
    return {"params": params, "router_state": router_state}


def layer_tree(cfg: ModelConfig, **feed_forward: Tree) -> Tree:
    """One layer; `feed_forward` is `mlp=…` in the first layers, `moe=…` in the others."""
    D = cfg.model_dim
    return {"attn_norm": {"scale": norm(D)}, "mla": mla_tree(cfg), "ffn_norm": {"scale": norm(D)}, **feed_forward}


def mla_tree(cfg: ModelConfig) -> Tree:
    """Attention: W^DKV and W^KR lie side by side in `kv_down`, W^UK and W^UV in `kv_up`."""
    D, mla = cfg.model_dim, cfg.mla
    H, Q, C = mla.num_heads, mla.q_latent_dim, mla.kv_latent_dim
    I, R, W = mla.nope_head_dim, mla.rope_head_dim, mla.v_head_dim
    queries = {"q": Leaf((D, H, I + R), ("embed", "heads", None))}
    if Q is not None:
        queries = {
            "q_down": Leaf((D, Q), ("embed", "q_latent")),
            "q_norm": norm(Q, "q_latent"),
            "q_up": Leaf((Q, H, I + R), ("q_latent", "heads", None)),
        }
    return {
        **queries,
        "kv_down": Leaf((D, C + R), ("embed", None)),
        "kv_norm": norm(C, "kv_latent"),
        "kv_up": Leaf((C, H, I + W), ("kv_latent", "heads", None)),
        "out": Leaf((H, W, D), ("heads", None, "embed")),
    }


def moe_tree(cfg: ModelConfig) -> Tree:
    """The router's centroids, the routed experts on a leading axis, and the shared experts as one wide feed-forward."""
    D, E, F, S = cfg.model_dim, cfg.moe.num_experts, cfg.moe.expert_dim, cfg.moe.num_shared_experts
    gate_up = Leaf((E, D, 2, F), ("expert", "embed", None, "ffn"))
    return {
        "router": {"w": Leaf((D, E), ("embed", None))},
        "experts": {"gate_up": gate_up, "down": Leaf((E, F, D), ("expert", "ffn", "embed"))},
        **({"shared": ffn_tree(D, S * F)} if S else {}),
    }


def router_state_tree(cfg: ModelConfig) -> Tree:
    """What steers the router of one layer without a gradient: a bias for each expert, where `cfg` has one."""
    return {"router": {"bias": Leaf((cfg.moe.num_experts,), (None,), "zeros")}} if cfg.moe.has_bias else {}


def mtp_tree(cfg: ModelConfig) -> Tree:
    """One multi-token-prediction module: M_k over [embedding; hidden state], three norms, a layer."""
    D = cfg.model_dim
    return {
        "embed_norm": {"scale": norm(D)},
        "hidden_norm": {"scale": norm(D)},
        "proj": {"w": Leaf((2 * D, D), (None, "embed"))},
        "block": layer_tree(cfg, moe=moe_tree(cfg)),
        "norm": {"scale": norm(D)},
    }


def ffn_tree(D: int, F: int) -> Tree:
    """A SwiGLU feed-forward of width F; gate and up are one array."""
    return {"gate_up": Leaf((D, 2, F), ("embed", None, "ffn")), "down": Leaf((F, D), ("ffn", "embed"))}


def norm(dim: int, axis: str = "embed") -> Leaf:
    """The scale of an RMSNorm."""
    return Leaf((dim,), (axis,), "ones")


def _stacks(cfg: ModelConfig, **trees: Tree) -> Tree:
    counts = {"dense_layers": cfg.num_dense_layers, "moe_layers": cfg.num_moe_layers, "mtp": cfg.mtp_depth}

    def stacked(count: int, leaf: Leaf) -> Leaf:
        return Leaf((count, *leaf.shape), ("layers", *leaf.axes), leaf.init)

    return {name: jax.tree.map(partial(stacked, counts[name]), tree) for name, tree in trees.items() if counts[name]}
