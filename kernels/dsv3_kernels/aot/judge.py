"""What a compiled case costs, and what is wrong with it."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from dsv3_kernels.aot import descriptor, hlo, mlir, registers, sass
from dsv3_kernels.aot.case import AotCase


class Cost(NamedTuple):
    """Of a case with several kernels: the most registers and shared memory, all spills, the loop that works most."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    loop: Counter[str] | None
    """Opcodes of the innermost loop that holds the first required instruction, or None without such a loop."""
    kernel: Counter[str]
    """Opcodes of everything."""


def read_cost(case: AotCase, dump: Mapping[str, str]) -> Cost:
    """Reads what Mosaic, ptxas and nvdisasm wrote.

    Args:
        dump: text by file name: <kernel>.ptx, .ptxas, .sass_ctrl and .mlir-passes.log (its first module) for each
            kernel, and the program's HLO.
    Raises: ValueError where a report is missing or cannot be read.
    """
    kernels = _kernels(dump)
    if not kernels:
        raise ValueError("no Mosaic kernel was compiled; does the function call plgpu.kernel?")
    if lacking := [kernel for kernel in kernels if not dump.get(f"{kernel}.sass_ctrl", "").strip()]:
        raise ValueError(f"there is no SASS of {lacking}; is pip's nvidia-cuda-nvdisasm installed?")
    resources = [sass.parse_resources(dump[f"{kernel}.ptxas"]) for kernel in kernels]
    blocks = [sass.parse_blocks(dump[f"{kernel}.sass_ctrl"]) for kernel in kernels]
    loops = [loop for each in blocks if (loop := sass.innermost_loop(each, case.must_contain[0])) is not None]
    everything = [instruction for each in blocks for block in each for instruction in block.instructions]
    return Cost(
        registers=max(each.registers for each in resources),
        spill_bytes=sum(each.spill_bytes for each in resources),
        shared_bytes=max(mlir.parse_shared_bytes(dump[f"{kernel}{mlir.SUFFIX}"]) for kernel in kernels),
        loop=sass.count(max(loops, key=len)) if loops else None,
        kernel=sass.count(everything),
    )


def find_faults(case: AotCase, cost: Cost, dump: Mapping[str, str]) -> list[str]:
    """What makes the case fail, each with what to do; empty if it is good.

    Raises: ValueError where a report cannot be read.
    """
    code = "\n".join(text for name, text in dump.items() if name.endswith((".ptx", ".sass_ctrl")))
    faults = []
    if cost.spill_bytes:
        faults.append(f"spills {cost.spill_bytes} bytes of registers; take smaller tiles or more warpgroups")
    if cost.shared_bytes > case.max_shared_bytes:
        faults.append(f"takes {cost.shared_bytes} B of shared memory, over {case.max_shared_bytes}; take fewer stages")
    faults += [f"has no {pattern} in PTX or SASS" for pattern in case.must_contain if not re.search(pattern, code)]
    found = [re.search(pattern, code) for pattern in case.must_not_contain]
    faults += [f"has {each.group()} in PTX or SASS" for each in found if each]
    faults += [fault for kernel in _kernels(dump) for fault in _find_compiler_faults(kernel, dump)]
    return faults + (case.expect(dump[hlo.FILE]) if case.expect else [])


def _find_compiler_faults(kernel: str, dump: Mapping[str, str]) -> list[str]:
    """What ptxas warns of, registers beyond those granted, descriptors that the driver would refuse."""
    resources = sass.parse_resources(dump[f"{kernel}.ptxas"])
    descriptors = mlir.parse_descriptors(dump[f"{kernel}{mlir.SUFFIX}"])
    if not descriptors and re.search(r"\bUTMA(LDG|STG|REDG)", dump[f"{kernel}.sass_ctrl"]):
        raise ValueError(f"{kernel} copies by TMA, but no descriptor was found in Mosaic's MLIR; has jax changed it?")
    return [
        *(f"loses performance: ptxas says that {loss}" for loss in resources.losses),
        *registers.find_faults(sass.parse_blocks(dump[f"{kernel}.sass_ctrl"]), resources.registers),
        *(f"has {rule}" for each in descriptors for rule in descriptor.broken_rules(each)),
    ]


def _kernels(dump: Mapping[str, str]) -> list[str]:
    return sorted(name.removesuffix(".ptxas") for name in dump if name.endswith(".ptxas"))
