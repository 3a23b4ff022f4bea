"""Finds files: folders walked, globs matched, links followed, each file once however it is spelled."""

import dataclasses
import fnmatch
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from dsv3_jax.config.paths import shown

_MAGIC = "*?["
_NUM_EXAMPLES = 3


@dataclasses.dataclass
class Names:
    """How many there are of a kind, and the first few by name."""

    count: int = 0
    examples: list[str] = dataclasses.field(default_factory=list)

    def add(self, path: str) -> None:
        """Counts one more."""
        self.count += 1
        if len(self.examples) < _NUM_EXAMPLES:
            self.examples.append(shown(path))


@dataclasses.dataclass
class Search:
    """What has been found. `left_out[why]` are names, `problems` sentences on what could not be looked into.

    A file is the same under all its names: by its real path, and by its inode where it has several names on the disk
    (hard links). A folder is walked once, so that links may lead in circles.
    """

    is_known: Callable[[Path], bool]
    files: list[Path] = dataclasses.field(default_factory=list)
    left_out: dict[str, Names] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)
    _seen: set[str | tuple[int, int]] = dataclasses.field(default_factory=set)

    def add(self, path: Path) -> bool:
        """Adds a file, or all files of known kinds below a folder; whether there is any, seen before or not."""
        return self._add(str(path), os.path.realpath(path))

    def add_matches(self, pattern: Path) -> bool:
        """`add`s everything that a glob matches; `**` stands for any folders, links to folders included."""
        start, *parts = pattern.parts if pattern.is_absolute() else ("", *pattern.parts)
        return any([self.add(Path(match)) for match in sorted(set(self._matches(start, parts)))])

    def _add(self, path: str, real: str) -> bool:
        found = False
        waiting = [(path, real)]
        while waiting:
            path, real = waiting.pop()
            try:
                status = os.stat(path)
            except OSError as e:
                if self.is_known(Path(path)) or not Path(path).suffix:
                    what = "is a link to nothing" if os.path.islink(path) else f"cannot be read ({e.strerror})"
                    self.problems.append(f"{shown(path)} {what}; correct or remove it")
                else:
                    self._leave_out("files of unknown kinds", path)
                continue
            if stat.S_ISDIR(status.st_mode):
                found |= real in self._seen
                if real not in self._seen:
                    self._seen.add(real)
                    waiting.extend(reversed(list(self._children(path, real))))
            elif not stat.S_ISREG(status.st_mode):
                self._leave_out("pipes, sockets or devices", path)
            elif not self.is_known(Path(path)):
                self._leave_out("files of unknown kinds", path)
            else:
                found = True
                self._add_file(path, real, status)
        return found

    def _add_file(self, path: str, real: str, status: os.stat_result) -> None:
        names: set[str | tuple[int, int]] = {real}
        if status.st_nlink > 1 and status.st_ino:
            names.add((status.st_dev, status.st_ino))
        if names & self._seen:
            self._leave_out("further names of files that are read once", path)
        else:
            self.files.append(Path(path))
        self._seen |= names

    def _children(self, folder: str, real: str) -> Iterator[tuple[str, str]]:
        for name in self._names(folder):
            path, is_link = os.path.join(folder, name), os.path.islink(os.path.join(folder, name))
            if name.startswith(".") or name == "__pycache__":
                self._leave_out("hidden names (a dot in front) or __pycache__", path)
            else:
                yield path, os.path.realpath(path) if is_link else os.path.join(real, name)

    def _names(self, folder: str) -> list[str]:
        try:
            return sorted(os.listdir(folder or "."))
        except NotADirectoryError:
            return []
        except OSError as e:
            self.problems.append(f"folder {shown(folder)} cannot be read ({e.strerror}); correct its permissions")
            return []

    def _matches(self, folder: str, parts: list[str]) -> Iterator[str]:
        if not parts:
            yield folder
            return
        head, *rest = parts
        if head == "**":
            for below in self._folders_below(folder):
                yield from self._matches(below, rest)
        elif any(mark in head for mark in _MAGIC):
            for name in self._names(folder):
                if fnmatch.fnmatchcase(name, head) and (head.startswith(".") or not name.startswith(".")):
                    yield from self._matches(os.path.join(folder, name), rest)
        elif os.path.lexists(os.path.join(folder, head)):
            yield from self._matches(os.path.join(folder, head), rest)

    def _folders_below(self, folder: str) -> Iterator[str]:
        waiting, seen = [folder], set()
        while waiting:
            folder = waiting.pop()
            if os.path.isdir(folder or ".") and os.path.realpath(folder or ".") not in seen:
                seen.add(os.path.realpath(folder or "."))
                yield folder
                names = [name for name in self._names(folder) if not name.startswith(".")]
                waiting.extend(os.path.join(folder, name) for name in reversed(names))

    def _leave_out(self, why: str, path: str) -> None:
        self.left_out.setdefault(why, Names()).add(path)
