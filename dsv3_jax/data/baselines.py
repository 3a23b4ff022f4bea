"""What general compressors reach on the held-out files: the figures a language model is set beside."""

import gzip
import lzma
from collections.abc import Iterable


def compressor_baselines(texts: Iterable[bytes]) -> dict[str, float]:
    """Bits per byte of `gzip -9` and `xz -9` on each file by itself (sizes summed), and of xz on all joined.

    Sizes are those of the tools' files, headers included (`gzip -n -9`, `xz -9 -T1`).
    """
    files = list(texts)
    num_bytes = sum(len(file) for file in files)
    if not num_bytes:
        raise ValueError("no bytes to compress; give at least one non-empty text.")
    sizes = {
        "gzip -9": sum(len(gzip.compress(file, 9, mtime=0)) for file in files),
        "xz -9": sum(len(lzma.compress(file, preset=9)) for file in files),
        "xz -9 joined": len(lzma.compress(b"".join(files), preset=9)),
    }
    return {name: 8.0 * size / num_bytes for name, size in sizes.items()}
