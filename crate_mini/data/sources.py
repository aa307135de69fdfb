"""Where text comes from: any source, named or on disk, as one stream of documents.

    pydocs, pydocs+deps     the embedded corpus, see pydocs.py
    a file, a folder        see formats.py; of a folder all files of known kinds below it, in sorted order
    named corpora           NAMED, streamed from the hub; "pile:5000" stops after 5000 documents

Sources and formats have files of their own, beside data.py, because they change for other reasons than token
files and batches do. The two halves meet in `documents`, `describe` and `token_files`.
"""

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from crate_mini import UserError
from crate_mini.cli import nearest
from crate_mini.data import pydocs
from crate_mini.data.formats import (
    END,
    KINDS,
    LONG,
    Position,
    extra,
    field,
    kind,
    pieces,
    read,
    told,
)

HUB = "hf://datasets/"  # the tests put a folder here
NAMED = {  # name: builder in `datasets`, files
    "tinystories": ("text", "roneneldan/TinyStories/TinyStoriesV2-GPT4-train.txt"),
    "pile": ("json", "monology/pile-uncopyrighted/val.jsonl.zst"),  # 338 MB, enough for most of us
    "pile-train": (
        "json",
        "monology/pile-uncopyrighted/train/*.jsonl.zst",
    ),  # 30 files of about 11 GB
    "fineweb-edu": ("parquet", "HuggingFaceFW/fineweb-edu/sample/10BT/*.parquet"),
    "openwebtext": ("parquet", "Skylion007/openwebtext/**/*.parquet"),
}


def documents(source: str, position: Position | None = None) -> Iterator[str]:
    """Stream the documents of `source`, in the same order every time; nothing is loaded whole.

    Byte order marks and blank lines around a document are dropped, and so are empty documents.
    Raises UserError for a missing, binary, non-UTF-8, truncated or malformed source.
    """
    position = position or Position()
    name, limit = _named(source)
    if source in pydocs.NAMES:
        texts = pydocs.documents(source)
    elif name:
        texts = _hub(name, limit, position)
    else:
        files = _files(source)
        position.total = sum(path.stat().st_size for path in files)
        texts = (text for path in files for text in read(path, position))
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
    return {
        "name": Path(source).resolve().name,
        "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
    }


def token_files(source: str) -> list[tuple[Path, int, int]]:
    """(path, offset in bytes, ids) of each file of `source` if it holds token ids already; [] if it is text.

    Two layouts of uint16: bare (nanoGPT), or behind llm.c's 256 int32: 20240520, 1, count (FineWeb shards).
    """
    files = [] if source in pydocs.NAMES or _named(source)[0] else _files(source)
    if "bin" not in map(kind, files):
        return []
    found = []
    for path in files:
        with told(path), open(path, "rb") as file:
            size, head = path.stat().st_size, file.read(12)
        offset, count = 0, size // 2
        if head[:4] == (20240520).to_bytes(4, "little"):
            offset, count = 1024, int.from_bytes(head[8:], "little")
        if kind(path) != "bin" or not size or size != offset + 2 * count:
            raise UserError(
                f"{path} ({size:,} bytes) is no file of uint16 token ids, bare or behind llm.c's "
                "1024-byte header with their count; .bin and text cannot share a folder."
            )
        found.append((path, offset, count))
    return found


def held_out(raw: bytes, fraction: float) -> bool:
    """Whether a document, as UTF-8, is for validation: decided by its hash, whatever its neighbours are."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little") < fraction * 2**64


def _named(source: str) -> tuple[str | None, int | None]:
    """("pile", 5000) for "pile:5000"; (None, None) for what is no named corpus."""
    name, _, limit = source.partition(":")
    known = name in NAMED and (not limit or limit.isdecimal() and len(limit) < 12)
    return (name, int(limit) if limit else None) if known else (None, None)


def _files(source: str) -> list[Path]:
    """The file itself, whatever its name, or the files of known kinds in a folder."""
    root = Path(source)
    try:
        if root.is_file():
            return [root]
        files = [
            path
            for path in sorted(root.rglob("*"))
            if kind(path)
            and path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(root).parts)
        ]
        exists = source and root.exists()
    except (OSError, ValueError) as error:  # a name too long, a NUL in it, a folder we may not read
        raise UserError(f"Corpus {source[:80]!r} cannot be opened: {error}.") from None
    if not exists:
        known = [*pydocs.NAMES, *NAMED]
        raise UserError(
            f"No corpus {source!r}{nearest(source, known)}; there is no file or folder "
            f"{root.absolute()}, and the named corpora are {', '.join(known)}."
        )
    if not files:
        raise UserError(f"{source} is no file and holds none of a known kind: {' '.join(KINDS)}.")
    return files


def _hub(name: str, limit: int | None, position: Position) -> Iterator[str]:
    """Documents of a named corpus, streamed by `datasets`: only the token files take room on this disk."""
    datasets, (builder, files) = extra("datasets", "hub"), NAMED[name]
    position.total = limit
    with told(
        f"Corpus {name} from the hub (if the network fails, run again: finished parts are kept)"
    ):
        rows = datasets.load_dataset(builder, data_files=HUB + files, split="train", streaming=True)
        texts = (field(row, f"{name} row {number}") for number, row in enumerate(rows, 1))
        if builder == "text":  # this builder hands out lines
            texts = pieces((line + "\n" for line in texts), END, LONG)
        for position.done, text in enumerate(islice(texts, limit), 1):
            yield text
