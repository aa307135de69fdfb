"""Where text comes from: any source, named or on disk, as one stream of documents.

A file of its own beside data.py because the two change for different reasons: here live formats and sources
(documents out), there tokens and batches. They meet in `documents`, `describe` and `token_files`.

    pydocs, pydocs+deps     see pydocs.py
    .txt .md, other text    the pieces between <|endoftext|> marks; a file without marks is one document
    .jsonl, .parquet        the field or column "text" of each line or row
    a folder                all files of these formats below it, in sorted order
    named corpora           NAMED below, streamed from the hub; "pile:5000" stops after 5000 documents
Text and .jsonl may be packed: .gz .xz .zst. Running text is cut at a line end after 4 M characters, so that
memory stays bounded. Byte order marks and blank lines around a document go, line ends become "\\n", empty
documents vanish.
"""

import codecs
import hashlib
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path

from crate_mini import UserError, pydocs

END = "<|endoftext|>"
LONG = 1 << 22                  # characters of the longest document cut from running text
CHUNK = 1 << 20                 # bytes read at a time
PACKED = (".gz", ".xz", ".zst")
KINDS = {".txt": "text", ".md": "text", ".jsonl": "json", ".parquet": "parquet", ".bin": "bin"}
HUB = "hf://datasets/"          # the tests put a folder here
NAMED = {                       # name: builder in `datasets`, files
    "tinystories": ("text", "roneneldan/TinyStories/TinyStoriesV2-GPT4-train.txt"),
    "pile": ("json", "monology/pile-uncopyrighted/val.jsonl.zst"),             # 338 MB, enough for most of us
    "pile-train": ("json", "monology/pile-uncopyrighted/train/*.jsonl.zst"),   # 30 files of about 11 GB
    "fineweb-edu": ("parquet", "HuggingFaceFW/fineweb-edu/sample/10BT/*.parquet"),
    "openwebtext": ("parquet", "Skylion007/openwebtext/**/*.parquet"),
}


@dataclass
class Position:
    """How far the reader of `documents` has come, for progress lines: `done` of `total` (None: unknown)."""
    done: int = 0
    total: int | None = None


def documents(source: str, position: Position | None = None) -> Iterator[str]:
    """Stream the documents of `source`, in the same order every time; nothing is loaded whole.

    Raises UserError for a missing, binary, non-UTF-8, truncated or malformed source.
    """
    position = position or Position()
    name, limit = _named(source)
    if source in pydocs.NAMES:
        texts = pydocs.documents(source)
    elif name:
        texts = _hub(name, limit, position)
    else:
        texts = _from_files(_files(source), position)
    for text in texts:
        text = text.strip("\ufeff\n")
        if text and not text.isspace():
            yield text


def describe(source: str) -> dict:
    """What identifies `source`: equal descriptions mean equal text. JSON-able and cheap: no file is read."""
    name, limit = _named(source)
    if source in pydocs.NAMES:
        return pydocs.describe(source)
    if name:
        return {"name": name, "files": NAMED[name][1], "documents": limit}
    stats = [(path.relative_to(source).as_posix(), path.stat()) for path in _files(source)]
    return {"name": Path(source).resolve().name,
            "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]}


def token_files(source: str) -> list[tuple[Path, int, int]]:
    """(path, offset in bytes, ids) of each file of `source` if it holds token ids already; [] if it is text.

    Two layouts of uint16: bare (nanoGPT), or behind llm.c's 256 int32: 20240520, 1, count (FineWeb shards).
    """
    files = [] if source in pydocs.NAMES or _named(source)[0] else _files(source)
    if "bin" not in map(_kind, files):
        return []
    found = []
    for path in files:
        with _told(path), open(path, "rb") as file:
            size, head = path.stat().st_size, file.read(12)
        offset, count = 0, size // 2
        if head[:4] == (20240520).to_bytes(4, "little"):
            offset, count = 1024, int.from_bytes(head[8:], "little")
        if _kind(path) != "bin" or not size or size != offset + 2 * count:
            raise UserError(f"{path} ({size:,} bytes) is no file of uint16 token ids, bare or behind llm.c's "
                            "1024-byte header with their count; .bin and text cannot share a folder.")
        found.append((path, offset, count))
    return found


def held_out(raw: bytes, fraction: float) -> bool:
    """Whether a document, as UTF-8, is for validation: decided by its hash, whatever its neighbours are."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little") < fraction * 2 ** 64


def _named(source: str) -> tuple[str | None, int | None]:
    """("pile", 5000) for "pile:5000"; (None, None) for what is no named corpus."""
    name, _, limit = source.partition(":")
    known = name in NAMED and (not limit or limit.isdecimal() and len(limit) < 12)
    return (name, int(limit) if limit else None) if known else (None, None)


def _kind(path: Path) -> str | None:
    """text, json, parquet or bin by the file's name, packing aside; None when unknown."""
    suffix = path.suffix.lower()
    if suffix in PACKED:
        kind = KINDS.get(Path(path.stem).suffix.lower())
        return kind if kind in ("text", "json") else None
    return KINDS.get(suffix)


def _files(source: str) -> list[Path]:
    """The file itself, whatever its name, or the files of known kinds in a folder."""
    root = Path(source)
    try:
        if root.is_file():
            return [root]
        files = [path for path in sorted(root.rglob("*")) if _kind(path) and path.is_file()
                 and not any(part.startswith(".") for part in path.relative_to(root).parts)]
        exists = source and root.exists()
    except (OSError, ValueError) as error:      # a name too long, a NUL in it, a folder we may not read
        raise UserError(f"Corpus {source[:80]!r} cannot be opened: {error}.") from None
    if not exists:
        raise UserError(f"No corpus {source!r}: expected {', '.join([*pydocs.NAMES, *NAMED])} or the path "
                        "of a file or folder; pydocs always works.")
    if not files:
        raise UserError(f"{source} is no file and holds none of a known kind: {' '.join(KINDS)}.")
    return files


def _from_files(files: list[Path], position: Position) -> Iterator[str]:
    readers = {"json": _jsonl, "parquet": _parquet}
    position.total = sum(path.stat().st_size for path in files)
    for path in files:
        with _told(path):
            yield from readers.get(_kind(path), _running_text)(path, position)


@contextmanager
def _told(what):
    """Whatever a decoder or client complains about, whichever library's it is, becomes one sentence."""
    try:
        yield
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is not UTF-8 text ({error.reason}): it is binary or in another encoding; "
                        "iconv -t UTF-8 converts text.") from None
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{what} cannot be read ({reason}).") from None


def _running_text(path: Path, position: Position) -> Iterator[str]:
    return _pieces(_text(path, position), END, LONG)


def _jsonl(path: Path, position: Position) -> Iterator[str]:
    for number, line in enumerate(_pieces(_text(path, position), "\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise UserError(f"{path} line {number} is not JSON: {line[:40]!r}.") from None
            yield _field(row, f"{path} line {number}")


def _parquet(path: Path, position: Position) -> Iterator[str]:
    start, seen = position.done, 0
    file = extra("pyarrow.parquet", "parquet").ParquetFile(path)
    if "text" not in file.schema_arrow.names:
        raise UserError(f'{path} has no column "text" among {file.schema_arrow.names[:9]}.')
    for batch in file.iter_batches(batch_size=1024, columns=["text"]):
        seen += batch.num_rows
        position.done = start + path.stat().st_size * seen // file.metadata.num_rows
        yield from (_field(row, f"{path}, up to row {seen},") for row in batch.to_pylist())


def _field(row, where: str) -> str:
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{where} has no field "text" with a string in it.')
    # JSON can spell half of a surrogate pair, which UTF-8 cannot hold.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _text(path: Path, position: Position) -> Iterator[str]:
    """Unpacked, decoded text in chunks of about a megabyte, line ends as "\\n"."""
    decode = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True).decode
    start = position.done
    with open(path, "rb") as raw:
        for data in _unpacked(raw, path.suffix.lower()):
            text = decode(data)
            if "\0" in text:
                raise UserError(f"{path} looks binary: it holds a zero byte; expected UTF-8 text.")
            position.done = start + raw.tell()
            yield text
    yield decode(b"", final=True)


def _unpacked(raw, suffix: str) -> Iterator[bytes]:
    """One loop for all packings; unlike the libraries' file objects it notices a truncated .zst too."""
    if suffix not in PACKED:
        yield from iter(lambda: raw.read(CHUNK), b"")
        return
    new = {".gz": lambda: zlib.decompressobj(31), ".xz": lzma.LZMADecompressor}.get(suffix)
    if suffix == ".zst":        # the Pile is packed with a window of 2 GiB, beyond the default limit
        new = extra("zstandard", "zst").ZstdDecompressor(max_window_size=2 ** 31).decompressobj
    unpacker = new()
    while data := raw.read(CHUNK // 8):
        while data:
            if unpacker.eof:    # several packed streams, end to end
                unpacker = new()
            yield unpacker.decompress(data)
            data = unpacker.unused_data if unpacker.eof else b""
    if not unpacker.eof:
        raise EOFError("it ends too early; is it complete?")


def _pieces(chunks: Iterator[str], mark: str, longest: int | None = None) -> Iterator[str]:
    """Cut running text at every `mark`, and at a line end where a piece would grow longer than `longest`."""
    rest = ""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(mark)
        yield from whole
        while longest and len(rest) > longest + len(mark):      # a mark may have begun at the very end
            at = rest.rfind("\n", 0, longest) + 1 or longest
            yield rest[:at]
            rest = rest[at:]
    yield rest


def _hub(name: str, limit: int | None, position: Position) -> Iterator[str]:
    """Documents of a named corpus, streamed by `datasets`: only the token files take room on this disk."""
    datasets, (builder, files) = extra("datasets", "hub"), NAMED[name]
    position.total = limit
    with _told(f"Corpus {name} from the hub (if the network fails, run again: finished parts are kept)"):
        rows = datasets.load_dataset(builder, data_files=HUB + files, split="train", streaming=True)
        texts = (_field(row, f"{name} row {number}") for number, row in enumerate(rows, 1))
        if builder == "text":       # this builder hands out lines
            texts = _pieces((line + "\n" for line in texts), END, LONG)
        for position.done, text in enumerate(islice(texts, limit), 1):
            yield text


def extra(module: str, extra: str):
    """An optional package, or how to get it."""
    try:
        return import_module(module)
    except ImportError:
        raise UserError(f"This needs the package {module.partition('.')[0]}: in the project's folder, "
                        f'pip install -e ".[{extra}]".') from None
