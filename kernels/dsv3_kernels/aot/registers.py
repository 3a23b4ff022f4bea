"""The registers that each role of a kernel touches, against what setmaxnreg grants it.

A warpgroup owns the registers of the launch until it runs setmaxnreg (USETMAXREG), then as many as that grants. A
register beyond them is another warpgroup's: the kernel computes nonsense or faults.
"""

import re
from collections.abc import Iterator

from dsv3_kernels.aot.sass import Block, Instruction

_GRANT = re.compile(r"USETMAXREG\S* .*?(0x[0-9a-f]+)$")
_REGISTER = re.compile(r"\bR(\d+)(\.64)?")
_MMA = re.compile(r"[HQIB]GMMA\.64x(\d+)x")


def find_faults(blocks: list[Block], launched: int) -> list[str]:
    """One sentence for each role that touches a register it does not own.

    Args:
        launched: registers a thread has at the launch, "Used ... registers" of ptxas.
    """
    roles = [(f"the {launched} of the launch", launched, 0, 0)]
    for index, block in enumerate(blocks):
        for position, instruction in enumerate(block.instructions):
            if grant := _GRANT.match(instruction.text):
                roles.append((f"setmaxnreg {int(grant[1], 16)}", int(grant[1], 16), index, position + 1))
    faults = []
    for grant, registers, index, position in roles:
        touched = max(_role(blocks, index, position), key=highest_register, default=None)
        if touched is not None and (highest := highest_register(touched)) >= registers:
            faults.append(
                f"touches R{highest} after {grant}, which ends at R{registers - 1} ({touched.text.strip()}); grant "
                "more or take smaller tiles"
            )
    return faults


def highest_register(instruction: Instruction) -> int:
    """The last register that an instruction reads or writes, -1 for none; its operands may be several in a row."""
    highest = -1
    for number, operand in enumerate(re.split(r",(?![^\[]*\])", instruction.text[len(instruction.opcode) :])):
        for register, is_pair in _REGISTER.findall(operand):
            is_address = "[" in operand
            width = 2 if is_pair else 1 if is_address else _width(instruction.opcode, number)
            highest = max(highest, int(register) + width - 1)
    return highest


def _role(blocks: list[Block], index: int, position: int) -> Iterator[Instruction]:
    """What may run from an instruction on until a USETMAXREG, calls included."""
    seen = {(index, position)}
    pending = [(index, position)]
    while pending:
        index, position = pending.pop()
        for instruction in blocks[index].instructions[position:]:
            if _GRANT.match(instruction.text) and not instruction.is_predicated:
                break
            yield instruction
        else:
            following = {(other, 0) for other in (*blocks[index].successors, *blocks[index].callees)}
            pending += following - seen
            seen |= following


def _width(opcode: str, operand: int) -> int:
    """How many registers the operand of this index takes, if it is a register and no address."""
    name, *modifiers = opcode.split(".")
    if mma := _MMA.match(opcode):
        return 4 if operand == 1 else int(mma[1]) // (2 if {"F32", "S32"} & set(modifiers) else 4)
    if name in ("LDSM", "STSM"):
        return int(modifiers[-1]) if modifiers[-1].isdigit() else 1
    if name.startswith(("LD", "ST", "ATOM", "RED")):
        return 4 if "128" in modifiers else 2 if "64" in modifiers else 1
    if "WIDE" in modifiers:
        return 2 if operand in (0, 3) else 1
    return 2 if name in ("DADD", "DMUL", "DFMA", "DSETP") or (name == "CS2R" and "32" not in modifiers) else 1
