"""Sources of text, named or on disk, each as one stream of documents.

    pydocs, pydocs+deps     the embedded corpus, see pydocs.py
    a file, a folder        see formats.py; in a folder, all files of known kinds, sorted
    named corpora           NAMED, streamed from the hub; "pile:5000" stops after 5000 documents

Every --data takes any of them. In a folder with token files (.bin) these alone are read; a readme
next to rows of text is a description of them, not text; files of other kinds are left out. A note
names what is left out.
"""

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from crate_mini import UserError
from crate_mini.cli import nearest
from crate_mini.data.formats import (
    END,
    KINDS,
    LONG,
    ROWS,
    NoText,
    Position,
    extra,
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
MOST_NAMED = 3  # files that a note names


class TokenFile(NamedTuple):
    """A file that holds token ids: `count` of them, of type `dtype`, after `offset` bytes."""

    path: Path
    offset: int
    count: int
    dtype: str


# Headers of llm.c's token files, 256 int32: magic, version, number of ids.
LLM_C_HEADER = 1024  # bytes
LLM_C_TYPES = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # (magic, version): type of the ids
LLM_C_MAGICS = range(20240000, 20250000)  # of all its files; no bare file of GPT-2's ids begins so


def documents(
    source: str, position: Position | None = None, text_field: str | None = None
) -> Iterator[str]:
    """Stream the documents of `source`, in the same order every time; nothing is loaded whole.

    Byte order marks and blank lines around a document are dropped, and so are empty documents.
    position: updated while documents are read; its `log` gets notes. text_field: the field of a
    row to read, see rows.py. Raises UserError for a source that is missing, binary, truncated,
    malformed or not UTF-8.
    """
    position = position or Position()
    name, limit = _named(source)
    if source in EMBEDDED:
        from crate_mini.data import pydocs

        texts = pydocs.documents(source)
    elif name:
        texts = _hub(name, limit, position)
    else:
        texts = _texts_of_files(source, position, text_field)
    for text in texts:
        text = text.strip("\ufeff\r\n")
        if text and not text.isspace():
            yield text


def _texts_of_files(source: str, position: Position, text_field: str | None) -> Iterator[str]:
    """The documents of a file or folder.

    In a folder, a .json or .csv file without a field of text, such as a table of facts about the
    others, is skipped with a note.
    """
    files, _ = _files(source)
    position.total = sum(path.stat().st_size for path in files)
    skipped = []
    done = 0
    for path in files:
        try:
            yield from read(path, position, text_field)
        except NoText as error:
            if kind(path) not in ("json", "csv"):
                raise
            skipped.append(error)
            if len(skipped) == len(files):
                raise skipped[0] from None
            position.log(f"note      skipped: {error}")
        done += path.stat().st_size
        position.done = done


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
    for path in _files(source)[0]:
        stat = path.stat()
        files.append([path.relative_to(source).as_posix(), stat.st_size, stat.st_mtime_ns])
    return {"name": Path(source).resolve().name, "files": files}


def check_text_field(source: str, text_field: str):
    """Raise UserError if `source` has no rows, and so no field that could be read."""
    has_rows = False
    if source not in EMBEDDED and not _named(source)[0]:
        # A file of unknown kind is read as what it begins with.
        has_rows = any(kind(path) in (*ROWS, None) for path in _files(source)[0])
    if not has_rows:
        raise UserError(
            f"--text-field {text_field} has no effect: {source} has no file of rows, such as "
            ".jsonl or .csv; leave it out."
        )


def notes(source: str) -> list[str]:
    """Lines that say which files of a folder are not read; [] if all are."""
    if source in EMBEDDED or _named(source)[0]:
        return []
    files, others = _files(source)
    if not others:
        return []
    names = [path.relative_to(source).as_posix() for path in others]
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    lines = [f"note      {source}: left out {', '.join(names[:MOST_NAMED])}{more}"]
    if kind(files[0]) == "bin" and "meta.pkl" in names:
        lines.append(
            f"note      {source}: meta.pkl names a vocabulary of its own and is not opened, since "
            "a pickle can run code; text and bits per byte are those of --tokenizer"
        )
    return lines


def pretokenized(source: str) -> list[TokenFile]:
    """The files of token ids that `source` consists of; [] if it is text.

    Their ids are bare uint16 (nanoGPT), or follow a header that names their type and number (llm.c;
    FineWeb shards). Raises UserError for any other .bin file.
    """
    if source in EMBEDDED or _named(source)[0]:
        return []
    files, _ = _files(source)
    if kind(files[0]) != "bin":
        return []
    return [_token_file(path) for path in files]


def _token_file(path: Path) -> TokenFile:
    """The layout of a .bin file, by its header. Raises UserError unless its size fits."""
    with reading(path), open(path, "rb") as file:
        size = path.stat().st_size
        header = file.read(12)
    magic, version, count = (int.from_bytes(header[i : i + 4], "little") for i in (0, 4, 8))
    offset = LLM_C_HEADER
    dtype = LLM_C_TYPES.get((magic, version))
    if dtype is None and magic in LLM_C_MAGICS:
        raise UserError(
            f"{path} begins with {magic}, {version}, which marks a file of llm.c, but no token "
            "file: these begin with 20240520, 1 (uint16 ids) or 20240801, 7 (uint32 ids)."
        )
    if dtype is None:
        offset, count, dtype = 0, size // 2, "<u2"
    width = int(dtype[-1])
    if not size or size != offset + width * count:
        raise UserError(
            f"{path} ({size:,} bytes) does not hold uint16 token ids, bare or after llm.c's "
            "1024-byte header with their count, nor uint32 ids after such a header; to train on "
            "text next to it, give the text's own path."
        )
    return TokenFile(path, offset, count, dtype)


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


def _files(source: str) -> tuple[list[Path], list[Path]]:
    """(files to read, files that are left out): a file itself, or those in a folder, sorted."""
    root = Path(source)
    try:
        if root.is_file():
            return [root], []
        paths = [path for path in sorted(root.rglob("*")) if _is_visible_file(path, root)]
        exists = source and root.exists()
        is_folder = root.is_dir()
        files = _chosen(paths)
    except (OSError, ValueError) as error:  # too long, a NUL, a folder we may not read
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"Corpus {source[:80]!r} cannot be opened: {reason}.") from None
    if not exists:
        known = [*EMBEDDED, *NAMED]
        raise UserError(
            f"No corpus {source!r}{nearest(source, known)}; there is no file or folder "
            f"{root.absolute()}, and the named corpora are {', '.join(known)}."
        )
    if not is_folder:
        raise UserError(
            f"{source} is a pipe or a device, and a corpus is read more than once; save it to a "
            "file, like corpus.txt, and give that."
        )
    if not files:
        raise UserError(f"{source} holds no file of a known kind: {' '.join(KINDS)}.")
    chosen = set(files)
    return files, [path for path in paths if path not in chosen]


def _is_visible_file(path: Path, root: Path) -> bool:
    """Whether this is a regular file that is not hidden below `root`."""
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return not hidden and path.is_file()


def _chosen(paths: list[Path]) -> list[Path]:
    """Those files of a folder that are a corpus: its token files, else its text."""
    tokens = [path for path in paths if kind(path) == "bin"]
    if tokens:
        return tokens
    has_rows = any(kind(path) in ROWS for path in paths)
    return [path for path in paths if kind(path) and not _is_card(path, has_rows)]


def _is_card(path: Path, has_rows: bool) -> bool:
    """Whether a file describes the others: a readme of rows, or a dataset card of the hub."""
    if kind(path) != "text" or path.stem.lower() != "readme":
        return False
    if has_rows:
        return True
    with open(path, "rb") as file:
        return file.read(4) in (b"---\n", b"---\r")


def _hub(name: str, limit: int | None, position: Position) -> Iterator[str]:
    """Documents of a named corpus, streamed by `datasets`; the text is not kept on disk."""
    from crate_mini.data.rows import texts as fields_of_rows

    datasets = extra("datasets", "hub")
    builder, files = NAMED[name]
    position.total = limit
    with reading(
        f"Corpus {name} from the hub (if the network fails, run again: finished parts are kept)"
    ):
        rows = datasets.load_dataset(builder, data_files=HUB + files, split="train", streaming=True)
        texts = fields_of_rows(
            ((f"{name} row {number}", row) for number, row in enumerate(rows, 1)), name, position
        )
        if builder == "text":  # this builder yields lines
            texts = pieces((line + "\n" for line in texts), END, LONG)
        for number, text in enumerate(islice(texts, limit), 1):
            position.done = number
            yield text
