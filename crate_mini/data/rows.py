"""Documents that are fields of rows: JSON lines, JSON arrays, CSV, parquet.

The first row of a file decides which field is read: --text-field, else "text", else "content",
else the only field with text. A row in which it is null is skipped and counted.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from crate_mini import UserError
from crate_mini.data.formats import LONGEST_ROW, NoText, Position, decoded, extra, json_rows

FIELDS = ("text", "content")  # the first of these that a row has is read
MOST_NAMED = 9  # fields listed in an error
DELIMITERS = (",", ";", "\t")
CELL_LIMIT = 1 << 24  # characters; the default of the module csv is 131,072
BETWEEN_VALUES = re.compile(r"[\s,]*")
# How the names of Arrow's types of text begin.
STRING_TYPES = ("string", "large_string", "dictionary<values=string", "dictionary<values=large_str")

Rows = Iterable[tuple[str, object]]  # (where the row stands, for an error; the row)


def read(path: Path, kind: str, position: Position, text_field: str | None) -> Iterator[str]:
    """Stream the texts of a file of rows; kind: one of formats.ROWS."""
    if kind == "parquet":
        pyarrow = extra("pyarrow.parquet", "parquet")
        file = pyarrow.ParquetFile(path, page_checksum_verification=True)  # where it has checksums
        text_field = _parquet_field(file, path, position, text_field)
        rows = _parquet(file, path, position, text_field)
    elif kind == "csv":
        rows = _csv(path, position)
    elif kind == "json":
        rows = from_json(decoded(path, position), path)
    else:
        lines = _lines(decoded(path, position), path)
        rows = ((f"{path} line {number}", row) for number, row in json_rows(lines, path))
    yield from texts(rows, path, position, text_field)


# ---- the field -----------------------------------------------------------------------------------


def texts(rows: Rows, source, position: Position, text_field: str | None = None) -> Iterator[str]:
    """The text of each row.

    Raises NoText if the first row does not tell which field to read, UserError if a later one has
    no text there.
    """
    name = None
    for where, row in rows:
        if row is not None and name is None:
            name = choose_field(row, where, text_field)
            _announce(name, source, position, text_field)
        if row is None or name is None:
            position.skipped += 1
            continue
        value = row.get(name, 0) if isinstance(row, dict) else 0
        if value is None:
            position.skipped += 1
        elif isinstance(value, str):
            # JSON can spell half of a surrogate pair, which UTF-8 cannot hold.
            yield value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        else:
            raise UserError(f'{where} has no field "{name}" with a string in it.')


def choose_field(row, where: str, text_field: str | None) -> str | None:
    """The field to read, by the first row of a file; None if all that it could be are null.

    Raises NoText, naming `where`, if there is none or a choice of several.
    """
    fields = row if isinstance(row, dict) else {}
    for name in [text_field] if text_field else FIELDS:
        if isinstance(fields.get(name, 0), str | None):
            return name
    if text_field:
        known = ", ".join([*fields][:MOST_NAMED]) or "none"
        raise NoText(
            f'{where} has no field "{text_field}" with a string in it, as --text-field '
            f"{text_field} asks; its fields: {known}."
        )
    strings = [name for name, value in fields.items() if _is_text(value)]
    if len(strings) == 1:
        return strings[0]
    if strings:
        raise NoText(
            f'{where} has no field "text", but several others with text: '
            f"{', '.join(strings[:MOST_NAMED])}; choose one with train.py's --text-field, or call "
            'it "text" in the file.'
        )
    if None in fields.values():
        return None
    raise NoText(f'{where} has no field "text" with a string in it.')


def _is_text(value) -> bool:
    """Whether this is a string, and not a number in quotes."""
    return isinstance(value, str) and not _is_number(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _announce(name: str | None, source, position: Position, text_field: str | None):
    """Log which field is read, unless it was asked for or is called "text"."""
    if name not in (None, text_field, "text"):
        position.log(f'note      {source} has no field "text"; "{name}" is read instead')


# ---- JSON ----------------------------------------------------------------------------------------


def _lines(chunks: Iterable[str], path: Path, end: str = "") -> Iterator[str]:
    """The lines of a text, each but the last with `end` after it.

    Raises UserError for a line that would not fit into memory.
    """
    begun = []  # pieces of the line that has begun
    length = 0  # of these together
    for chunk in chunks:
        first, *others = chunk.split("\n")
        begun.append(first)
        length += len(first)
        if length > LONGEST_ROW:
            raise _too_long(path)
        if others:
            yield "".join(begun) + end
            for line in others[:-1]:
                yield line + end
            begun = [others[-1]]
            length = len(others[-1])
    yield "".join(begun)


def from_json(chunks: Iterable[str], path: Path) -> Iterator[tuple[str, object]]:
    """Rows of JSON: the elements of an array, or values that follow each other.

    One row is in memory at a time. Raises NoText if the first is not JSON, UserError if a later
    one is not.
    """
    chunks = iter(chunks)
    decoder = json.JSONDecoder()
    buffer = ""
    start = 0  # of what has not been decoded
    number = 0
    in_array = False
    while True:
        start = BETWEEN_VALUES.match(buffer, start).end()
        bracket = buffer[start : start + 1]
        if bracket == ("]" if in_array else "["):
            in_array = not in_array
            start += 1
            continue
        try:
            value, start = decoder.raw_decode(buffer, start)
        except (ValueError, RecursionError):
            rest = buffer[start:]
            more = _read_as_much(chunks, len(rest), path)
            if not more:
                break
            buffer = rest + more
            start = 0
            continue
        number += 1
        yield f"{path} row {number}", value
    if rest or in_array:
        kind = UserError if number else NoText
        if not rest:
            raise kind(f"{path} ends within its array, after row {number}; is it complete?")
        raise kind(f"{path} row {number + 1} is not JSON: {rest[:40]!r}.")


def _read_as_much(chunks: Iterator[str], length: int, path: Path) -> str:
    """The next chunks, together at least `length` long, so that a long row is parsed few times."""
    if length > LONGEST_ROW:
        raise _too_long(path)
    read = []
    for chunk in chunks:
        read.append(chunk)
        length -= len(chunk)
        if length <= 0:
            break
    return "".join(read)


def _too_long(path: Path) -> UserError:
    return UserError(
        f"{path} has a row of more than {LONGEST_ROW:,} characters, or is damaged; split it into "
        "shorter ones."
    )


# ---- CSV and parquet -----------------------------------------------------------------------------


def _csv(path: Path, position: Position) -> Iterator[tuple[str, dict]]:
    """Rows of a CSV file as dicts by the names in its first line; line ends in quotes are kept.

    Raises NoText if the first line holds no names.
    """
    csv.field_size_limit(CELL_LIMIT)
    lines = _lines(decoded(path, position, translate=False), path, "\n")
    first = next(lines)
    delimiter = max(DELIMITERS, key=first.count)
    reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
    names = next(reader, [])
    if len(set(names)) < len(names) or any(map(_is_number, names)):
        raise NoText(f"{path} does not name its columns in its first line, so none can be chosen.")
    for cells in reader:
        if not cells:
            continue
        where = f"{path} line {reader.line_num}"
        if len(cells) != len(names):
            raise UserError(
                f"{where} has {len(cells)} cells for the {len(names)} columns of the first line; "
                f"a cell that holds {delimiter!r} must stand in double quotes."
            )
        yield where, dict(zip(names, cells))


def _parquet_field(file, path: Path, position: Position, text_field: str | None) -> str:
    """The column to read, by the types in the file's schema."""
    columns = {}
    for column in file.schema_arrow:
        columns[column.name] = "text" if str(column.type).startswith(STRING_TYPES) else 0
    name = choose_field(columns, str(path), text_field)
    _announce(name, path, position, text_field)
    return name


def _parquet(file, path: Path, position: Position, name: str) -> Iterator[tuple[str, dict]]:
    """Rows with one column of a parquet file, 1,024 at a time; other columns are not read."""
    before = position.done
    rows_read = 0
    for batch in file.iter_batches(batch_size=1024, columns=[name]):
        rows_read += batch.num_rows
        position.done = before + path.stat().st_size * rows_read // file.metadata.num_rows
        for row in batch.to_pylist():
            yield f"{path}, up to row {rows_read},", row
