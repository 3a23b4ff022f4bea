"""The parameters of a rank's slots, made of how the state lies: a function whose transpose brings gradients back.

The state has the model's own layout [L, …] whatever the depth of the pipeline, each array split over the ranks on some
other dimension. A rank takes from its part of every layer, for each rank, the layers that rank has, and one
`all_to_all` brings whole slots. Copies of a stage, and what every rank has, come back as sums.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from dsv3_jax.model.params import ParamSpec
from dsv3_jax.parallel.axes import PIPE
from dsv3_jax.parallel.sharding import store
from dsv3_jax.training.chunks import Weights
from dsv3_jax.training.layout import DENSE, Layout
from dsv3_jax.typing import Array, Int, Params
from dsv3_kernels.varying import varying_over

ATTENTION = ("attn_norm", "mla", "ffn_norm")
MODULE = ("embed_norm", "hidden_norm", "proj")


def weights_of(
    params: Params, *, specs: Params, mesh: Mesh, layout: Layout, rows: tuple[str, ...], everywhere: tuple[str, ...]
) -> Weights:
    """Stored parameters as this rank uses them; `specs` is the tree of `abstract_params`.

    `rows` are the mesh axes over which activations vary, `everywhere` those and that of tensors, if it has devices.
    """
    stacks = [("dense_layers",), ("moe_layers",), ("mtp", "block")]
    router = np.where(layout.router[:-1] < layout.num_routers, layout.router[:-1], 0)
    dense = np.where(layout.kind[:-1] == DENSE, layout.layer, 0)
    depth = len(jax.tree.leaves(params["mtp"])[0]) if "mtp" in params else 0
    modules = np.broadcast_to(np.arange(depth), (layout.num_stages, depth))
    wanted = {
        "attention": (stacks, ATTENTION, layout.layer, everywhere),
        "moe": (stacks[1:], ("moe",), router, everywhere),
        "mlp": (stacks[:1], ("mlp",), dense[:, : layout.num_dense_slots], everywhere),
        "mtp": ([("mtp",)], MODULE, modules, rows),
    }
    slots: list[list[dict]] = [[{} for _ in range(layout.num_slots)] for _ in layout.placement.flows]
    for name, (of_stacks, keys, of_stages, axes) in wanted.items():
        index = layout.of_ranks(of_stages)
        of_specs, of_params = ([_parts(tree, path, keys) for path in of_stacks] for tree in (specs, params))
        if any(of_params) and index.size:
            column = _column(list(filter(None, of_specs)), list(filter(None, of_params)), index, mesh, axes)
            first = layout.num_slots - depth if name == "mtp" else 0
            for place, slot in np.ndindex(*index.shape[1:]):
                own = jax.tree.map(lambda leaf, at=(place, slot): leaf[at], column)
                slots[place][first + slot][name] = own if len(keys) > 1 else own[keys[0]]
    whole = {name: _whole(specs[name], params[name], mesh, rows) for name in ("embed", "unembed", "final_norm")}
    norms = [whole.pop("final_norm")["scale"]]
    if depth:
        norms += list(_whole(specs["mtp"]["norm"]["scale"], params["mtp"]["norm"]["scale"], mesh, rows))
    return Weights(tuple(tuple(own) for own in slots), {**whole, "norms": tuple(norms)})


def _parts(tree: Params, path: tuple[str, ...], keys: tuple[str, ...]) -> Params:
    """Those of `keys` that a stack has; nothing without the stack."""
    for key in path:
        tree = tree.get(key, {})
    return {key: tree[key] for key in keys if key in tree}


def _column(specs: list, trees: list, index: Int[np.ndarray, "P places slots"], mesh: Mesh, axes: tuple) -> Params:
    """[places, slots, …] of this rank, from stacks one after another; `index` says which of their layers."""

    def bring(spec: ParamSpec, *leaves: Array) -> Array:
        leaf, split, flat = jnp.concatenate(leaves), None, index.reshape(len(index), -1)
        for dim, over in store(spec, mesh).gathers:
            split, over = (dim, over[1:]) if over[0] == PIPE else (split, over)
            leaf = lax.all_gather(leaf, over, axis=dim, tiled=True) if over else leaf
        if split is None:  # every rank has all
            leaf = varying_over(leaf, (PIPE,))[jnp.asarray(flat)[lax.axis_index(PIPE)]]
        else:
            leaf = lax.all_to_all(leaf[flat.reshape(-1)], PIPE, 0, split, tiled=True)
        return varying_over(leaf, axes).reshape(*index.shape[1:], *leaf.shape[1:])

    return jax.tree.map(bring, specs[0], *trees, is_leaf=lambda leaf: isinstance(leaf, ParamSpec))


def _whole(specs: Any, params: Any, mesh: Mesh, axes: tuple[str, ...]) -> Any:
    """Parameters that every rank has whole."""

    def gather(spec: ParamSpec, leaf: Array) -> Array:
        for dim, over in store(spec, mesh).gathers:
            leaf = lax.all_gather(leaf, over, axis=dim, tiled=True)
        return varying_over(leaf, axes)

    return jax.tree.map(gather, specs, params, is_leaf=lambda leaf: isinstance(leaf, ParamSpec))
