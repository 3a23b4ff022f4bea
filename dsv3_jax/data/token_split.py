"""Tokens that join a mark with a line break, split at random (report section 4.1).

A prompt often ends between the two, where a model that only ever saw them joined has nothing likely to say.
"""

import numpy as np
from jaxtyping import Int


def split_at_line_breaks(
    tokens: Int[np.ndarray, "N"], halves: Int[np.ndarray, "V 2"], *, rate: float, rng: np.random.Generator
) -> Int[np.ndarray, "_"]:
    """Replaces a share `rate` of the tokens that can be split by their two halves; the text stays the same.

    `halves[i]` are the two tokens that spell token i, -1 where it stays whole (`TextTokenizer.line_break_halves`).
    """
    where = np.flatnonzero((halves[tokens, 0] >= 0) & (rng.random(len(tokens)) < rate))
    second = halves[tokens[where], 1]
    first = tokens.copy()
    first[where] = halves[tokens[where], 0]
    return np.insert(first, where + 1, second)
