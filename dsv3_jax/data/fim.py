"""Fill-in-the-middle: a document rearranged so that its middle comes last (report section 4.1, PSM form)."""

import dataclasses

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class FimIds:
    """Ids of the three tokens that mark prefix, hole and middle."""

    begin: int
    hole: int
    end: int


def split(text: str, rng: np.random.Generator) -> tuple[str, str, str]:
    """Cuts a document at two characters drawn uniformly: prefix, middle, suffix, any of them possibly empty."""
    first, second = sorted(int(cut) for cut in rng.integers(0, len(text) + 1, size=2))
    return text[:first], text[first:second], text[second:]


def assemble(
    prefix: Int[np.ndarray, "_"], middle: Int[np.ndarray, "_"], suffix: Int[np.ndarray, "_"], *, ids: FimIds
) -> Int[np.ndarray, "N"]:
    """Joins the parts as `<|fim_begin|>prefix<|fim_hole|>suffix<|fim_end|>middle`."""
    return np.concatenate([[ids.begin], prefix, [ids.hole], suffix, [ids.end], middle]).astype(np.int32)


def disassemble(
    tokens: Int[np.ndarray, "N"], *, ids: FimIds
) -> tuple[Int[np.ndarray, "_"], Int[np.ndarray, "_"], Int[np.ndarray, "_"]]:
    """Inverse of `assemble`: prefix, middle, suffix.

    Raises:
        ValueError: the three marks are not each there once, in order, the first one in front.
    """
    marks = [np.flatnonzero(tokens == mark) for mark in (ids.begin, ids.hole, ids.end)]
    if [len(found) for found in marks] != [1, 1, 1] or not 0 == marks[0][0] < marks[1][0] < marks[2][0]:
        places = [found.tolist() for found in marks]
        raise ValueError(
            f"marks at {places} are not a document in PSM form; begin, hole and end must each occur once, in this "
            "order, begin at 0 (strip bos and eos first)."
        )
    hole, end = int(marks[1][0]), int(marks[2][0])
    return tokens[1:hole], tokens[end + 1 :], tokens[hole + 1 : end]
