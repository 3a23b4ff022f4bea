"""The one table of names: our parameter path and index <-> the official key, its order of dimensions, its FP8 flag.

Everything that reads, writes, counts or lists official tensors goes through `entries`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.interop.convert import official_shape
from dsv3_jax.model.params import ParamSpec, abstract_params

SCALE_SUFFIX = "_scale_inv"
"""An E4M3 tensor `X` has its float32 scales in `X_scale_inv`: multiply to dequantise."""

FP8_BLOCK = (128, 128)
"""The block of official FP8 checkpoints: rows and columns of [out, in] that share a scale."""

IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
"""Tensors of some checkpoints that the configuration already determines."""


class Row(NamedTuple):
    """One kind of tensor.

    path: ours; {stack} is the stack of the layer.
    key: the official name; {layer} counts all layers, the MTP modules last.
    input_axes: how many leading axes of ours are the input of an official [out, in] matrix; 0: stored as it is.
    half: which half of our joint gate_up [.., D, 2, F] it is; None: all of it.
    is_fp8: stored in FP8 blocks by FP8 checkpoints.
    """

    path: str
    key: str
    input_axes: int = 0
    half: int | None = None
    is_fp8: bool = False


_L = "model.layers.{layer}."
_P = "params/{stack}/"

TABLE: dict[str, tuple[Row, ...]] = {
    "top": (
        Row("params/embed/w", "model.embed_tokens.weight"),
        Row("params/final_norm/scale", "model.norm.weight"),
        Row("params/unembed/w", "lm_head.weight", 1),
    ),
    "layer": (
        Row(_P + "attn_norm/scale", _L + "input_layernorm.weight"),
        Row(_P + "mla/q", _L + "self_attn.q_proj.weight", 1, is_fp8=True),
        Row(_P + "mla/q_down", _L + "self_attn.q_a_proj.weight", 1, is_fp8=True),
        Row(_P + "mla/q_norm", _L + "self_attn.q_a_layernorm.weight"),
        Row(_P + "mla/q_up", _L + "self_attn.q_b_proj.weight", 1, is_fp8=True),
        Row(_P + "mla/kv_down", _L + "self_attn.kv_a_proj_with_mqa.weight", 1, is_fp8=True),
        Row(_P + "mla/kv_norm", _L + "self_attn.kv_a_layernorm.weight"),
        Row(_P + "mla/kv_up", _L + "self_attn.kv_b_proj.weight", 1, is_fp8=True),
        Row(_P + "mla/out", _L + "self_attn.o_proj.weight", 2, is_fp8=True),
        Row(_P + "ffn_norm/scale", _L + "post_attention_layernorm.weight"),
        Row(_P + "mlp/gate_up", _L + "mlp.gate_proj.weight", 1, half=0, is_fp8=True),
        Row(_P + "mlp/gate_up", _L + "mlp.up_proj.weight", 1, half=1, is_fp8=True),
        Row(_P + "mlp/down", _L + "mlp.down_proj.weight", 1, is_fp8=True),
        Row(_P + "moe/router/w", _L + "mlp.gate.weight", 1),
        Row("router_state/{stack}/moe/router/bias", _L + "mlp.gate.e_score_correction_bias"),
        Row(_P + "moe/shared/gate_up", _L + "mlp.shared_experts.gate_proj.weight", 1, half=0, is_fp8=True),
        Row(_P + "moe/shared/gate_up", _L + "mlp.shared_experts.up_proj.weight", 1, half=1, is_fp8=True),
        Row(_P + "moe/shared/down", _L + "mlp.shared_experts.down_proj.weight", 1, is_fp8=True),
    ),
    "expert": (
        Row(_P + "moe/experts/gate_up", _L + "mlp.experts.{expert}.gate_proj.weight", 1, half=0, is_fp8=True),
        Row(_P + "moe/experts/gate_up", _L + "mlp.experts.{expert}.up_proj.weight", 1, half=1, is_fp8=True),
        Row(_P + "moe/experts/down", _L + "mlp.experts.{expert}.down_proj.weight", 1, is_fp8=True),
    ),
    "mtp": (
        Row("params/mtp/embed_norm/scale", _L + "enorm.weight"),
        Row("params/mtp/hidden_norm/scale", _L + "hnorm.weight"),
        Row("params/mtp/proj/w", _L + "eh_proj.weight", 1),
        Row("params/mtp/norm/scale", _L + "shared_head.norm.weight"),
    ),
    "mtp_copy": (
        Row("params/embed/w", _L + "embed_tokens.weight"),
        Row("params/unembed/w", _L + "shared_head.head.weight", 1),
    ),
}


class Entry(NamedTuple):
    """One official tensor: `ours[path][index]`, brought to the order of dimensions that `input_axes` gives.

    `shape` is the official one; `is_copy` marks what an MTP module repeats of the main model.
    """

    key: str
    path: str
    index: tuple[int | slice, ...]
    input_axes: int
    shape: tuple[int, ...]
    is_fp8: bool
    is_copy: bool


def entries(cfg: ModelConfig) -> Iterator[Entry]:
    """Every official tensor of the model, scales left out, in the order of its layers. Allocates no weights."""
    specs = flatten(abstract_params(cfg))
    embed, final_norm, unembed = TABLE["top"]
    yield _entry(embed, specs)
    for layer in range(cfg.num_layers + cfg.mtp_depth):
        stack, position = _stack_of(cfg, layer)
        names = {"stack": stack, "layer": layer}
        if stack == "mtp/block":
            yield from (_entry(row, specs, (position,), **names) for row in TABLE["mtp"])
            yield from (_entry(row, specs, is_copy=True, **names) for row in TABLE["mtp_copy"])
        for row in TABLE["layer"]:
            if row.path.format(**names) in specs:
                yield _entry(row, specs, (position,), **names)
        if stack != "dense_layers":
            for expert in range(cfg.moe.num_experts):
                for row in TABLE["expert"]:
                    yield _entry(row, specs, (position, expert), **names, expert=expert)
    yield _entry(final_norm, specs)
    yield _entry(unembed, specs)


def stored_tensors(entry: Entry, dtype: str) -> list[tuple[str, tuple[int, ...], str]]:
    """(name, shape, dtype) of what a checkpoint of `dtype` holds for an entry: one tensor, or values and scales."""
    if entry.path.startswith("router_state/") or dtype == "float32":
        return [(entry.key, entry.shape, "float32")]
    if dtype == "bfloat16" or not entry.is_fp8:
        return [(entry.key, entry.shape, "bfloat16")]
    scale_shape = tuple(-(-size // block) for size, block in zip(entry.shape, FP8_BLOCK, strict=True))
    return [(entry.key, entry.shape, "float8_e4m3fn"), (entry.key + SCALE_SUFFIX, scale_shape, "float32")]


def official_tensors(cfg: ModelConfig, dtype: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(name, shape, dtype) of every tensor of an official checkpoint, scales included; dtype as in `save_pretrained`.

    For the 671B model in "float8_e4m3fn": 91,991 tensors with 684,531,386,000 elements, in about a second.
    """
    for entry in entries(cfg):
        yield from stored_tensors(entry, dtype)


def ragged_tensor(cfg: ModelConfig) -> Entry | None:
    """The first tensor whose last FP8 block is cut short although it is not the only one; None when there is none.

    transformers 5 takes rows / blocks for the size of a block when it dequantises, which is true of all others.
    """
    for entry in entries(cfg):
        if entry.is_fp8 and any(
            size > block and size % block for size, block in zip(entry.shape, FP8_BLOCK, strict=True)
        ):
            return entry
    return None


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {"params/embed/w": leaf}."""
    flat: dict[str, Any] = {}
    for name, node in tree.items():
        path = f"{prefix}{name}"
        flat.update(flatten(node, f"{path}/") if isinstance(node, dict) else {path: node})
    return flat


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten`; always has "params" and "router_state"."""
    tree: dict[str, Any] = {"params": {}, "router_state": {}}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _stack_of(cfg: ModelConfig, layer: int) -> tuple[str, int]:
    """The stack that holds an official layer, and its place on the leading axis."""
    if layer < cfg.num_dense_layers:
        return "dense_layers", layer
    if layer < cfg.num_layers:
        return "moe_layers", layer - cfg.num_dense_layers
    return "mtp/block", layer - cfg.num_layers


def _entry(
    row: Row, specs: dict[str, ParamSpec], index: tuple[int | slice, ...] = (), *, is_copy: bool = False, **names: Any
) -> Entry:
    path = row.path.format(**names)
    shape = specs[path].shape[len(index) :]
    if row.half is not None:
        index = (*index, slice(None), row.half)
        shape = (shape[0], *shape[2:])
    return Entry(
        key=row.key.format(**names),
        path=path,
        index=index,
        input_axes=row.input_axes,
        shape=official_shape(shape, row.input_axes),
        is_fp8=row.is_fp8,
        is_copy=is_copy,
    )
