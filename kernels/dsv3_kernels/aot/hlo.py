"""What a GPU is given to do by a compiled program, read from XLA's optimised HLO."""

import re
from collections import Counter

KERNEL = "kernel"
"""The name of a kernel of this package among launches."""
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.-]+) \(.*\{$", re.MULTILINE)
_CALLED = re.compile(r"(?:to_apply|body|condition|true_computation|false_computation)=%([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONTROL = ("call", "while", "conditional")
_FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"
)  # fmt: skip


def launches(hlo: str) -> Counter[str]:
    """How many operations of each kind the program starts: `KERNEL`, "fusion", "custom-call", "copy" and so on.

    What loops and branches hold is counted once. Operations that only name memory start nothing; an asynchronous one
    counts where it starts.
    """
    texts = computations(hlo)
    found: Counter[str] = Counter()
    pending = ["ENTRY"]
    while pending:
        for line in texts[pending.pop()].splitlines():
            operation = opcode(line)
            if operation in _CONTROL:
                pending += _CALLED.findall(line)
                pending += [name.strip(" %") for names in _BRANCHES.findall(line) for name in names.split(",")]
            elif operation is not None and operation not in _FREE and not operation.endswith(("-done", "-update")):
                is_kernel = 'custom_call_target="mosaic_gpu' in line
                found[KERNEL if is_kernel else operation.removesuffix("-start")] += 1
    return found


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
