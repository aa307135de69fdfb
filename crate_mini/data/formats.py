"""Text files of every kind as streams of documents, errors in one sentence.

    .txt .md, other text    the pieces between <|endoftext|> marks, or the whole file without them
    .jsonl, .parquet        the field or column "text" of each line or row

Text and .jsonl may be compressed: .gz .xz .zst. Running text is cut at a line end at most every 4 M
characters, which bounds memory; line ends become "\\n".
"""

import codecs
import io
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from pathlib import Path

from crate_mini import UserError

END = "<|endoftext|>"
LONG = 1 << 22  # characters of the longest document cut from running text
CHUNK = 1 << 20  # bytes read at a time
PACKED = (".gz", ".xz", ".zst")
KINDS = {".txt": "text", ".md": "text", ".jsonl": "json", ".parquet": "parquet", ".bin": "bin"}


@dataclass
class Position:
    """Progress of a reader of documents: `done` of `total` bytes or rows; None if unknown."""

    done: int = 0
    total: int | None = None


def kind(path: Path) -> str | None:
    """text, json, parquet or bin, by the file's name without its compression; None if unknown."""
    suffix = path.suffix.lower()
    if suffix not in PACKED:
        return KINDS.get(suffix)
    inner = KINDS.get(Path(path.stem).suffix.lower())
    return inner if inner in ("text", "json") else None


def read(path: Path, position: Position) -> Iterator[str]:
    """Stream the documents of a file and update `position`.

    Raises UserError for a file that is not of the kind its name says.
    """
    readers = {"json": _jsonl, "parquet": _parquet}
    reader = readers.get(kind(path), _running_text)
    with reading(path):
        yield from reader(path, position)


@contextmanager
def reading(name):
    """Turn any exception of a decoder or client into a UserError that names the source.

    Everything is caught, because six libraries read here, each with its own exceptions, some of
    them undocumented.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{name} cannot be read ({reason}).") from None


def _running_text(path: Path, position: Position) -> Iterator[str]:
    """Documents between END marks; also the reader for files of unknown kind."""
    return pieces(_text(path, position), END, LONG)


def _jsonl(path: Path, position: Position) -> Iterator[str]:
    """The field "text" of each line; blank lines are skipped."""
    for number, row in json_rows(pieces(_text(path, position), "\n"), path):
        yield field(row, f"{path} line {number}")


def json_rows(lines: Iterable[str], path: Path) -> Iterator[tuple[int, object]]:
    """(line number from 1, value) of each line of JSON that is not blank.

    Raises UserError, naming `path` and the number, for a line that is not JSON.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{path} line {number} is not JSON: {line[:40]!r}.") from None
        yield number, value


def _parquet(path: Path, position: Position) -> Iterator[str]:
    """The column "text", 1,024 rows at a time; other columns are not read."""
    file = extra("pyarrow.parquet", "parquet").ParquetFile(path)
    if "text" not in file.schema_arrow.names:
        raise UserError(f'{path} has no column "text" among {file.schema_arrow.names[:9]}.')
    before = position.done
    rows_read = 0
    for batch in file.iter_batches(batch_size=1024, columns=["text"]):
        rows_read += batch.num_rows
        position.done = before + path.stat().st_size * rows_read // file.metadata.num_rows
        for row in batch.to_pylist():
            yield field(row, f"{path}, up to row {rows_read},")


def field(row, where: str) -> str:
    """The text of one row. Raises UserError, naming `where`, for a row without text."""
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{where} has no field "text" with a string in it.')
    # JSON can spell half of a surrogate pair, which UTF-8 cannot hold.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _text(path: Path, position: Position) -> Iterator[str]:
    """Decompressed and decoded text in chunks of about a megabyte, with line ends as "\\n"."""
    # Half a character, or half of "\r\n", at the end of a chunk waits for the next one.
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    before = position.done
    bytes_read = 0
    with open(path, "rb") as raw:
        for chunk in chain(_decompressed(raw, path.suffix.lower()), [None]):
            final = chunk is None
            data = b"" if final else chunk
            bytes_read += len(data)
            try:
                text = decoder.decode(data, final=final)
            except UnicodeDecodeError as error:
                # error.object ends where the bytes read so far end.
                offset = bytes_read - len(error.object) + error.start
                raise UserError(
                    f"{path} is not UTF-8 text at byte {offset:,} ({error.reason}): it is binary "
                    "or in another encoding; iconv -t UTF-8 converts text."
                ) from None
            if "\0" in text:
                raise UserError(f"{path} looks binary: it holds a zero byte; expected UTF-8 text.")
            position.done = before + raw.tell()
            yield text


def _decompressed(raw, suffix: str) -> Iterator[bytes]:
    """The bytes of an open file, decompressed. Raises EOFError for a truncated stream.

    The libraries' own file objects do not notice a truncated .zst.
    """
    if suffix not in PACKED:
        while data := raw.read(CHUNK):
            yield data
        return
    decompressor = _decompressor(suffix)
    while data := raw.read(CHUNK // 8):
        while data:
            if decompressor.eof:  # another compressed stream follows
                decompressor = _decompressor(suffix)
            yield decompressor.decompress(data)
            data = decompressor.unused_data if decompressor.eof else b""
    if not decompressor.eof:
        raise EOFError("it ends too early; is it complete?")


def _decompressor(suffix: str):
    """A decompressor for one stream."""
    if suffix == ".gz":
        return zlib.decompressobj(31)  # window size 15, plus 16 for gzip's header and trailer
    if suffix == ".xz":
        return lzma.LZMADecompressor()
    # The Pile is compressed with a window of 2 GiB, beyond the default limit.
    zstandard = extra("zstandard", "zst")
    return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()


def pieces(chunks: Iterator[str], mark: str, longest: int | None = None) -> Iterator[str]:
    """Cut running text at every `mark`, and at a line end where a piece exceeds `longest`.

    Chunk boundaries make no difference, as long as no piece is longer than `longest`.
    """
    rest = ""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(mark)
        yield from whole
        while longest and len(rest) > longest + len(mark):  # a mark may have begun at the very end
            cut = rest.rfind("\n", 0, longest) + 1 or longest
            yield rest[:cut]
            rest = rest[cut:]
    yield rest


def extra(module: str, group: str):
    """Import an optional package; the UserError names the extra (`group`) that installs it."""
    try:
        return import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(
            f"This needs the package {package}: in the project's folder, "
            f'pip install -e ".[{group}]".'
        ) from None
