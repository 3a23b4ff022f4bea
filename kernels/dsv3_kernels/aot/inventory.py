"""What a compiled program is made of: kernels, matmuls outside of them, loops; read from XLA's optimised HLO."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from dsv3_kernels.aot import hlo

_SOURCE = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_OPERANDS = re.compile(r" dot\(%([\w.-]+), %([\w.-]+)\)")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_DEFINED = re.compile(r"^\s*(?:ROOT )?%([\w.-]+) = ")

_CALLERS = (*hlo.CONTROL, "fusion", "async-start", "call-start", "fusion-start")


class Kernel(NamedTuple):
    """A call of a kernel of this package."""

    name: str
    """Of the function that is its body."""
    source: str
    """Where in the traced function it stands, as jax names it."""
    runs: int
    """How often it is called in a run of the program; what stands in a loop without known trips counts once."""


class Product(NamedTuple):
    """A matmul that XLA computes itself."""

    operands: tuple[str, str]
    """The dtypes, as HLO writes them."""
    result: str
    flops: float
    """Of one run; a matmul of m x k and k x n counts 2 m k n."""
    source: str
    runs: int


class Loop(NamedTuple):
    """A loop on the device."""

    trips: int | None
    """None where they depend on data: then the host waits for the device before each."""
    source: str
    runs: int


class Inventory(NamedTuple):
    """Everything a program is made of that can be slow."""

    kernels: list[Kernel]
    products: list[Product]
    loops: list[Loop]
    libraries: Counter[str]
    """Other custom calls by their target, such as "__cublas$gemm"."""


def take_inventory(program: str) -> Inventory:
    """Reads optimised HLO. Raises: ValueError for other text."""
    found = Inventory([], [], [], Counter())
    for line in hlo.walk(program, into=_CALLERS):
        source = _source(line.text)
        if line.opcode == "while":
            found.loops.append(Loop(hlo.known_trips(line.text), source, line.runs))
        elif line.opcode == "dot":
            found.products.append(_product(line.text, line.computation, line.runs))
        elif line.opcode == "custom-call":
            target = _TARGET.findall(line.text)[0]
            if target.startswith("mosaic_gpu"):
                found.kernels.append(Kernel(_kernel_name(source), source, line.runs))
            else:
                found.libraries[target] += line.runs
    return found


def _source(line: str) -> str:
    source = _SOURCE.search(line)
    return source[1] if source else ""


def _kernel_name(source: str) -> str:
    """The element before the last, which is the primitive that launches."""
    return source.split("/")[-2] if "/" in source else source


def _product(line: str, lines: Sequence[str], runs: int) -> Product:
    """A `dot`; the types of its operands stand where they are defined, in the same computation."""
    operands, contracted = _OPERANDS.search(line), _CONTRACTED.search(line)
    assert operands is not None, line
    assert contracted is not None, line
    types = {
        defined[1]: other for other in lines if (defined := _DEFINED.match(other)) and defined[1] in operands.groups()
    }
    (left, shape), (right, _) = (_array(types[name]) for name in operands.groups())
    result, out = _array(line)
    depth = math.prod(shape[int(axis)] for axis in contracted[1].split(",") if axis)
    return Product((left, right), result, 2.0 * math.prod(out) * depth, _source(line), runs)


def _array(line: str) -> tuple[str, tuple[int, ...]]:
    """Dtype and sizes of what a line defines."""
    array = _ARRAY.search(line.partition(" = ")[2])
    assert array is not None, line
    return array[1], tuple(int(size) for size in array[2].split(",") if size)
