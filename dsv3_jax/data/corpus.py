"""Where the text comes from: the standard library's sources, or the user's files, as a stream of documents."""

import contextlib
import dataclasses
import os
import stat
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from dsv3_jax.config.check import UserError
from dsv3_jax.config.data import DataConfig
from dsv3_jax.config.paths import shown, user_path
from dsv3_jax.data import documents
from dsv3_jax.data.documents import BYTE_ORDER_MARK, Document, Rejected
from dsv3_jax.data.json_file import read_json
from dsv3_jax.data.parquet_file import read_parquet
from dsv3_jax.data.search import Names, Search
from dsv3_jax.data.streams import kind_of, open_bytes
from dsv3_jax.data.text_file import read_json_lines, read_text

TEXT_SUFFIXES = frozenset(
    f".{kind}"
    for group in (
        ("txt", "text", "md", "rst", "tex", "html", "css", "xml", "toml", "yaml", "yml", "ini", "cfg", "sql", "proto"),
        ("py", "pyi", "pyx", "jl", "r", "lua", "pl", "rb", "php", "sh", "bash", "js", "jsx", "ts", "tsx"),
        ("c", "h", "cc", "cpp", "cxx", "hpp", "hh", "cu", "cuh", "java", "kt", "scala", "swift", "cs"),
        ("go", "rs", "hs", "ml", "mk", "cmake"),
    )
    for kind in group
)
"""One document a file, whatever the language."""

_RECORD_SUFFIXES = frozenset({".jsonl", ".ndjson", ".json"})
_PARQUET = ".parquet"

_MOST_MESSAGES = 100

_EXCLUDED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})

_KNOWN = "use .txt, .md, source code, .jsonl, .json (each also as .gz or .zst) or .parquet"


@dataclasses.dataclass(frozen=True)
class Listing:
    """The files of a corpus, in reading order. `named` were given by name, not found in a folder or by a glob.

    `left_out[why]`: names that are no files to read. `problems`: what could not be looked into, a sentence each.
    """

    files: tuple[Path, ...]
    named: frozenset[Path]
    left_out: Mapping[str, Names]
    problems: tuple[str, ...]
    root: Path | None

    def name(self, file: Path) -> str:
        """Name of a file in messages and fingerprints."""
        return shown(file.relative_to(self.root).as_posix() if self.root else file)

    @property
    def num_ignored(self) -> int:
        """Names that are left out."""
        return sum(names.count for names in self.left_out.values())


@dataclasses.dataclass
class Tally:
    """What a pass over the corpus left out: documents without text, and what was rejected (the first messages)."""

    num_empty: int = 0
    num_rejected: int = 0
    rejected: list[str] = dataclasses.field(default_factory=list)

    def reject(self, message: str) -> None:
        """Counts one more file, line or row."""
        self.num_rejected += 1
        if len(self.rejected) < _MOST_MESSAGES:
            self.rejected.append(message)


def list_files(cfg: DataConfig) -> Listing:
    """Finds the files of `cfg.paths`, or of the standard library where there are none.

    Links are followed. A file is listed once, under the first of its names.

    Raises:
        UserError: a path does not exist or is no file or folder, holds or matches nothing of a known kind, or a named
            file has an unknown suffix.
    """
    if not cfg.paths:
        return _standard_library()
    search = Search(_is_known)
    named: set[Path] = set()
    for given in cfg.paths:
        path, name = user_path(given), shown(given)
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError) as e:
            if not any(mark in given for mark in "*?["):
                what = "is a link to nothing" if path.is_symlink() else "does not exist"
                raise UserError(f"{name} {what}; give existing files, folders or globs (data.paths).") from e
            if not search.add_matches(path) and not search.problems:
                raise UserError(f"glob {name} matches no file of a known kind; {_KNOWN} (data.paths).") from e
        except OSError as e:
            raise UserError(f"{name} cannot be read ({e.strerror}); correct its permissions (data.paths).") from e
        else:
            if stat.S_ISREG(mode):
                if not _is_known(path):
                    raise UserError(f"{name} has the unknown suffix {path.suffix!r}; {_KNOWN} (data.paths).")
                named.add(path)
            elif not stat.S_ISDIR(mode):
                raise UserError(f"{name} is neither a file nor a folder; {_KNOWN} (data.paths).")
            if not search.add(path) and not search.problems:
                raise UserError(f"folder {name} holds no file of a known kind; {_KNOWN} (data.paths).")
    return Listing(tuple(search.files), frozenset(named), search.left_out, tuple(search.problems), None)


def read(cfg: DataConfig, listing: Listing, tally: Tally) -> Iterator[Document]:
    """Reads every document, in order, counting in `tally` what is left out (of a long file, what follows the fault).

    Texts longer than `documents.LONGEST_DOCUMENT` become several documents, so that memory stays bounded. A byte order
    mark at the start of a text is no part of it.

    Raises:
        UserError: something is not a document and `cfg.on_bad_file` is "error".
    """
    skip = cfg.on_bad_file == "skip" or listing.root is not None

    def reject(message: str) -> None:
        if not skip:
            raise UserError(f"{message} (or leave it out: data.on_bad_file=skip).")
        tally.reject(message)

    for problem in listing.problems:
        reject(problem)
    for file in listing.files:
        name = listing.name(file)
        try:
            if kind_of(file) in TEXT_SUFFIXES:
                yield from _whole_file(file, name, file in listing.named, reject, tally)
            else:
                yield from _records(file, name, cfg.text_field, reject, tally)
        except OSError as e:
            reject(f"{shown(file)} cannot be read ({e.strerror or e}); correct the file or its permissions")
        except Rejected as e:
            reject(str(e))


def _whole_file(
    file: Path, name: str, is_named: bool, reject: Callable[[str], None], tally: Tally
) -> Iterator[Document]:
    is_empty = True
    with open_bytes(file) as stream:
        for text in read_text(stream, shown(file)):
            is_empty = False
            yield Document(name, text)
    if is_empty and is_named:
        reject(f"{shown(file)} is empty; remove it from data.paths")
    elif is_empty:
        tally.num_empty += 1


def _records(file: Path, name: str, field: str, reject: Callable[[str], None], tally: Tally) -> Iterator[Document]:
    with contextlib.ExitStack() as opened:
        if kind_of(file) == _PARQUET:
            texts = read_parquet(file, field, reject)
        elif kind_of(file) == ".json":
            texts = read_json(opened.enter_context(open_bytes(file)), shown(file), field, reject)
        else:
            texts = read_json_lines(opened.enter_context(open_bytes(file)), shown(file), field, reject)
        for number, text in texts:
            text = text.removeprefix(BYTE_ORDER_MARK)
            if not text:
                tally.num_empty += 1
            yield from (Document(f"{name}:{number}", piece) for piece in documents.pieces(text))


def _standard_library() -> Listing:
    root = Path(sysconfig.get_path("stdlib"))
    problems: list[str] = []
    found = []
    for place, folders, names in os.walk(root, onerror=lambda e: problems.append(f"folder {e.filename}: {e.strerror}")):
        folders[:] = [name for name in folders if name not in _EXCLUDED_FOLDERS and not name.startswith(".")]
        found += [Path(place) / name for name in names if name.endswith(".py") and not name.startswith(".")]
    if not found:
        raise UserError(
            f"this Python has no standard library sources in {root}, the default corpus; give your own (data.paths)."
        )
    files = sorted(found, key=lambda file: file.relative_to(root).as_posix())
    return Listing(tuple(files), frozenset(), {}, tuple(problems), root)


def _is_known(file: Path) -> bool:
    kind = kind_of(file)
    return kind in TEXT_SUFFIXES or kind in _RECORD_SUFFIXES or (kind == _PARQUET and kind == file.suffix.lower())
