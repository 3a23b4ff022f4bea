"""Which documents are held out: a rule on the hash of their content."""

import dataclasses
import hashlib

import numpy as np
from jaxtyping import UInt64


@dataclasses.dataclass(frozen=True)
class Split:
    """Documents whose hash lies below `threshold` are held out; with `tail_fraction`, instead, the end of each."""

    threshold: int
    tail_fraction: float | None = None

    def parts(self, text: str) -> tuple[str, str]:
        """Training part and held-out part of a document; one of them is empty unless ends are held out."""
        if self.tail_fraction is None:
            return ("", text) if content_hash(text) < self.threshold else (text, "")
        cut = _cut_near(text, 1.0 - self.tail_fraction)
        return text[:cut], text[cut:]


def content_hash(text: str) -> int:
    """The first 64 bits of the SHA-256 of the UTF-8 bytes: equal files are never on both sides."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def plan(hashes: UInt64[np.ndarray, "_"], fraction: float) -> Split:
    """Chooses the rule so that both sides have a document.

    Normally the threshold is `fraction` of the hash range: it does not depend on which other documents there are.
    Where that leaves a side empty (few documents), the last `fraction` of every document is held out instead.
    """
    threshold = int(fraction * 2**64)
    num_heldout = int((hashes < np.uint64(threshold)).sum())
    if 0 < num_heldout < len(hashes):
        return Split(threshold)
    return Split(threshold=0, tail_fraction=fraction)


def _cut_near(text: str, share: float) -> int:
    cut = min(len(text) - 1, max(1, round(len(text) * share)))
    after = text.find("\n", cut - 1) + 1
    before = text.rfind("\n", 0, cut) + 1
    if 0 < after < len(text) and (after - cut <= cut - before or before == 0):
        return after
    return before or cut
