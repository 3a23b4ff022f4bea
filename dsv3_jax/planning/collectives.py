"""What devices send each other in a compiled program, read from XLA's optimised HLO."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr  # pyright: ignore[reportPrivateImportUsage]

from dsv3_kernels.aot import hlo

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter", "ragged-all-to-all")
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
"""Bytes of an element by HLO's name of its dtype; float8 dtypes start with f8 and have one."""
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(?:-start)?\((.*)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_NAMED_GROUPS = re.compile(r"replica_groups=mesh\[[^\]]*\] ?\{([^}]*)\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}")
_PRIMITIVES = {
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "all_to_all": "all-to-all",
    "pmax": "all-reduce",
    "ppermute": "collective-permute",
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "reduce_scatter": "reduce-scatter",
}


class Collective(NamedTuple):
    """One collective operation of the program."""

    kind: str
    axes: tuple[str, ...]
    """Of the mesh: devices that differ along these alone exchange."""
    dtype: str
    elements: int
    """Of the result on one device."""
    runs: int
    open_loops: int
    """So many loops around it have trips that are known at run time only: `runs` is for one trip of each."""
    is_conditional: bool


class Traffic(NamedTuple):
    """Collectives alike in kind, axes and place, together."""

    calls: int
    sent: int
    """Bytes that each device sends."""


def collectives(program: str, mesh: Any) -> list[Collective]:
    """Every collective that a run of `program` (optimised HLO text) reaches; `mesh.shape` maps axes to sizes."""
    found = []
    for line in hlo.walk(program, into=(*hlo.CONTROL, "async-start")):
        if (match := _COLLECTIVE.search(line.text)) is not None:
            dtype, elements = _of_result(match[1])
            axes = _axes_of(line.text, mesh.shape)
            found.append(Collective(match[2], axes, dtype, elements, line.runs, line.open_loops, line.is_conditional))
    return found


def narrowed(found: Sequence[Collective], traced: Jaxpr) -> list[Collective]:
    """`found` in bfloat16 where the traced program has it: a CPU sends it as float32.

    A collective is recognised by its kind, axes and number of elements; it stays as it is if some of these are wide.
    """
    dtypes: dict[tuple, set[str]] = {}
    for kind, axes, dtype, elements in _traced(traced):
        dtypes.setdefault((kind, frozenset(axes), elements), set()).add(dtype)

    def narrow(one: Collective) -> Collective:
        known = dtypes.get((one.kind, frozenset(one.axes), one.elements))
        return one._replace(dtype="bf16") if one.dtype == "f32" and known == {"bfloat16"} else one

    return [narrow(one) for one in found]


def by_axes(found: Sequence[Collective], sizes: Mapping[str, int]) -> dict[tuple[int, str, str], Traffic]:
    """Calls and bytes by (open loops, axes joined with +, kind)."""
    calls: Counter[tuple[int, str, str]] = Counter()
    sent: Counter[tuple[int, str, str]] = Counter()
    for one in found:
        key = (one.open_loops, "+".join(one.axes), one.kind)
        calls[key] += one.runs
        sent[key] += one.runs * sent_bytes(one, sizes)
    return {key: Traffic(calls[key], sent[key]) for key in sorted(calls)}


def sent_bytes(one: Collective, sizes: Mapping[str, int]) -> int:
    """What a device sends to others in one call: pairwise, or round a ring."""
    result = one.elements * (1 if one.dtype.startswith("f8") else WIDTHS[one.dtype])
    devices = math.prod(sizes[axis] for axis in one.axes)
    if one.kind == "collective-permute":
        return result
    share = {"reduce-scatter": devices - 1, "all-reduce": 2 * (devices - 1) / devices}
    return round(result * share.get(one.kind, (devices - 1) / devices))


def _of_result(types: str) -> tuple[str, int]:
    """Dtype and elements of a result, an array or a tuple of arrays of one dtype."""
    arrays = _ARRAY.findall(types)
    return arrays[0][0], sum(math.prod(int(size) for size in sizes.split(",") if size) for _, sizes in arrays)


def _axes_of(line: str, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Axes along which devices of one group differ; XLA writes groups by name, as a count, or as lists."""
    if (named := _NAMED_GROUPS.search(line)) is not None:
        return tuple(name.strip("' ") for name in named[1].split(",") if name.strip())
    groups = _groups(line, math.prod(sizes.values()))
    places = np.array(np.unravel_index(np.array(groups), tuple(sizes.values())))
    differ = (places != places[:, :, :1]).any(axis=(1, 2))
    return tuple(axis for axis, does in zip(sizes, differ, strict=True) if does)


def _groups(line: str, num_devices: int) -> list[list[int]]:
    """Devices that exchange with each other; of groups written as a count the first is enough."""
    if (iota := _IOTA_GROUPS.search(line)) is not None:
        dims = [int(size) for size in iota[3].split(",")]
        order = [int(axis) for axis in iota[4].split(",")] if iota[4] else range(len(dims))
        devices = np.arange(math.prod(dims)).reshape(dims).transpose(order)
        return devices.reshape(int(iota[1]), int(iota[2])).tolist()
    listed = _LISTED.search(line)
    if listed is None:
        return [list(range(num_devices))]
    return [[int(device) for device in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]


def _traced(jaxpr: Jaxpr) -> Iterator[tuple[str, tuple[str, ...], str, int]]:
    """Kind, axes, dtype and elements of each result of a collective in a traced program."""
    for equation in jaxpr.eqns:
        kind = _PRIMITIVES.get(equation.primitive.name)
        if kind is not None:
            axes: Any = equation.params.get("axes", equation.params.get("axis_name"))
            for result in equation.outvars:
                aval: Any = result.aval
                yield kind, (axes,) if isinstance(axes, str) else tuple(axes), str(aval.dtype), math.prod(aval.shape)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                yield from _traced(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, (Jaxpr, ClosedJaxpr))
