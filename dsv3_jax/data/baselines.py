"""What general compressors reach on held-out documents: the figures a language model is set beside."""

import gzip
import lzma
from collections.abc import Sequence

import numpy as np

_MOST_DOCUMENTS = 2_000
_MOST_BYTES = 2**23


def compressor_baselines(texts: Sequence[bytes]) -> dict[str, float]:
    """Bits per byte of `gzip -9` and `xz -9` on each document by itself (sizes summed), and of xz on all joined.

    Sizes are those of the tools' files, headers included (`gzip -n -9`, `xz -9 -T1`). At most 2,000 documents or
    8 MiB are compressed, a few seconds; where there are more, these are drawn by a fixed rule, and the names say so.

    Raises:
        ValueError: there is nothing to compress.
    """
    sample = _sample(texts)
    num_bytes = sum(len(text) for text in sample)
    if not num_bytes:
        raise ValueError("no bytes to compress; give at least one non-empty text.")
    note = "" if len(sample) == len(texts) else f", {len(sample):,} of {len(texts):,} documents"
    sizes = {
        f"gzip -9{note}": sum(len(gzip.compress(text, 9, mtime=0)) for text in sample),
        f"xz -9{note}": sum(_xz_size(text) for text in sample),
        f"xz -9{note} joined": _xz_size(b"".join(sample)),
    }
    return {name: 8.0 * size / num_bytes for name, size in sizes.items()}


def _sample(texts: Sequence[bytes]) -> list[bytes]:
    """Documents in an order that depends on their number alone, until there are enough; then in their own order."""
    chosen: dict[int, bytes] = {}
    num_bytes = 0
    for i in np.random.default_rng(0).permutation(len(texts))[:_MOST_DOCUMENTS]:
        text = texts[int(i)]
        num_bytes += len(text)
        if chosen and num_bytes > _MOST_BYTES:
            break
        chosen[int(i)] = text
    return [chosen[i] for i in sorted(chosen)]


def _xz_size(text: bytes) -> int:
    """Size of `xz -9`'s file. A dictionary no larger than the text finds as much as its 64 MiB, and is soon set up."""
    chain = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": max(4096, len(text))}]
    return len(lzma.compress(text, filters=chain))
