"""A folder that appears under its name whole or not at all.

It is filled under a hidden name beside, `.NAME.partial-*`, fsynced, then renamed; what was there is moved aside first,
as `.NAME.old-*`. A folder that cannot be renamed (a mount point, the current folder) stays in place and gets new
contents. A process that was killed leaves those hidden folders; nothing reads them.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from dsv3_jax.config.check import check
from dsv3_jax.config.paths import user_path
from dsv3_jax.interop.safetensors_io import CheckpointError

FIRST = "config.json"
"""Leaves first and comes last when contents are exchanged: without it a folder is refused, not misread."""

PARTIAL, OLD = ".partial-", ".old-"


def resolve(folder: str | Path) -> Path:
    """The absolute path that a name stands for: `~` expanded, links followed, also those to nothing yet.

    Raises: `ConfigError` for an empty name, and for what no folder can be called.
    """
    name = os.fspath(folder)
    check("\0" not in name, f"{name!r} cannot be the name of a folder; leave out the zero byte.")
    given = user_path(name)
    try:
        path = Path(os.path.realpath(given))
        is_link = path.is_symlink()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name!r}: cannot be looked at ({error}); choose another folder.") from error
    check(not is_link, f"{folder}: is a link that leads back to itself; remove it, or choose another folder.")
    return path


@contextlib.contextmanager
def replaced(folder: Path, *, size: int, is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Gives an empty folder to fill; when the block ends without an error, it takes the place of `folder`.

    Args:
        folder: as `resolve` gives it. What it holds is deleted once the new contents are in place.
        size: bytes that will be written; asked of the disk before.
        is_ours: tells whether a hidden folder beside was left by an earlier call, for the message on a full disk.
    Raises: `CheckpointError` when the disk is full or refuses, naming what killed calls left. After any error nothing
        of the new contents is left, and what was there is.
    """
    stays = _must_stay(folder)
    beside = folder if stays else folder.parent
    made = [parent for parent in (beside, *beside.parents) if not os.path.lexists(parent)]
    try:
        beside.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=_hidden(folder, PARTIAL), dir=beside))
    except (OSError, ValueError) as error:
        _remove_empty(made)
        raise CheckpointError(f"{folder}: cannot be made ({_reason(error)}); choose another folder.") from error
    try:
        free = shutil.disk_usage(beside).free
        if size > free:
            raise CheckpointError(
                f"{folder}: the export needs {size:,} bytes, but {free:,} are free on that disk; "
                f"free some space or choose another disk{_left_over(beside, partial, is_ours)}."
            )
        yield partial
        partial.chmod(0o777 & ~_umask())
        _sync(partial)
        if stays:
            _exchange_contents(partial, folder)
        else:
            _rename(partial, folder)
        made = []
    except OSError as error:
        raise CheckpointError(
            f"{folder}: writing failed ({_reason(error)}); the export needs {size:,} bytes, "
            f"{shutil.disk_usage(beside).free:,} are free. Free some space or choose another disk; nothing of the "
            f"export was left{_left_over(beside, partial, is_ours)}."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _remove_empty(made)


def write_bytes(file: Path, data: bytes) -> None:
    """Writes a small file, in a folder of its own if its name says so, and fsyncs it."""
    file.parent.mkdir(exist_ok=True)
    with file.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _must_stay(folder: Path) -> bool:
    """Whether renaming would fail, or leave the user's shell in a folder that is gone."""
    return folder.is_dir() and (os.path.ismount(folder) or folder.samefile(os.curdir))


def _hidden(folder: Path, kind: str) -> str:
    """The beginning of a hidden name; short, as names end at 255 bytes."""
    return f".{os.fsdecode(os.fsencode(folder.name)[:200])}{kind}"


def _rename(partial: Path, folder: Path) -> None:
    if not folder.exists():
        partial.rename(folder)
    else:
        aside = partial.with_name(OLD.join(partial.name.rsplit(PARTIAL, 1)))
        folder.rename(aside)
        try:
            partial.rename(folder)
        except BaseException:
            aside.rename(folder)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    _sync_names(folder.parent)


def _exchange_contents(partial: Path, folder: Path) -> None:
    aside = Path(tempfile.mkdtemp(prefix=_hidden(folder, OLD), dir=folder))
    old = sorted(set(folder.iterdir()) - {partial, aside}, key=lambda path: path.name != FIRST)
    new = sorted(partial.iterdir(), key=lambda path: path.name == FIRST)
    moves = [*((path, aside / path.name) for path in old), *((path, folder / path.name) for path in new)]
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            source.rename(target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            target.rename(source)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)
    _sync_names(folder)


def _left_over(beside: Path, partial: Path, is_ours: Callable[[Path], bool]) -> str:
    """What earlier calls that were killed left there, for the end of a sentence; empty when there is nothing."""
    with contextlib.suppress(OSError):
        found = [
            f"{path} ({sum(file.stat().st_size for file in path.iterdir()):,} bytes)"
            for path in sorted(beside.iterdir())
            if path.name.startswith(".")
            and (PARTIAL in path.name or OLD in path.name)
            and path != partial
            and path.is_dir()
            and is_ours(path)
        ]
        if found:
            return f"; exports that were killed left {', '.join(found)}: delete what no running export is writing"
    return ""


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_names(folder: Path) -> None:
    """Brings the renames to the disk; all is in place already, so a refusal is no failure."""
    with contextlib.suppress(OSError):
        _sync(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
