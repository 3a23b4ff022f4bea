"""Texts in a column of a parquet file, read a few rows at a time."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
from pyarrow import parquet, types

from dsv3_jax.config.paths import shown
from dsv3_jax.data.documents import Rejected, decode

_ROWS_AT_A_TIME = 8
_READ_BYTES = 2**20

_IS_TEXT = (
    types.is_string,
    types.is_large_string,
    types.is_string_view,
    types.is_binary,
    types.is_large_binary,
    types.is_binary_view,
)


def read_parquet(file: Path, field: str, reject: Callable[[str], None]) -> Iterator[tuple[int, str]]:
    """Number and text of each row; rows without text or UTF-8 are rejected.

    Memory holds a page of the file, twice, and eight texts, however long the row groups are.

    Raises:
        Rejected: this is no parquet file, or has no such column of text; what came before has been read.
    """
    name = shown(file)
    try:
        with file.open("rb") as source, parquet.ParquetFile(source, buffer_size=_READ_BYTES, pre_buffer=False) as table:
            _check_column(table.schema_arrow, field, name)
            row = 0
            for batch in table.iter_batches(batch_size=_ROWS_AT_A_TIME, columns=[field]):
                for value in batch.column(0):
                    row += 1
                    try:
                        text = _text(value, field, f"{name}, row {row}")
                    except Rejected as e:
                        reject(str(e))
                        continue
                    yield row, text
    except (pyarrow.ArrowException, OSError) as e:
        raise Rejected(f"{name} is no readable parquet file ({str(e).splitlines()[0]}); write it again") from e


def _check_column(schema: pyarrow.Schema, field: str, name: str) -> None:
    if field not in schema.names:
        found = ", ".join(schema.names[:8])
        raise Rejected(f"{name}: no column {field!r} (found: {found}); set data.text_field to one of them")
    kind = schema.types[schema.names.index(field)]
    content = kind.value_type if types.is_dictionary(kind) else kind
    if not any(is_text(content) for is_text in _IS_TEXT):
        raise Rejected(f"{name}: column {field!r} holds {kind}, not text; set data.text_field to a column of text")


def _text(value: pyarrow.Scalar, field: str, name: str) -> str:
    if isinstance(value, pyarrow.DictionaryScalar):
        value = value.value
    buffer = value.as_buffer() if value.is_valid else None
    if buffer is None:
        raise Rejected(f"{name}: {field!r} holds nothing, not text; write a string")
    return decode(buffer.to_pybytes(), name)
