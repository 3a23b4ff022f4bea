"""The parameter tree as a table: shape, logical axes and first value of every leaf."""

import dataclasses
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
    V, D, F = cfg.vocab_size, cfg.model_dim, cfg.ffn_dim
    bias = {"moe": router_state_tree(cfg)} if cfg.moe.has_bias else {}
    params = {
        "embed": {"w": Leaf((V, D), ("vocab", "embed"))},
        "final_norm": {"scale": norm(D)},
        "unembed": {"w": Leaf((D, V), ("embed", "vocab"))},
        "dense_layers": _stacked(cfg.num_dense_layers, layer_tree(cfg, mlp=ffn_tree(D, F))),
        "moe_layers": _stacked(cfg.num_moe_layers, layer_tree(cfg, moe=moe_tree(cfg))),
        "mtp": _stacked(cfg.mtp_depth, mtp_tree(cfg)),
    }
    router_state = {
        "moe_layers": _stacked(cfg.num_moe_layers, bias),
        "mtp": _stacked(cfg.mtp_depth, {"block": bias} if bias else {}),
    }
    return {"params": _present(params), "router_state": _present(router_state)}


def layer_tree(cfg: ModelConfig, **feed_forward: Tree) -> Tree:
    """One layer; `feed_forward` is `mlp=…` in the first layers, `moe=…` in the others."""
    D = cfg.model_dim
    return {"attn_norm": {"scale": norm(D)}, "mla": mla_tree(cfg), "ffn_norm": {"scale": norm(D)}, **feed_forward}


def mla_tree(cfg: ModelConfig) -> Tree:
    """Attention: W^DKV and W^KR lie side by side in `kv_down`, W^UK and W^UV in `kv_up`."""
    D, mla = cfg.model_dim, cfg.mla
    H, Q, C = mla.num_heads, mla.q_latent_dim, mla.kv_latent_dim
    I, R, W = mla.nope_head_dim, mla.rope_head_dim, mla.v_head_dim
    tree = {
        "kv_down": Leaf((D, C + R), ("embed", None)),
        "kv_norm": norm(C, "kv_latent"),
        "kv_up": Leaf((C, H, I + W), ("kv_latent", "heads", None)),
        "out": Leaf((H, W, D), ("heads", None, "embed")),
    }
    if Q is None:
        return {"q": Leaf((D, H, I + R), ("embed", "heads", None)), **tree}
    return {
        "q_down": Leaf((D, Q), ("embed", "q_latent")),
        "q_norm": norm(Q, "q_latent"),
        "q_up": Leaf((Q, H, I + R), ("q_latent", "heads", None)),
        **tree,
    }


def moe_tree(cfg: ModelConfig) -> Tree:
    """The router's centroids, the routed experts on a leading axis, and the shared experts as one wide feed-forward."""
    D, E, F = cfg.model_dim, cfg.moe.num_experts, cfg.moe.expert_dim
    tree = {
        "router": {"w": Leaf((D, E), ("embed", None))},
        "experts": {
            "gate_up": Leaf((E, D, 2, F), ("expert", "embed", None, "ffn")),
            "down": Leaf((E, F, D), ("expert", "ffn", "embed")),
        },
    }
    if cfg.moe.num_shared_experts:
        tree["shared"] = ffn_tree(D, F * cfg.moe.num_shared_experts)
    return tree


def router_state_tree(cfg: ModelConfig) -> Tree:
    """What steers the router of one layer without a gradient: a bias for each expert."""
    return {"router": {"bias": Leaf((cfg.moe.num_experts,), (None,), "zeros")}}


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


def _stacked(count: int, tree: Tree) -> Tree:
    if not count:
        return {}
    return jax.tree.map(lambda leaf: Leaf((count, *leaf.shape), ("layers", *leaf.axes), leaf.init), tree)


def _present(stacks: Tree) -> Tree:
    return {name: tree for name, tree in stacks.items() if tree}
