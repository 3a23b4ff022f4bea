"""Files that are replaced whole or not at all."""

import os
from pathlib import Path


def replace_file(path: Path, text: str) -> None:
    """Writes `text` to `path`, on the disk before this returns; killed anywhere, the old content is still there.

    A link is followed: what it points to is replaced.

    Raises:
        OSError: it cannot be written.
    """
    target = path.resolve()
    partial = target.with_name(target.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(target)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
