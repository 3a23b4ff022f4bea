"""What nvdisasm and ptxas say about a kernel: resources, instructions, loops.

A loop is a natural loop of the control flow graph: a branch back to a block that dominates it. A wait on a barrier
has its slow path at the end of the kernel, from where it branches back, so that looking for branches to a smaller
address would find loops that are none.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

_LABEL = re.compile(r"^([.$][\w.$]+):")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[T\d]+)\s+)?([A-Z][\w.]*)([^;/]*)")
_TARGET = re.compile(r"`\(([.$][\w.$]+)\)")


class Instruction(NamedTuple):
    """One line of SASS; `target` is the label a branch goes to for good."""

    opcode: str
    is_predicated: bool
    target: str | None
    text: str


class Block(NamedTuple):
    """Instructions that run one after another, and the blocks that may come next."""

    instructions: tuple[Instruction, ...]
    successors: tuple[int, ...]
    callees: tuple[int, ...]
    """Where what it calls begins, as a division does; it comes back."""


class Resources(NamedTuple):
    """What ptxas -v reports of one kernel."""

    registers: int
    spill_bytes: int
    stack_bytes: int
    losses: tuple[str, ...]
    """What ptxas calls a potential loss of performance, such as matmuls that it serialises."""


def parse_resources(ptxas: str) -> Resources:
    """Registers a thread, spilled bytes (stores and loads), stack frame, warnings of lost performance.

    Raises: ValueError if the text is not what `ptxas -v` prints.
    """
    registers = re.findall(r"Used (\d+) registers", ptxas)
    stack = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", ptxas)
    if not registers or not stack:
        raise ValueError(f"this is no report of ptxas -v: {ptxas[:200]!r}")
    return Resources(
        registers=max(map(int, registers)),
        spill_bytes=sum(int(stores) + int(loads) for _, stores, loads in stack),
        stack_bytes=sum(int(frame) for frame, _, _ in stack),
        losses=tuple(re.findall(r"Potential Performance Loss: (.*)", ptxas)),
    )


def parse_blocks(sass: str) -> list[Block]:
    """The basic blocks of one kernel in the order of their addresses; `sass` with or without control codes."""
    groups: list[list[Instruction]] = [[]]
    start_of: dict[str, int] = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            if groups[-1]:
                groups.append([])
            start_of[label[1]] = len(groups) - 1
        elif found := _INSTRUCTION.search(line):
            _, predicate, opcode, operands = found.groups()
            comes_back = opcode.startswith(("CALL", "LEPC"))
            target = None if comes_back else _TARGET.search(operands)
            is_predicated = predicate is not None and predicate not in ("PT", "UPT")
            text = opcode + operands.rstrip()
            groups[-1].append(Instruction(opcode, is_predicated, target[1] if target else None, text))
            if target or _stops(opcode):
                groups.append([])
    blocks = []
    for index, group in enumerate(groups):
        following = [] if index + 1 == len(groups) else [index + 1]
        if group and group[-1].target:
            successors = [start_of[group[-1].target], *([] if _is_jump(group[-1]) else following)]
        elif group and _stops(group[-1].opcode) and not group[-1].is_predicated:
            successors = []
        else:
            successors = following
        calls = [_TARGET.search(instruction.text) for instruction in group if instruction.opcode.startswith("CALL")]
        callees = [start_of[call[1]] for call in calls if call and call[1] in start_of]
        blocks.append(Block(tuple(group), tuple(successors), tuple(callees)))
    return blocks


def innermost_loop(blocks: list[Block], pattern: str) -> list[Instruction] | None:
    """The instructions of the innermost loop that has most matches of `pattern`; None if no loop has one.

    Of loops with equally many, such as those of two consumers, the shortest.
    """
    holding = [loop for loop in natural_loops(blocks) if _matches(blocks, loop, pattern)]
    innermost = [loop for loop in holding if not any(other < loop for other in holding)]
    if not innermost:
        return None
    best = max(innermost, key=lambda loop: (_matches(blocks, loop, pattern), -_length(blocks, loop)))
    return [instruction for index in sorted(best) for instruction in blocks[index].instructions]


def natural_loops(blocks: list[Block]) -> list[frozenset[int]]:
    """The sets of blocks that form loops, one for each header; block 0 is the entry."""
    predecessors: list[list[int]] = [[] for _ in blocks]
    for index, block in enumerate(blocks):
        for successor in block.successors:
            predecessors[successor].append(index)
    dominators = _dominators(blocks, predecessors)
    loops: dict[int, set[int]] = {}
    for index, block in enumerate(blocks):
        for header in block.successors:
            if header in dominators[index]:
                body = loops.setdefault(header, {header})
                pending = [index]
                while pending:
                    inside = pending.pop()
                    if inside not in body:
                        body.add(inside)
                        pending += predecessors[inside]
    return [frozenset(body) for body in loops.values()]


def count(instructions: Sequence[Instruction]) -> Counter[str]:
    """How often each opcode is there, without its modifiers: LDS.128 counts as LDS."""
    return Counter(instruction.opcode.split(".")[0] for instruction in instructions)


def _is_jump(branch: Instruction) -> bool:
    """Whether the branch is always taken; others have a predicate before or among the operands."""
    return not branch.is_predicated and branch.text.replace(" ", "") == f"{branch.opcode}`({branch.target})"


def _stops(opcode: str) -> bool:
    return opcode.split(".")[0] in ("EXIT", "RET", "BRX", "JMX")


def _dominators(blocks: list[Block], predecessors: list[list[int]]) -> list[set[int]]:
    """For each block the blocks that every path from the entry passes; empty where no path leads."""
    everything = set(range(len(blocks)))
    dominators = [{0}, *(set(everything) for _ in blocks[1:])]
    reached = {0}
    pending = [0]
    while pending:
        for successor in blocks[pending.pop()].successors:
            if successor not in reached:
                reached.add(successor)
                pending.append(successor)
    has_changed = True
    while has_changed:
        has_changed = False
        for index in sorted(reached - {0}):
            known = [dominators[before] for before in predecessors[index] if before in reached]
            found = {index} | set.intersection(*known)
            has_changed |= found != dominators[index]
            dominators[index] = found
    return [dominators[index] if index in reached else set() for index in range(len(blocks))]


def _matches(blocks: list[Block], loop: frozenset[int], pattern: str) -> int:
    return sum(bool(re.search(pattern, instruction.text)) for i in loop for instruction in blocks[i].instructions)


def _length(blocks: list[Block], loop: frozenset[int]) -> int:
    return sum(len(blocks[index].instructions) for index in loop)
