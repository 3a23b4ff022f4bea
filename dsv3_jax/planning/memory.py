"""Activations that one layer saves for its backward pass, by the name of the tensor: in bfloat16 and in FP8.

    python -m dsv3_jax.planning.memory configs/dsv3_671b.py                  # a layer, at 4096 tokens a row
    python -m dsv3_jax.planning.memory configs/tiny.py --rows 8 --compile    # and what XLA allocates for a layer

Both are read off a trace of the model's own layer, which allocates nothing: the tensors that it names, and what its
backward pass holds under `remat="paper"`. The program fails if the two differ. With `--compile` XLA's own account of
the compiled gradient is a third.
"""

import argparse
import collections
import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr  # pyright: ignore[reportPrivateImportUsage]

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

COMPARED = ("mixed", "fp8_dsv3")

INPUT = "(input of the layer)"

FURTHER_LAYERS = 4
"""Between the two programs that `allocated_a_layer` compares; both have as many more than the model, because with few
layers memory is at its peak elsewhere."""


class Tensor(NamedTuple):
    """Shape and dtype of what a backward pass holds."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


class Layer(NamedTuple):
    """What one layer of a model does for its backward pass, parameters left out."""

    named: list[tuple[str, Tensor]]
    """What has a name that a rematerialisation policy can save, and the input, which every policy saves."""
    held: collections.Counter[Tensor]
    """What the backward pass holds."""

    @property
    def is_accounted_for(self) -> bool:
        """Whether the backward pass holds exactly what has a name."""
        return self.held == collections.Counter(tensor for _, tensor in self.named)

    def size_of(self, name: str | None = None) -> int:
        """Bytes of what has this name, or any."""
        return sum(tensor.size for own, tensor in self.named if name in (None, own))


def traced(
    cfg: ModelConfig, functions: Functions, *, rows: int, seq_len: int, is_moe: bool, remat: Remat = "paper"
) -> Layer:
    """One layer of the model, traced with its backward pass."""
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
    jaxpr, results = jax.make_jaxpr(pullback, return_shape=True)(params, router_state, x, rope)
    given = [*jax.tree.leaves(params), *jax.tree.leaves(router_state)[:1], *rope]
    held = collections.Counter(map(_tensor, jax.tree.leaves(results))) - collections.Counter(map(_tensor, given))
    return Layer([(INPUT, _tensor(x)), *_named(jaxpr.jaxpr)], held)


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
        for more in (FURTHER_LAYERS, 2 * FURTHER_LAYERS)
    )
    return round((many - few) / FURTHER_LAYERS)


def table(cfg: ModelConfig, *, rows: int, seq_len: int, is_moe: bool) -> str:
    """Bytes a token by name of the saved tensor, in Markdown, after checking them against the backward pass itself.

    Raises:
        UserError: the backward pass holds what has no name, or does not hold what has one.
    """
    layers = []
    for name in COMPARED:
        found = traced(cfg, functions_for(name), rows=rows, seq_len=seq_len, is_moe=is_moe)
        named = collections.Counter(tensor for _, tensor in found.named)
        check(
            found.is_accounted_for,
            f"{name}: the backward pass holds {dict(found.held - named)} without a name and lacks "
            f"{dict(named - found.held)}; name what is saved in model.layers.PAPER, and nothing else.",
        )
        layers.append(found)
    names = dict.fromkeys(name for found in layers for name, _ in found.named)
    lines = ["| saved of a token | bf16, bytes | FP8, bytes | factor |", "|---|---:|---:|---:|"]
    for name, label in [*((name, name) for name in names), (None, "total")]:
        wide, narrow = (found.size_of(name) / (rows * seq_len) for found in layers)
        lines.append(f"| {label} | {wide:,.0f} | {narrow:,.0f} | {wide / narrow:.2f} |")
    return "\n".join(lines)


def everything(cfg: ModelConfig, *, rows: int, seq_len: int, is_moe: bool) -> str:
    """What `remat="none"` saves of a token, as a sentence: read off the backward pass."""
    sizes = []
    for name in COMPARED:
        held = traced(cfg, functions_for(name), rows=rows, seq_len=seq_len, is_moe=is_moe, remat="none").held
        sizes.append(sum(tensor.size * count for tensor, count in held.items()) / (rows * seq_len))
    wide, narrow = sizes
    return f"remat none: {wide:,.0f} bytes a token in bf16, {narrow:,.0f} in FP8, {wide / narrow:.2f} times less"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for a user error."""
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_jax.planning.memory", description="What a layer saves for its backward pass."
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
                named = traced(model, functions, **shape, is_moe=True).size_of()
                allocated = allocated_a_layer(model, functions, **shape)
                print(f"{functions.name}: {allocated:,} bytes, {named:,} by the table")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _named(jaxpr: Jaxpr) -> Iterator[tuple[str, Tensor]]:
    """What `checkpoint_name` names in a program, and in the programs that it calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "name":
            yield equation.params["name"], _tensor(equation.outvars[0].aval)
        for inner in equation.params.values():
            if isinstance(inner, (ClosedJaxpr, Jaxpr)):
                yield from _named(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)


def _tensor(leaf: Any) -> Tensor:
    return Tensor(leaf.shape, str(leaf.dtype))


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, ParamSpec)


def _of_one_layer(spec: ParamSpec) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(spec.shape[1:], spec.dtype)


if __name__ == "__main__":
    run_program(main)
