"""Sources of text, named or on disk, each as one stream of documents.

    pydocs, pydocs+deps     the embedded corpus, see pydocs.py
    a file, a folder        see formats.py; in a folder, all files of known kinds, sorted
    named corpora           NAMED, streamed from the hub; "pile:5000" stops after 5000 documents

Every --data takes any of them.
"""

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from crate_mini import UserError
from crate_mini.cli import nearest
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
    reading,
)

HUB = "hf://datasets/"  # tests put a folder here
EMBEDDED = ("pydocs", "pydocs+deps")  # as in pydocs.py, which is imported only when it is used
NAMED = {  # name: (builder in `datasets`, files)
    "tinystories": ("text", "roneneldan/TinyStories/TinyStoriesV2-GPT4-train.txt"),
    # 338 MB, enough for most purposes
    "pile": ("json", "monology/pile-uncopyrighted/val.jsonl.zst"),
    # 30 files of about 11 GB each
    "pile-train": ("json", "monology/pile-uncopyrighted/train/*.jsonl.zst"),
    "fineweb-edu": ("parquet", "HuggingFaceFW/fineweb-edu/sample/10BT/*.parquet"),
    "openwebtext": ("parquet", "Skylion007/openwebtext/**/*.parquet"),
}
LLM_C_MAGIC = (20240520).to_bytes(4, "little")  # how token files of llm.c begin
LLM_C_HEADER = 1024  # bytes


def documents(source: str, position: Position | None = None) -> Iterator[str]:
    """Stream the documents of `source`, in the same order every time; nothing is loaded whole.

    Byte order marks and blank lines around a document are dropped, and so are empty documents.
    position: updated while documents are read. Raises UserError for a source that is missing,
    binary, truncated, malformed or not UTF-8.
    """
    position = position or Position()
    name, limit = _named(source)
    if source in EMBEDDED:
        from crate_mini.data import pydocs

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
    """A JSON-able description that identifies `source`: equal ones mean equal text.

    Cheap: files are not read. Raises UserError for a source that does not exist.
    """
    name, limit = _named(source)
    if source in EMBEDDED:
        from crate_mini.data import pydocs

        return pydocs.describe(source)
    if name:
        return {"name": name, "files": NAMED[name][1], "documents": limit}
    files = []
    for path in _files(source):
        stat = path.stat()
        files.append([path.relative_to(source).as_posix(), stat.st_size, stat.st_mtime_ns])
    return {"name": Path(source).resolve().name, "files": files}


def pretokenized(source: str) -> list[tuple[Path, int, int]]:
    """(path, offset in bytes, number of ids) of each file, if `source` holds token ids; [] if text.

    Two layouts of uint16: bare (nanoGPT), or after a header of 256 int32 that begins with
    20240520, 1, count (llm.c; FineWeb shards). Raises UserError for any other .bin file.
    """
    if source in EMBEDDED or _named(source)[0]:
        return []
    paths = _files(source)
    if "bin" not in map(kind, paths):
        return []
    files = []
    for path in paths:
        with reading(path), open(path, "rb") as file:
            size = path.stat().st_size
            head = file.read(12)
        offset, count = 0, size // 2
        if head.startswith(LLM_C_MAGIC):
            offset, count = LLM_C_HEADER, int.from_bytes(head[8:], "little")
        if kind(path) != "bin" or not size or size != offset + 2 * count:
            raise UserError(
                f"{path} ({size:,} bytes) does not hold uint16 token ids, bare or after llm.c's "
                "1024-byte header with their count; .bin and text cannot share a folder."
            )
        files.append((path, offset, count))
    return files


def is_held_out(raw: bytes, fraction: float) -> bool:
    """Whether a document (UTF-8) is for validation, which its hash alone decides."""
    digest = hashlib.blake2b(raw, digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def _named(source: str) -> tuple[str | None, int | None]:
    """("pile", 5000) for "pile:5000"; (None, None) for anything but a named corpus."""
    name, _, limit = source.partition(":")
    if name not in NAMED:
        return None, None
    if not limit:
        return name, None
    if limit.isdecimal() and len(limit) < 12:
        return name, int(limit)
    return None, None


def _files(source: str) -> list[Path]:
    """The file itself, whatever its name, or the files of known kinds in a folder."""
    root = Path(source)
    try:
        if root.is_file():
            return [root]
        files = [path for path in sorted(root.rglob("*")) if _is_text_or_tokens(path, root)]
        exists = source and root.exists()
    except (OSError, ValueError) as error:  # too long, a NUL, a folder we may not read
        raise UserError(f"Corpus {source[:80]!r} cannot be opened: {error}.") from None
    if not exists:
        known = [*EMBEDDED, *NAMED]
        raise UserError(
            f"No corpus {source!r}{nearest(source, known)}; there is no file or folder "
            f"{root.absolute()}, and the named corpora are {', '.join(known)}."
        )
    if not files:
        raise UserError(f"{source} holds no file of a known kind: {' '.join(KINDS)}.")
    return files


def _is_text_or_tokens(path: Path, root: Path) -> bool:
    """Whether this is a file of known kind that is not hidden below `root`."""
    if not kind(path) or not path.is_file():
        return False
    return not any(part.startswith(".") for part in path.relative_to(root).parts)


def _hub(name: str, limit: int | None, position: Position) -> Iterator[str]:
    """Documents of a named corpus, streamed by `datasets`; the text is not kept on disk."""
    datasets = extra("datasets", "hub")
    builder, files = NAMED[name]
    position.total = limit
    with reading(
        f"Corpus {name} from the hub (if the network fails, run again: finished parts are kept)"
    ):
        rows = datasets.load_dataset(builder, data_files=HUB + files, split="train", streaming=True)
        texts = (field(row, f"{name} row {number}") for number, row in enumerate(rows, 1))
        if builder == "text":  # this builder yields lines
            texts = pieces((line + "\n" for line in texts), END, LONG)
        for number, text in enumerate(islice(texts, limit), 1):
            position.done = number
            yield text
