"""Text files of every kind as streams of documents, errors in one sentence.

    .txt .md, other text             the pieces between <|endoftext|> marks, or the whole file
    .jsonl .ndjson .json .parquet    one field of each row, and so for .csv and .tsv: see rows.py
    .html .htm .xml                  refused: markup is not text

Text and rows of text may be compressed: .gz .xz .zst. A file with another ending is read as what
it begins with, JSON or running text. Running text is cut at a line end at most every 4 M
characters, which bounds memory, and its line ends become "\\n"; those in rows stay what they are.
"""

import codecs
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from pathlib import Path

from crate_mini import UserError

END = "<|endoftext|>"
LONG = 1 << 22  # characters of the longest document cut from running text
LONGEST_ROW = 1 << 27  # characters; a longer row is refused, because it is held in memory
CHUNK = 1 << 20  # bytes of text passed on at a time
PACKED_CHUNK = 1 << 12  # compressed bytes read at a time; they can become a thousand times as many
PACKED = (".gz", ".xz", ".zst")
KINDS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".bin": "bin",
}
ROWS = ("jsonl", "json", "csv", "parquet")  # kinds that hold documents as fields of rows
MARKUP = (".html", ".htm", ".xhtml", ".xml")
LOOKS_LIKE_ROWS = re.compile(r'\s*\[?\s*\{\s*"[^"]*"\s*:')
LOOKS_LIKE_MARKUP = re.compile(r"\s*<(!doctype|html|\?xml)\b", re.IGNORECASE)


@dataclass
class Position:
    """Progress of a reader of documents: `done` of `total` bytes or rows; None if unknown.

    skipped: rows whose text is null. log: called with notes, such as which field is read.
    """

    done: int = 0
    total: int | None = None
    skipped: int = 0
    log: Callable = lambda line: None


class NoText(UserError):
    """A file of rows in which no field with text can be found."""


def kind(path: Path) -> str | None:
    """A value of KINDS, by the file's name without its compression; None if unknown."""
    suffix = path.suffix.lower()
    if suffix not in PACKED:
        return KINDS.get(suffix)
    inner = KINDS.get(Path(path.stem).suffix.lower())
    return inner if inner not in ("parquet", "bin") else None


def is_markup(path: Path) -> bool:
    """Whether the file's name, without its compression, is that of markup."""
    stem = Path(path.stem) if path.suffix.lower() in PACKED else path
    return stem.suffix.lower() in MARKUP


def read(path: Path, position: Position, text_field: str | None = None) -> Iterator[str]:
    """Stream the documents of a file and update `position`.

    text_field: the field of a row to read; None: see rows.choose_field. Raises NoText for rows
    without it, and UserError for a file that is not of the kind its name says.
    """
    with reading(path):
        if is_markup(path):
            raise _markup_error(path)
        file_kind = kind(path)
        if file_kind in ROWS:
            from crate_mini.data import rows  # only when rows are read

            yield from rows.read(path, file_kind, position, text_field)
        elif file_kind == "text":
            yield from pieces(decoded(path, position), END, LONG)
        else:
            yield from _by_its_beginning(path, position, text_field)


def _by_its_beginning(path: Path, position: Position, text_field: str | None) -> Iterator[str]:
    """The documents of a file whose name does not tell its kind."""
    chunks = decoded(path, position)
    beginning = next(chunks, "")
    if LOOKS_LIKE_MARKUP.match(beginning):
        raise _markup_error(path)
    chunks = chain([beginning], chunks)
    if LOOKS_LIKE_ROWS.match(beginning):
        from crate_mini.data import rows

        position.log(f"note      {path} begins like JSON and is read as such")
        yield from rows.texts(rows.from_json(chunks, path), path, position, text_field)
    else:
        yield from pieces(chunks, END, LONG)


def _markup_error(path: Path) -> UserError:
    return UserError(
        f"{path} is markup, and a model would learn its tags; save its text as .txt, or as .jsonl "
        'with a field "text", and give that file.'
    )


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
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise UserError(f"{name} cannot be read ({reason or 'it is damaged'}).") from None


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


def decoded(path: Path, position: Position, translate: bool = True) -> Iterator[str]:
    """Decompressed and decoded text in chunks of about a megabyte.

    translate: turn line ends into "\\n".
    """
    # Half a character, or half of "\r\n", at the end of a chunk waits for the next one.
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate)
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
    """The bytes of an open file, decompressed, in chunks of about CHUNK.

    Zero bytes after a stream are padding, as they are for gzip and xz; zstd itself refuses them.
    Raises EOFError for a truncated stream, which the libraries' own file objects do not notice in
    a .zst.
    """
    if suffix not in PACKED:
        while data := raw.read(CHUNK):
            yield data
        return
    decompressor = _decompressor(suffix)
    chunks, size = [], 0
    while data := raw.read(PACKED_CHUNK):
        while data:
            if decompressor.eof:  # padding, or another compressed stream
                if suffix != ".zst":
                    data = data.lstrip(b"\0")
                if not data:
                    break
                decompressor = _decompressor(suffix)
            chunks.append(decompressor.decompress(data))
            size += len(chunks[-1])
            data = decompressor.unused_data if decompressor.eof else b""
        if size >= CHUNK:
            yield b"".join(chunks)
            chunks, size = [], 0
    if not decompressor.eof:
        raise EOFError("it ends too early; is it complete?")
    yield b"".join(chunks)


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
