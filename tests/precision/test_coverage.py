"""What the model multiplies in FP8, read off its jaxpr, is what the table says.

In the walk below a value is a parameter while it is made of one parameter and constants only; anything else that
depends on an input is data. A value is FP8 from the cast to float8 on, through everything that moves or rescales it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal  # pyright: ignore[reportPrivateImportUsage]

from dsv3_jax.config.load import load_config
from dsv3_jax.interop.hf_names import entries
from dsv3_jax.model.functions import functions_for
from dsv3_jax.model.params import abstract_params
from dsv3_jax.model.transformer import forward
from dsv3_jax.precision.coverage import coverage_table, row_of

MIXED = functions_for("mixed")
FP8 = functions_for("fp8_dsv3")

TINY = load_config(Path(__file__).parents[2] / "configs" / "tiny.py").model


DATA = "data"
MOVES = {
    "reshape",
    "transpose",
    "convert_element_type",
    "bitcast_convert_type",
    "slice",
    "pad",
    "squeeze",
    "broadcast_in_dim",
    "dynamic_slice",
    "gather",
    "concatenate",
    "mul",
    "copy",
    "copy_p",
    "optimization_barrier",
    "name",
    "select_n",
    "rev",
    "expand_dims",
    "reduce_precision",
    "stop_gradient",
    "split",
}


class Use(NamedTuple):
    """An operation on a parameter and data (`param` its path), or a product of data and data (`param` None)."""

    primitive: str
    param: str | None
    is_param_fp8: bool
    is_data_fp8: bool
    num_batch_axes: int


class Mark(NamedTuple):
    """`origin`: a parameter's path, `DATA`, or None for a constant."""

    origin: str | None
    is_fp8: bool


CONSTANT = Mark(None, False)


def uses(closed: ClosedJaxpr, origins: Sequence[str]) -> list[Use]:
    """Every use in `closed`, whose inputs are the parameters and data named in `origins`."""
    found: list[Use] = []
    _visit(closed.jaxpr, [Mark(origin, False) for origin in origins], found)
    return found


def _visit(jaxpr: Jaxpr, marks: Sequence[Mark], found: list[Use]) -> list[Mark]:
    known = dict(zip(jaxpr.invars, marks, strict=True))
    known |= dict.fromkeys(jaxpr.constvars, CONSTANT)

    def mark(atom) -> Mark:
        return CONSTANT if isinstance(atom, Literal) else known[atom]

    for eqn in jaxpr.eqns:
        marks_in = [mark(atom) for atom in eqn.invars]
        inner = _inner(eqn)
        if inner:
            outs = _merged([_visit(body, _entering(eqn, body, marks_in), found) for body in inner], eqn)
        else:
            outs = [_step(eqn, marks_in, found)] * len(eqn.outvars)
        for var, result in zip(eqn.outvars, outs, strict=True):
            known[var] = Mark(result.origin, True) if _is_float8(var) else result
    return [mark(atom) for atom in jaxpr.outvars]


def _step(eqn, marks: Sequence[Mark], found: list[Use]) -> Mark:
    name = eqn.primitive.name
    origins = {mark.origin for mark in marks if mark.origin is not None}
    params = sorted(origins - {DATA})
    is_fp8 = name in MOVES and any(mark.is_fp8 for mark in marks)
    batch = len(eqn.params["dimension_numbers"][1][0]) if name == "dot_general" else 0
    if len(params) == 1 and DATA in origins:
        of_param = any(mark.is_fp8 for mark in marks if mark.origin == params[0])
        of_data = any(mark.is_fp8 for mark in marks if mark.origin == DATA)
        if name == "dynamic_slice":  # one expert's weight, chosen by data
            return Mark(params[0], of_param)
        found.append(Use(name, params[0], of_param, of_data, batch))
        return Mark(DATA, False)
    if name == "dot_general" and not params and origins:
        found.append(Use(name, None, marks[0].is_fp8, marks[1].is_fp8, batch))
        return Mark(DATA, False)
    if len(origins) > 1:
        return Mark(DATA, is_fp8)
    return Mark(origins.pop() if origins else None, is_fp8)


def _inner(eqn) -> list[Jaxpr]:
    """The bodies an equation runs (a loop's condition left out)."""
    name = eqn.primitive.name
    if name == "cond":
        return [branch.jaxpr for branch in eqn.params["branches"]]
    for key in ("body_jaxpr", "call_jaxpr", "fun_jaxpr", "jaxpr"):
        if key in eqn.params:
            body = eqn.params[key]
            return [body.jaxpr if isinstance(body, ClosedJaxpr) else body]
    return []


def _entering(eqn, body: Jaxpr, marks: Sequence[Mark]) -> Sequence[Mark]:
    name = eqn.primitive.name
    if name == "cond":
        return marks[1:]
    if name == "while":
        return marks[eqn.params["cond_nconsts"] :]
    return marks


def _merged(results: Sequence[Sequence[Mark]], eqn) -> list[Mark]:
    merged = []
    for branches in zip(*results, strict=True):
        origins = {branch.origin for branch in branches if branch.origin is not None}
        merged.append(
            Mark(origins.pop() if len(origins) == 1 else DATA if origins else None, any(b.is_fp8 for b in branches))
        )
    return merged


def _is_float8(var) -> bool:
    return "float8" in str(getattr(var.aval, "dtype", ""))


def paths_of(tree) -> list[str]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, "axes"))
    return ["/".join(key.key for key in path) for path, _ in leaves]


@pytest.fixture(scope="module", params=["forward", "gradient"])
def traced(request):
    """Every meeting of a parameter with data, and of data with data, in tiny's forward or backward pass."""
    return request.param, uses_of(FP8, request.param)


def uses_of(functions, direction: str):
    specs = abstract_params(TINY)
    shapes = jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), specs, is_leaf=lambda leaf: hasattr(leaf, "axes")
    )
    tokens = jax.ShapeDtypeStruct((2, 24), jnp.int32)

    def total(variables, tokens):
        out = forward(TINY, variables, tokens, functions=functions)
        return jnp.sin(out.logits).mean() + jnp.sin(out.mtp_logits[0]).mean()

    run = (
        total
        if direction == "forward"
        else jax.grad(lambda params, rest, tokens: total({**rest, "params": params}, tokens))
    )
    arguments = (
        (shapes, tokens)
        if direction == "forward"
        else (shapes["params"], {"router_state": shapes["router_state"]}, tokens)
    )
    jaxpr = jax.make_jaxpr(run)(*arguments)
    names = (
        paths_of(shapes)
        if direction == "forward"
        else [f"params/{p}" for p in paths_of(shapes["params"])]
        + [f"router_state/{p}" for p in paths_of(shapes["router_state"])]
    )
    return uses(jaxpr, [*names, DATA])


def test_every_parameter_is_in_one_row_and_training_agrees_with_the_released_files():
    in_files = {entry.path for entry in entries(TINY) if entry.is_fp8}
    for path in paths_of(abstract_params(TINY)["params"]):
        assert row_of(path).is_fp8 == (f"params/{path}" in in_files), path
    with pytest.raises(ValueError, match="is claimed by 0 rows"):
        row_of("new/thing")


def test_fp8_touches_what_the_table_says_and_nothing_else(traced):
    _direction, found = traced
    for path in paths_of(abstract_params(TINY)["params"]):
        # A skipped block of a grouped product reads the mesh axes of its zeros off the weight, with a select.
        products = [use for use in found if use.param == f"params/{path}" and use.primitive != "select_n"]
        assert products, path
        if row_of(path).is_fp8:
            assert {use.primitive for use in products} == {"dot_general"}, path
            assert all(use.is_param_fp8 and use.is_data_fp8 for use in products), path
        else:
            assert not any(use.is_param_fp8 for use in products), path
            assert not any(use.is_data_fp8 for use in products if use.primitive == "dot_general"), path


def test_products_of_data_are_attention_in_bfloat16_and_weight_gradients_in_fp8(traced):
    direction, found = traced
    products = [use for use in found if use.param is None and use.primitive == "dot_general"]
    of_attention = [use for use in products if use.num_batch_axes == 2]
    assert of_attention
    assert not any(use.is_param_fp8 or use.is_data_fp8 for use in of_attention)
    others = [use for use in products if use.num_batch_axes != 2]
    assert bool(others) == (direction == "gradient")
    assert any(use.is_param_fp8 for use in others) == (direction == "gradient")
    assert all(use.is_param_fp8 == use.is_data_fp8 for use in others)


def test_bfloat16_training_has_no_fp8_at_all():
    found = uses_of(MIXED, "gradient")
    assert found
    assert not any(use.is_param_fp8 or use.is_data_fp8 for use in found)


def test_the_readme_prints_the_table(repository: Path):
    assert coverage_table() in (repository / "dsv3_jax/precision/README.md").read_text(encoding="utf-8")
