"""Text files of every kind as streams of documents, and their decoders' complaints as sentences.

    .txt .md, other text    the pieces between <|endoftext|> marks; a file without marks is one document
    .jsonl, .parquet        the field or column "text" of each line or row
Text and .jsonl may be packed: .gz .xz .zst. Running text is cut at a line end after 4 M characters, so that
memory stays bounded; line ends become "\\n".
"""

import codecs
import io
import json
import lzma
import zlib
from collections.abc import Iterator
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
    """How far the reader of `documents` has come, for progress lines: `done` of `total` (None: unknown)."""

    done: int = 0
    total: int | None = None


def kind(path: Path) -> str | None:
    """text, json, parquet or bin by the file's name, packing aside; None when unknown."""
    suffix = path.suffix.lower()
    if suffix in PACKED:
        inner = KINDS.get(Path(path.stem).suffix.lower())
        return inner if inner in ("text", "json") else None
    return KINDS.get(suffix)


def read(path: Path, position: Position) -> Iterator[str]:
    """Stream the documents of a file, moving `position`. UserError if it is not what its name says."""
    with told(path):
        yield from {"json": _jsonl, "parquet": _parquet}.get(kind(path), _running_text)(
            path, position
        )


@contextmanager
def told(what):
    """Whatever a decoder or client complains about becomes one sentence, a UserError about `what`.

    Everything is caught: six libraries read here, each with exceptions of its own, some of them undocumented.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{what} cannot be read ({reason}).") from None


def _running_text(path: Path, position: Position) -> Iterator[str]:
    """Documents between END marks; also how a file of unknown kind is tried."""
    return pieces(_text(path, position), END, LONG)


def _jsonl(path: Path, position: Position) -> Iterator[str]:
    """The field "text" of each line; blank lines are nothing."""
    for number, line in enumerate(pieces(_text(path, position), "\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise UserError(f"{path} line {number} is not JSON: {line[:40]!r}.") from None
            yield field(row, f"{path} line {number}")


def _parquet(path: Path, position: Position) -> Iterator[str]:
    """The column "text", a thousand rows in memory at a time; other columns are not read."""
    start, seen = position.done, 0
    file = extra("pyarrow.parquet", "parquet").ParquetFile(path)
    if "text" not in file.schema_arrow.names:
        raise UserError(f'{path} has no column "text" among {file.schema_arrow.names[:9]}.')
    for batch in file.iter_batches(batch_size=1024, columns=["text"]):
        seen += batch.num_rows
        position.done = start + path.stat().st_size * seen // file.metadata.num_rows
        yield from (field(row, f"{path}, up to row {seen},") for row in batch.to_pylist())


def field(row, where: str) -> str:
    """The text of one row; `where` names it in the UserError if it has none."""
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{where} has no field "text" with a string in it.')
    # JSON can spell half of a surrogate pair, which UTF-8 cannot hold.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _text(path: Path, position: Position) -> Iterator[str]:
    """Unpacked, decoded text in chunks of about a megabyte, line ends as "\\n"."""
    # Decodes across chunk ends: half a character, or half of "\r\n", waits for the next one.
    decode = io.IncrementalNewlineDecoder(
        codecs.getincrementaldecoder("utf-8-sig")(), translate=True
    ).decode
    start, seen = position.done, 0
    with open(path, "rb") as raw:
        for data in chain(_unpacked(raw, path.suffix.lower()), [None]):
            seen += len(data or b"")
            try:
                text = decode(data or b"", final=data is None)
            except UnicodeDecodeError as error:  # its object ends where the bytes seen so far do
                at = seen - len(error.object) + error.start
                raise UserError(
                    f"{path} is not UTF-8 text at byte {at:,} ({error.reason}): it is binary or "
                    "in another encoding; iconv -t UTF-8 converts text."
                ) from None
            if "\0" in text:
                raise UserError(f"{path} looks binary: it holds a zero byte; expected UTF-8 text.")
            position.done = start + raw.tell()
            yield text


def _unpacked(raw, suffix: str) -> Iterator[bytes]:
    """One loop for all packings; unlike the libraries' file objects it notices a truncated .zst too."""
    if suffix not in PACKED:
        yield from iter(lambda: raw.read(CHUNK), b"")
        return
    new = {".gz": lambda: zlib.decompressobj(31), ".xz": lzma.LZMADecompressor}.get(suffix)
    if suffix == ".zst":  # the Pile is packed with a window of 2 GiB, beyond the default limit
        new = extra("zstandard", "zst").ZstdDecompressor(max_window_size=2**31).decompressobj
    unpacker = new()
    while data := raw.read(CHUNK // 8):
        while data:
            if unpacker.eof:  # several packed streams, end to end
                unpacker = new()
            yield unpacker.decompress(data)
            data = unpacker.unused_data if unpacker.eof else b""
    if not unpacker.eof:
        raise EOFError("it ends too early; is it complete?")


def pieces(chunks: Iterator[str], mark: str, longest: int | None = None) -> Iterator[str]:
    """Cut running text at every `mark`, and at a line end where a piece grows longer than `longest`.

    Where the chunks end makes no difference, as long as no piece is longer than `longest`.
    """
    rest = ""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(mark)
        yield from whole
        while longest and len(rest) > longest + len(mark):  # a mark may have begun at the very end
            at = rest.rfind("\n", 0, longest) + 1 or longest
            yield rest[:at]
            rest = rest[at:]
    yield rest


def extra(module: str, extra: str):
    """Import an optional package; the UserError names the extra of pyproject.toml that brings it."""
    try:
        return import_module(module)
    except ImportError:
        raise UserError(
            f"This needs the package {module.partition('.')[0]}: in the project's folder, "
            f'pip install -e ".[{extra}]".'
        ) from None
