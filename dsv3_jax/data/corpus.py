"""Where the text comes from: the standard library's sources, or the user's files, as a stream of documents."""

import dataclasses
import glob
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from dsv3_jax.config.check import UserError
from dsv3_jax.config.data import DataConfig
from dsv3_jax.config.paths import user_path

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

LONGEST_DOCUMENT = 2**20
"""Bytes (characters in a line or row) after which a text is cut at the next line break into further documents."""

_EXCLUDED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


class Document(NamedTuple):
    """One text, named after its file (and line or row)."""

    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class Listing:
    """The files of a corpus, in reading order. `named` were given by name, not found in a folder or by a glob."""

    files: tuple[Path, ...]
    named: frozenset[Path]
    num_ignored: int
    root: Path | None

    def name(self, file: Path) -> str:
        """Name of a file in messages and fingerprints."""
        return file.relative_to(self.root).as_posix() if self.root else str(file)


class Rejected(Exception):
    """A file, line or row that cannot become a document; the message says which, and why."""


@dataclasses.dataclass
class Tally:
    """What a pass over the corpus left out: `num_empty` documents without text, `rejected` messages."""

    num_empty: int = 0
    rejected: list[str] = dataclasses.field(default_factory=list)


def list_files(cfg: DataConfig) -> Listing:
    """Finds the files of `cfg.paths`, or of the standard library where there are none.

    Raises:
        UserError: a path does not exist, a glob finds nothing, or a named file has an unknown suffix.
    """
    if not cfg.paths:
        return _standard_library()
    files: dict[Path, None] = {}
    named: set[Path] = set()
    num_ignored = 0
    for given in cfg.paths:
        path = user_path(given)
        if path.is_dir():
            found, ignored = _walk(path)
            num_ignored += ignored
            if not found:
                raise UserError(f"folder {given} holds no file of a known kind; {_known()} (data.paths).")
        elif path.exists():
            if not _is_known(path):
                raise UserError(f"{given} has the unknown suffix {path.suffix!r}; {_known()} (data.paths).")
            found = [path]
            named.add(path)
        elif any(mark in given for mark in "*?["):
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
            found = [match for match in matches if match.is_file() and _is_known(match)]
            num_ignored += sum(match.is_file() for match in matches) - len(found)
            if not found:
                raise UserError(f"glob {given} matches no file of a known kind; {_known()} (data.paths).")
        else:
            raise UserError(f"{given} does not exist; give existing files, folders or globs (data.paths).")
        files.update(dict.fromkeys(found))
    return Listing(tuple(files), frozenset(named), num_ignored, None)


def read(cfg: DataConfig, listing: Listing, tally: Tally) -> Iterator[Document]:
    """Reads every document, in order, counting in `tally` what is left out (of a long file, what follows the fault).

    Texts longer than `LONGEST_DOCUMENT` become several documents, so that memory stays bounded.

    Raises:
        UserError: something is not a document and `cfg.on_bad_file` is "error".
    """
    skip = cfg.on_bad_file == "skip" or listing.root is not None

    def reject(message: str) -> None:
        if not skip:
            raise UserError(f"{message} (or leave it out: data.on_bad_file=skip).")
        tally.rejected.append(message)

    for file in listing.files:
        try:
            if file.suffix.lower() == ".jsonl":
                yield from _read_jsonl(file, cfg.text_field, reject, tally)
            elif file.suffix.lower() == ".parquet":
                yield from _read_parquet(file, cfg.text_field, reject, tally)
            else:
                if file.stat().st_size:
                    yield from (Document(listing.name(file), text) for text in _read_text(file))
                elif file in listing.named:
                    reject(f"{file} is empty; remove it from data.paths")
                else:
                    tally.num_empty += 1
        except OSError as e:
            reject(f"{file} cannot be read ({e.strerror or e}); mend the file or its permissions")
        except Rejected as e:
            reject(str(e))


def _standard_library() -> Listing:
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        (Path(folder) / name for folder, name in _files_below(root, _EXCLUDED_FOLDERS) if name.endswith(".py")),
        key=lambda file: file.relative_to(root).as_posix(),
    )
    if not files:
        raise UserError(
            f"this Python keeps no standard library sources in {root}, the default corpus; give your own (data.paths)."
        )
    return Listing(tuple(files), frozenset(), 0, root)


def _walk(folder: Path) -> tuple[list[Path], int]:
    files = sorted(Path(place) / name for place, name in _files_below(folder, frozenset({"__pycache__"})))
    known = [file for file in files if _is_known(file)]
    return known, len(files) - len(known)


def _files_below(root: Path, excluded: frozenset[str]) -> Iterator[tuple[str, str]]:
    for place, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in excluded and not name.startswith(".")]
        yield from ((place, name) for name in names if not name.startswith("."))


def _is_known(file: Path) -> bool:
    return file.suffix.lower() in (*TEXT_SUFFIXES, ".jsonl", ".parquet")


def _known() -> str:
    return "use .txt, .md, source code, .jsonl or .parquet"


def _decode(data: bytes, file: Path, first_line: int = 1) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        line = first_line + data.count(b"\n", 0, e.start)
        raise Rejected(
            f"{file}, line {line}: byte 0x{data[e.start]:02x} at {e.start} is not UTF-8; convert the file to UTF-8"
        ) from e


def _read_text(file: Path) -> Iterator[str]:
    line = 1
    with file.open("rb") as source:
        while part := source.read(LONGEST_DOCUMENT):
            part += source.readline(LONGEST_DOCUMENT)
            for _ in range(3):  # an endless line may have been cut inside a character
                part += source.read(1) if source.peek(1)[:1] and source.peek(1)[0] & 0xC0 == 0x80 else b""
            yield _decode(part, file, line)
            line += part.count(b"\n")


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = (
            text.find("\n", start + LONGEST_DOCUMENT, start + 2 * LONGEST_DOCUMENT) + 1 or start + LONGEST_DOCUMENT * 2
        )
        yield text[start:end]
        start = end


def _read_jsonl(file: Path, field: str, reject: Callable[[str], None], tally: Tally) -> Iterator[Document]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = _field_of_line(_decode(line, file, number), field, f"{file}, line {number}")
            except Rejected as e:
                reject(str(e))
                continue
            if text:
                yield from (Document(f"{file}:{number}", piece) for piece in _pieces(text))
            else:
                tally.num_empty += 1


def _field_of_line(line: str, field: str, name: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise Rejected(f"{name}: not JSON ({e}); put one JSON object on each line") from e
    if not isinstance(record, dict) or field not in record:
        fields = ", ".join(sorted(record)[:8]) if isinstance(record, dict) else f"a {type(record).__name__}"
        raise Rejected(f"{name}: no field {field!r} (found: {fields}); set data.text_field to the field with the text")
    return _checked_text(record[field], field, name)


def _read_parquet(file: Path, field: str, reject: Callable[[str], None], tally: Tally) -> Iterator[Document]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as e:
        raise UserError(f"{file} needs pyarrow to be read; pip install pyarrow, or convert the file to .jsonl.") from e
    try:
        with parquet.ParquetFile(file) as table:
            columns = table.schema_arrow.names
            if field not in columns:
                found = ", ".join(columns[:8])
                raise Rejected(f"{file}: no column {field!r} (found: {found}); set data.text_field to one of them")
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    try:
                        text = _checked_text(value, field, f"{file}, row {row}")
                    except Rejected as e:
                        reject(str(e))
                        continue
                    if text:
                        yield from (Document(f"{file}:{row}", piece) for piece in _pieces(text))
                    else:
                        tally.num_empty += 1
    except (pyarrow.ArrowException, OSError) as e:
        raise Rejected(f"{file} is no readable parquet file ({str(e).splitlines()[0]}); write it again") from e


def _checked_text(value: object, field: str, name: str) -> str:
    if not isinstance(value, str):
        kind = "nothing" if value is None else f"a {type(value).__name__}"
        raise Rejected(f"{name}: {field!r} holds {kind}, not text; write a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as e:
        raise Rejected(f"{name}: {field!r} holds half a surrogate pair at {e.start}; write whole characters") from e
    return value
