"""Bytes that the loop of a pipeline carries on one device, by class, read off the traced program."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr  # pyright: ignore[reportPrivateImportUsage]

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.planning.held import GRADIENTS, SAVED, USED, WAITING


def carried(program: Jaxpr, model: ModelConfig) -> dict[str, int]:
    """Of the outermost loop over ticks. Its carry is that of `pipeline.runtime.run`: buffers in their order, what
    forward passes learned, what backward passes gained. The weights are constants of its body.
    """
    consts, carry, learned = next(_loops(program, model))
    depth, (losses, *gained) = model.mtp_depth, carry[learned + 3 :]
    buffers = [leaf for leaf in carry[:learned] if leaf.shape]  # without the loop's counters
    passing, stored, ends = buffers[:2], buffers[2 : -1 - depth], buffers[-1 - depth :]
    slots, of_ends = gained[: -3 - depth], gained[-3 - depth :]
    wanted = Counter(
        [leaf.shape[1:] for leaf in slots for _ in range(leaf.shape[0])] + [leaf.shape for leaf in of_ends]
    )
    used = [leaf for leaf in consts if jnp.issubdtype(leaf.dtype, jnp.floating) and wanted[leaf.shape]]
    assert losses.shape == (1 + depth,)
    assert Counter(leaf.shape for leaf in used) == wanted, "the loop has other weights than gradients"
    parts = {USED: used, GRADIENTS: gained, SAVED: stored, WAITING: [*passing, *ends]}
    return {name: sum(map(_size, avals)) for name, avals in parts.items()}


def _loops(program: Jaxpr, model: ModelConfig) -> Iterator[tuple[list[Any], list[Any], int]]:
    """Loops that carry what is learned of all routers: constants, carry, and the place of that in the carry."""
    for equation in _equations(program):
        if equation.primitive.name in ("scan", "while"):
            given, num_consts = [variable.aval for variable in equation.invars], -len(equation.outvars)
            place = _place_of_learned(given[num_consts:], model)
            if place is not None:
                yield given[:num_consts], given[num_consts:], place


def _place_of_learned(avals: Sequence[Any], model: ModelConfig) -> int | None:
    """Where the loads, balance losses and dropped choices of all routers stand, a row more than routers each."""
    rows, E = model.num_moe_layers + model.mtp_depth + 1, model.moe.num_experts
    wanted = [((rows, E), "int32"), ((rows,), "float32"), ((rows,), "int32")]
    found = [(aval.shape, str(aval.dtype)) for aval in avals]
    return next((index for index in range(len(found)) if found[index : index + 3] == wanted), None)


def _equations(jaxpr: Jaxpr) -> Iterator[Any]:
    """All, those of inner programs after the one that has them."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                yield from _equations(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, (Jaxpr, ClosedJaxpr))


def _size(aval: Any) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize
