"""Activations that one layer keeps for its backward pass, by class of tensor: in bfloat16 and in FP8.

    python -m dsv3_jax.planning.memory configs/dsv3_671b.py                  # a layer, at 4096 tokens a row
    python -m dsv3_jax.planning.memory configs/tiny.py --rows 8 --compile    # and what XLA allocates for a layer

Computed twice: from the shapes of the configuration (`kept_tensors`), and read off the residuals of the model's own
backward pass (`residuals`), which traces a layer and allocates nothing. The program fails if the two differ. With
`--compile` XLA's own account of the compiled gradient is a third.
"""

import argparse
import collections
import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.config.arguments import add_config_arguments
from dsv3_jax.config.check import UserError, check
from dsv3_jax.config.load import load_config
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.interrupt import run_program
from dsv3_jax.model.functions import Functions, functions_for
from dsv3_jax.model.layers import Remat, layer, rematerialised
from dsv3_jax.model.mla import Context
from dsv3_jax.model.moe.router import stack_bias
from dsv3_jax.model.params import ParamSpec, abstract_params
from dsv3_jax.model.rope import RopeTable
from dsv3_jax.model.transformer import hidden_states
from dsv3_jax.precision.fp8_experts import BLOCK_ROWS
from dsv3_kernels.routed_experts.plan import block_size_for, num_blocks

COMPARED = ("mixed", "fp8_dsv3")

SCALED = 128
"""Numbers that share a float32 scale."""

FURTHER_LAYERS = 4
"""Between the two programs that `allocated_a_layer` compares."""


class Kept(NamedTuple):
    """A tensor of the backward pass."""

    part: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


def kept_tensors(cfg: ModelConfig, functions: Functions, *, rows: int, seq_len: int, is_moe: bool) -> list[Kept]:
    """What `remat="paper"` keeps of one layer, parameters left out, from shapes alone.

    With fp8_dsv3 SwiGLU's inputs are bytes of E4M3 and attention's output E5M6, packed to 1.5 bytes; both with a
    float32 scale for each 128 elements. Everything else is as in bfloat16.
    """
    B, T, D = rows, seq_len, cfg.model_dim
    mla_cfg, moe = cfg.mla, cfg.moe
    is_fp8 = functions.name == "fp8_dsv3"

    def e4m3(part: str, *shape: int) -> list[Kept]:
        if not is_fp8:
            return [Kept(part, shape, "bfloat16")]
        num_rows, width = math.prod(shape[:-1]), shape[-1]
        return [
            Kept(part, (num_rows, width), "uint8"),
            Kept(part, (num_rows, -(-width // SCALED)), "float32"),
        ]

    kept = [Kept("residual stream", (B, T, D), "bfloat16")] * 2
    if mla_cfg.q_latent_dim is not None:
        kept.append(Kept("latents before their norms", (B, T, mla_cfg.q_latent_dim), "bfloat16"))
    kept.append(Kept("latents before their norms", (B, T, mla_cfg.kv_latent_dim + mla_cfg.rope_head_dim), "bfloat16"))
    heads = mla_cfg.num_heads * mla_cfg.v_head_dim
    if is_fp8:
        kept.append(Kept("attention's output", (B * T, 3 * -(-heads // 2)), "uint8"))
        kept.append(Kept("attention's output", (B * T, -(-heads // SCALED)), "float32"))
    else:
        kept.append(Kept("attention's output", (B, T, heads), "bfloat16"))
    if not is_moe:
        return [*kept, *e4m3("SwiGLU's inputs", B, T, 2 * cfg.ffn_dim)]
    if moe.num_shared_experts:
        kept += e4m3("SwiGLU's inputs", B, T, 2 * moe.expert_dim * moe.num_shared_experts)
    pairs = B * T * moe.top_k
    block = BLOCK_ROWS if is_fp8 else block_size_for(pairs, moe.num_experts)
    blocks = num_blocks(pairs, moe.num_experts, block)
    kept += e4m3("SwiGLU's inputs, routed", blocks * block, 2 * moe.expert_dim)
    kept.append(Kept("routing", (B, T, moe.num_experts), "float32"))
    plan = [(B * T, moe.top_k), (blocks * block,), (blocks * block,), (blocks,)]
    return [*kept, *(Kept("routing", shape, "int32") for shape in plan)]


def residuals(
    cfg: ModelConfig, functions: Functions, *, rows: int, seq_len: int, is_moe: bool, remat: Remat = "paper"
) -> collections.Counter[tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor that the model's backward pass of one layer holds, parameters left out."""
    angles: Any = jax.ShapeDtypeStruct((rows, seq_len, cfg.mla.rope_head_dim // 2), jnp.float32)
    rope = RopeTable(angles, angles)
    stack: Any = abstract_params(cfg, functions.param_dtype)
    name = "moe_layers" if is_moe else "dense_layers"
    params = jax.tree.map(_of_one_layer, stack["params"][name], is_leaf=_is_spec)
    router_state = jax.tree.map(_of_one_layer, stack["router_state"], is_leaf=_is_spec)

    def pullback(params, router_state, x, rope):
        bias = stack_bias(router_state, name)

        def step(params, x):
            x, _, routing = layer(params, bias, x, Context(rope), cfg=cfg, functions=functions)
            return x, None if routing is None else routing.balance_loss

        return jax.vjp(rematerialised(step, remat), params, x)[1]

    x = jax.ShapeDtypeStruct((rows, seq_len, cfg.model_dim), functions.compute_dtype)
    held = collections.Counter(
        (leaf.shape, str(leaf.dtype))
        for leaf in jax.tree.leaves(jax.eval_shape(pullback, params, router_state, x, rope))
    )
    given = [*jax.tree.leaves(params), *jax.tree.leaves(router_state)[:1], *rope]
    return held - collections.Counter((leaf.shape, str(leaf.dtype)) for leaf in given)


def temporary_bytes(cfg: ModelConfig, functions: Functions, *, rows: int, seq_len: int, remat: Remat) -> int:
    """What XLA allocates beside arguments and results for the gradient of the model up to its head, compiled here."""
    specs = abstract_params(cfg, functions.param_dtype)
    variables = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), specs, is_leaf=_is_spec)

    def total(params, router_state, tokens):
        states = hidden_states(
            cfg, {"params": params, "router_state": router_state}, tokens, functions=functions, remat=remat
        )
        return jnp.square(states.hidden.astype(jnp.float32)).mean()

    tokens = jax.ShapeDtypeStruct((rows, seq_len), jnp.int32)
    lowered = jax.jit(jax.grad(total)).lower(variables["params"], variables["router_state"], tokens)
    sizes = lowered.compile().memory_analysis()
    if sizes is None:
        raise UserError(f"jax tells no program's memory on {jax.default_backend()}; try JAX_PLATFORMS=cpu.")
    return sizes.temp_size_in_bytes


def allocated_a_layer(cfg: ModelConfig, functions: Functions, *, rows: int, seq_len: int) -> int:
    """By how much the compiled gradient's temporary memory grows with each further MoE layer under `remat="paper"`."""
    few, many = (
        temporary_bytes(
            dataclasses.replace(cfg, num_layers=cfg.num_layers + more),
            functions,
            rows=rows,
            seq_len=seq_len,
            remat="paper",
        )
        for more in (0, FURTHER_LAYERS)
    )
    return round((many - few) / FURTHER_LAYERS)


def table(cfg: ModelConfig, *, rows: int, seq_len: int, is_moe: bool) -> str:
    """Bytes a token by class of tensor, in Markdown, after checking them against the backward pass itself.

    Raises:
        UserError: shapes and backward pass disagree.
    """
    columns = {}
    for functions in map(functions_for, COMPARED):
        kept = kept_tensors(cfg, functions, rows=rows, seq_len=seq_len, is_moe=is_moe)
        found = residuals(cfg, functions, rows=rows, seq_len=seq_len, is_moe=is_moe)
        expected = collections.Counter((tensor.shape, tensor.dtype) for tensor in kept)
        check(
            found == expected,
            f"{functions.name}: the backward pass holds {dict(found - expected)} beyond, and lacks "
            f"{dict(expected - found)} of, what planning.memory.kept_tensors counts.",
        )
        sizes: dict[str, int] = collections.defaultdict(int)
        for tensor in kept:
            sizes[tensor.part] += tensor.size
        columns[functions.name] = {**sizes, "total": sum(sizes.values())}
    tokens = rows * seq_len
    lines = ["| kept of a token | bf16, bytes | FP8, bytes | factor |", "|---|---:|---:|---:|"]
    for part, size in columns["mixed"].items():
        narrow = columns["fp8_dsv3"][part]
        lines.append(f"| {part} | {size / tokens:,.0f} | {narrow / tokens:,.0f} | {size / narrow:.2f} |")
    return "\n".join(lines)


def everything(cfg: ModelConfig, *, rows: int, seq_len: int, is_moe: bool) -> str:
    """What `remat="none"` keeps of a token, as a sentence: read off the backward pass."""
    sizes = []
    for functions in map(functions_for, COMPARED):
        held = residuals(cfg, functions, rows=rows, seq_len=seq_len, is_moe=is_moe, remat="none")
        sizes.append(sum(Kept("", *tensor).size * count for tensor, count in held.items()) / (rows * seq_len))
    wide, narrow = sizes
    return f"remat none: {wide:,.0f} bytes a token in bf16, {narrow:,.0f} in FP8, {wide / narrow:.2f} times less"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for a user error."""
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_jax.planning.memory", description="What a layer keeps for its backward pass."
    )
    add_config_arguments(parser)
    parser.add_argument("--rows", type=int, default=1, help="sequences (default 1)")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="also compile gradients and ask XLA; needs MoE layers, minutes for a large model",
    )
    args = parser.parse_args(arguments)
    try:
        check(args.rows > 0, f"--rows {args.rows} must be at least 1.")
        cfg = load_config(args.config, args.set)
        model, shape = cfg.model, {"rows": args.rows, "seq_len": cfg.train.seq_len}
        for name, count, is_moe in (("dense", model.num_dense_layers, False), ("MoE", model.num_moe_layers, True)):
            if count:
                print(
                    f"{cfg.name}: one of {count} {name} layers, {args.rows} x {cfg.train.seq_len} tokens, remat paper\n"
                )
                print(table(model, **shape, is_moe=is_moe) + "\n")
                print(everything(model, **shape, is_moe=is_moe) + "\n")
        if args.compile and model.num_moe_layers:
            print(f"XLA's temporary memory on {jax.default_backend()} for each further MoE layer, compiled:")
            for functions in map(functions_for, COMPARED):
                kept = sum(tensor.size for tensor in kept_tensors(model, functions, **shape, is_moe=True))
                print(
                    f"{functions.name}: {allocated_a_layer(model, functions, **shape):,} bytes, {kept:,} by the table"
                )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, ParamSpec)


def _of_one_layer(spec: ParamSpec) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(spec.shape[1:], spec.dtype)


if __name__ == "__main__":
    run_program(main)
