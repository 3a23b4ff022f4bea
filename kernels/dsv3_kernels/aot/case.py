"""A kernel with one set of tiles, and what its machine code must be like.

A module `dsv3_kernels/<op>/pallas_*.py` that can be called offers `aot_cases() -> list[AotCase]`, one case for each
tile of its tuned table and each kind of input; it is found by its file name. So is a module `program_*.py`, whose
programs call several public ops and are judged as a whole. The same cases are lowered in the tests.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import dsv3_kernels

FP8_MMA = r"QGMMA\.\d+x\d+x32\.F32\.E4M3\.E4M3"
"""Hopper's FP8 tensor cores with sums in float32; an FP8 matmul that is upcast first runs at half the rate."""
BF16_MMA = r"HGMMA\.\d+x\d+x16\.F32\.BF16"
"""Hopper's bf16 tensor cores with sums in float32."""


class AotCase(NamedTuple):
    """One compilation: `jax.jit(function)` of arguments like `args`.

    `must_contain` and `must_not_contain` are regular expressions searched in PTX and in SASS, such as `FP8_MMA`;
    `must_contain` names what the kernel is for, so it is never empty. No case may spill a register.
    """

    name: str
    """The op and its tile, such as "fp8_gemm 128x128x128 s4"; unique over all ops, the first column of the table."""
    function: Callable[..., Any]
    args: tuple[Any, ...]
    """Shapes and dtypes: `jax.ShapeDtypeStruct` or trees of them."""
    must_contain: tuple[str, ...]
    must_not_contain: tuple[str, ...] = ()
    max_shared_bytes: int = 232448
    """227 KiB, all that a block of an H100 can have; less where two blocks must share an SM."""
    expect: Callable[[str], list[str]] | None = None
    """What is wrong with the whole compiled program, given its optimised HLO; `hlo.launches` counts what it starts."""


def collect() -> list[AotCase]:
    """The cases of all `pallas_*` and `program_*` modules in the order of their names. Raises: as `checked`."""
    offered: dict[str, list[AotCase]] = {}
    for name in _modules():
        module = importlib.import_module(name)
        offered.setdefault(name.split(".")[1], []).extend(getattr(module, "aot_cases", list)())
    return checked(offered)


def checked(offered: Mapping[str, list[AotCase]]) -> list[AotCase]:
    """The cases of all ops, given by op folder.

    Raises: ValueError for an op whose Pallas modules offer no case, a case that requires nothing, or a name twice.
    """
    if lacking := [op for op, cases in offered.items() if not cases]:
        raise ValueError(f"ops {lacking} have Pallas modules without cases; write aot_cases() in one of them.")
    cases = [case for each in offered.values() for case in each]
    if careless := [case.name for case in cases if not case.must_contain]:
        raise ValueError(f"cases {careless} require no instruction; state in must_contain what each kernel is for.")
    names = [case.name for case in cases]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"cases {twice} are named twice; the table needs one name a row.")
    return cases


def _modules() -> list[str]:
    """dsv3_kernels.<folder>.pallas_* and program_* of every folder."""
    names = [module.name for module in pkgutil.walk_packages(dsv3_kernels.__path__, "dsv3_kernels.")]
    return sorted(name for name in names if name.rpartition(".")[2].startswith(("pallas_", "program_")))
