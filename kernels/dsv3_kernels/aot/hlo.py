"""What a GPU is given to do by a compiled program, read from XLA's optimised HLO."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

FILE = "program.hlo"
"""The file of XLA's optimised program."""
KERNEL = "kernel"
"""The name of a kernel of this package among launches."""
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.-]+) \(.*\{$", re.MULTILINE)
_ENTERED = re.compile(r"(?:to_apply|body|condition|calls|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
CONTROL = ("call", "while", "conditional")
_FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"
)  # fmt: skip


def launches(hlo: str) -> Counter[str]:
    """How many operations of each kind the program starts: `KERNEL`, "fusion", "custom-call", "copy" and so on.

    What loops and branches hold is counted once. Operations that only name memory start nothing; an asynchronous one
    counts where it starts.
    """
    found: Counter[str] = Counter()
    for line in walk(hlo, into=CONTROL):
        operation = line.opcode
        if operation not in (*CONTROL, *_FREE) and not operation.endswith(("-done", "-update")):
            is_kernel = 'custom_call_target="mosaic_gpu' in line.text
            found[KERNEL if is_kernel else operation.removesuffix("-start")] += 1
    return found


class Line(NamedTuple):
    """An operation that a run of the program reaches."""

    text: str
    opcode: str
    computation: Sequence[str]
    """The lines among which it stands."""
    runs: int
    open_loops: int
    """So many loops around it have trips that are known at run time only: `runs` is for one trip of each."""
    is_conditional: bool


def walk(hlo: str, *, into: Sequence[str]) -> Iterator[Line]:
    """Every operation, in the computations, too, that operations named in `into` enter.

    Others name computations only to reduce, compare or scatter with.
    """
    texts = computations(hlo)
    pending = [("ENTRY", 1, 0, False)]
    while pending:
        name, runs, open_loops, is_conditional = pending.pop()
        lines = texts[name].splitlines()
        for text in lines:
            operation = opcode(text)
            if operation is None:
                continue
            yield Line(text, operation, lines, runs, open_loops, is_conditional)
            if operation in into:
                trips = known_trips(text)
                is_open = operation == "while" and trips is None
                inside = (
                    runs * (1 if trips is None else trips),
                    open_loops + is_open,
                    is_conditional or operation == "conditional",
                )
                pending += [(entered, *inside) for entered in _entered(text)]


def known_trips(text: str) -> int | None:
    """How often a `while` runs its body; None where that depends on data."""
    trips = _TRIPS.search(text)
    return int(trips[1]) if trips else None


def computations(hlo: str) -> dict[str, str]:
    """The instructions of each computation, by its name; those of the whole program by "ENTRY"."""
    heads = list(_COMPUTATION.finditer(hlo))
    if not any(head[1] for head in heads):
        raise ValueError(f"this is no HLO module with an entry: {hlo[:200]!r}")
    return {"ENTRY" if head[1] else head[2]: hlo[head.end() : hlo.index("\n}", head.end())] for head in heads}


def opcode(line: str) -> str | None:
    """The operation of `%name = type operation(...)`, or None where there is none; types may be tuples of types."""
    _, equals, right = line.partition(" = ")
    depth = 0
    for index, letter in enumerate(right):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == " " and depth == 0:
            operation = re.match(r"[\w-]+", right[index + 1 :])
            return operation[0] if equals and operation else None
    return None


def _entered(text: str) -> Iterator[str]:
    yield from _ENTERED.findall(text)
    for names in _BRANCHES.findall(text):
        yield from (name.strip(" %") for name in names.split(","))
