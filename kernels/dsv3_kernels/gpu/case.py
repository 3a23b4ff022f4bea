"""Rows of the table of speeds and comparisons of results, and where they come from.

An op folder takes part by a module `dsv3_kernels/<op>/bench.py` that offers

    bench_cases() -> list[BenchCase]      rows of `python -m dsv3_kernels.bench`
    check_cases() -> list[CheckCase]      comparisons of `python -m dsv3_kernels.check`

Both are data: nothing is computed and no device is asked before a program runs them. The programs take ops in turns,
so that whenever they are cut short every op has had its share.
"""

import importlib
import importlib.util
import itertools
import pkgutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

import dsv3_kernels
from dsv3_kernels.gpu.torch_peer.problems import TorchProblem
from dsv3_kernels.quantize import QTensor

PATHS = (
    "left operand in registers",
    "accumulator with a start value",
    "TMA add",
    "multicast",
    "FP8 conversion",
    "aliased memory",
)
"""What a device may do otherwise than the compiler and the interpreter promise. One case of each, as small as can be,
is checked before all others, and named, so that what hangs is known at once."""


class Published(NamedTuple):
    """A figure of another implementation on another machine, to stand beside ours."""

    source: str
    tflops: float | None = None
    gbps: float | None = None


class BenchCase(NamedTuple):
    """One row: an op at one shape, the kernel and what it is compared with in the same run."""

    op: str
    name: str
    make_inputs: Callable[[jax.Array], Any]
    """A random key -> fresh inputs, any pytree of arrays; what a candidate does not use costs it nothing."""
    kernel: Callable[[Any], Any]
    """The Pallas implementation, a function of the inputs; may raise NotImplementedError."""
    others: Mapping[str, Callable[[Any], Any]]
    """Other ways to the same result, by name; also functions of the inputs."""
    flops: float
    num_bytes: float
    """What must be read and written at least once."""
    published: Published | None = None
    torch: TorchProblem | None = None
    """The same as a problem for torch, if it computes it."""
    is_quick: bool = False
    """Whether `--quick` runs it."""
    is_bf16: bool = False
    """Whether its matmuls are of bf16, so that their rate is its ceiling, not that of FP8."""
    goal_share: float | None = None
    """The share of the rate of matmuls to be reached where they bind; None for the published figure, or all of it."""
    num_launches: int = 1
    """Launches that it cannot do without, which cost something whatever they do."""


class Comparison(NamedTuple):
    """What a result should be by another way, and how far from it it may be."""

    name: str
    expected: Callable[[Any], Any]
    """The inputs -> arrays of the structure of the result; not jitted."""
    error: Callable[[Any, Any], jax.Array]
    """(result, expected) -> a number, jitted; `diff` and `worst` are two."""
    limit: float
    """The error must be below; 0 asks for exactly 0. NaN fails."""


class CheckCase(NamedTuple):
    """An op at one shape, and what its result is compared with."""

    op: str
    name: str
    make_inputs: Callable[[jax.Array], Any]
    """A random key -> fresh inputs, any pytree of arrays."""
    run: Callable[[Any, str], Any]
    """The inputs and the name of an implementation -> arrays; may raise NotImplementedError."""
    comparisons: tuple[Comparison, ...]
    is_small: bool = False
    """Whether a CPU can afford it."""
    is_plain: bool = False
    """Whether it is one for the plain implementations alone: the kernel is not made for it. Others it refuses fail."""
    path: str = ""
    """One of PATHS (or another that you would see tried first), if this is the smallest case that takes it."""


Case = TypeVar("Case", BenchCase, CheckCase)


def bench_cases(ops: Sequence[str] = ()) -> list[BenchCase]:
    """The rows of these ops, or all, in turns; of each op those with published figures first.

    Raises: ValueError for an op that has none.
    """
    cases = _selected([case for module in _modules() for case in _offered(module, "bench_cases")], ops)
    return in_turns(sorted(cases, key=lambda case: case.published is None))


def check_cases(ops: Sequence[str] = (), module: str = "") -> list[CheckCase]:
    """The comparisons of these ops, or all: one of each of PATHS, the other small ones in turns, then the large ones.

    Args:
        module: the name of a module whose `check_cases` gives them, in place of all op folders.
    Raises: ValueError for an op or a module that has none, or several cases of one name.
    """
    modules = [module] if module else _modules()
    cases = _selected([case for each in modules for case in _offered(each, "check_cases")], ops)
    if module and not cases:
        raise ValueError(f"module {module} offers no cases; define check_cases() -> list[CheckCase] in it.")
    if same := [f"{op} {name}" for (op, name), count in Counter((c.op, c.name) for c in cases).items() if count > 1]:
        raise ValueError(f"several cases are called {', '.join(same)}; give each its own name.")
    places = {path: place for place, path in enumerate(PATHS)}
    first = sorted((case for case in cases if case.path), key=lambda case: places.get(case.path, len(places)))
    rest = [case for case in cases if not case.path]
    small, large = ([case for case in rest if case.is_small == is_small] for is_small in (True, False))
    return [*first, *in_turns(small), *in_turns(large)]


def in_turns(cases: Sequence[Case]) -> list[Case]:
    """One case of each op, then a second one of each, and so on; those of one op stay in their order."""
    by_op: dict[str, list[Case]] = {}
    for case in cases:
        by_op.setdefault(case.op, []).append(case)
    rounds = itertools.zip_longest(*by_op.values())
    return [case for each in rounds for case in each if case is not None]


def fp8_limit(num_outputs: int) -> float:
    """The largest `calc_diff` of an FP8 matmul from that of its unquantised standard normal operands.

    DeepGEMM's 1e-3. The mean is 6.8e-4, and of a hundred outputs it scatters by 1e-4, so that a few get twice that.
    """
    return 1e-3 if num_outputs >= 4096 else 2e-3


def fp8_comparisons(
    exact: Callable[[Any], Any], dequantized: Callable[[Any], Any], num_outputs: int
) -> tuple[Comparison, ...]:
    """DeepGEMM's criterion against unquantised operands; a sharper one against those given, also for each element."""
    return (
        Comparison("unquantised", exact, diff, fp8_limit(num_outputs)),
        Comparison("dequantised", dequantized, diff, 1e-5),
        Comparison("worst element", dequantized, worst, 1.0),
    )


def diff(x: jax.Array, y: jax.Array) -> jax.Array:
    """DeepGEMM's `calc_diff` on the device: Σ(x - y)² / Σ(x² + y²), which float32 can tell from 0; NaN if x has one."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    size = jnp.sum(x * x) + jnp.sum(y * y)
    return jnp.where(size == 0, jnp.float32(0), jnp.sum((x - y) ** 2) / jnp.where(size == 0, jnp.float32(1), size))


def different_bits(x: QTensor, y: QTensor) -> jax.Array:
    """How many scales and values differ in a bit."""
    scales = (x.scales.view(jnp.uint32) != y.scales.view(jnp.uint32)).sum()
    return (scales + (x.values.view(jnp.uint8) != y.values.view(jnp.uint8)).sum()).astype(jnp.float32)


def worst(x: jax.Array, y: jax.Array) -> jax.Array:
    """max |x - y| / (|y| / 128 + rms / 50), rms of the elements of y that are not 0: one wrong element is above 1.

    bf16 rounds by |y| / 512 at most; Hopper's FP8 tensor cores keep 14 bits within a block of 128, which stays within
    some 0.005 rms.
    """
    if x.size == 0:
        return jnp.zeros((), jnp.float32)
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    rms = jnp.sqrt(jnp.sum(y * y) / jnp.maximum(jnp.sum(y != 0, dtype=jnp.float32), 1.0))
    excess = jnp.abs(x - y) / (jnp.abs(y) / 128 + jnp.maximum(rms / 50, 1e-30))
    return jnp.where(jnp.isnan(excess).any(), jnp.float32(jnp.nan), jnp.max(excess))  # XLA's max may pass over a NaN


def _selected(cases: list[Any], ops: Sequence[str]) -> list[Any]:
    known = list(dict.fromkeys(case.op for case in cases))
    if unknown := [op for op in ops if op not in known]:
        raise ValueError(f"ops {unknown} have no cases; known are {', '.join(known)}.")
    return [case for case in cases if not ops or case.op in ops]


def _offered(module: str, function: str) -> list[Any]:
    offer = getattr(importlib.import_module(module), function, None)
    return offer() if offer else []


def _modules() -> list[str]:
    """dsv3_kernels.<op>.bench of every op folder that has one."""
    folders = [f"dsv3_kernels.{module.name}" for module in pkgutil.iter_modules(dsv3_kernels.__path__) if module.ispkg]
    return [f"{folder}.bench" for folder in sorted(folders) if importlib.util.find_spec(f"{folder}.bench")]
