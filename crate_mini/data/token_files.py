"""Token files: built from documents, verified, resumed, reused. The folder of one corpus holds

    00000.train.bin ...     token ids of part 0, uint16 (uint32 for more than 65,536 ids)
    00000.val.bin ...       the same for validation
    corpus.json             source, tokenizer, split rule; for each part its counts and sha256

A part is PART tokens of consecutive documents; its entry in corpus.json is written after its files.
An interrupted build therefore loses at most one part, and a rerun ends with the same bytes as a
build without interruption.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from crate_mini import UserError
from crate_mini.console import terminal
from crate_mini.console.results import atomic_write, read_bytes
from crate_mini.data.formats import Position
from crate_mini.data.sources import TokenFile, documents, is_held_out, notes, pretokenized
from crate_mini.data.tokenizer import Tokenizer

try:
    import fcntl
except ImportError:  # Windows: two processes may build the same files
    fcntl = None

FORMAT = 1  # of the token files; raise it when their meaning changes
READING = 2  # of sources; raise it when the same files give other text, so that caches are rebuilt
PART = 1 << 24  # tokens of a part: 32 MB as uint16
BATCH = 1 << 22  # characters tokenized, or ready-made ids copied, at a time
FEW = 100  # with fewer documents than this, the stream is cut instead of split by hash
SPLITS = ("train", "val")
FEWEST_BARE = 64  # ids of a file without a header from which their width can be guessed
HEADER_ADVICE = "uint32 ids need llm.c's header: 256 int32 that begin with 20240801, 7, count"


class Piece(NamedTuple):
    """A document, or one side of a document that the split cuts in two."""

    split: str
    content: str | np.ndarray  # text, or ids
    n_bytes: int  # of the text as UTF-8


def prepare(folder: Path, identity: dict, source: str, tokenizer: Tokenizer, workers, log) -> dict:
    """Make `folder` hold the tokens of `source`, reusing the files that fit `identity`.

    workers: threads (None: one per core). log: called with each progress line. Returns the content
    of corpus.json. Raises UserError as open_corpus does.
    """
    with _locked(folder, log):
        meta = _reusable(folder, {**identity, "reading": READING}, log)
        if not meta["complete"]:
            _build(folder, meta, source, tokenizer, workers, log)
    return meta


def token_file(folder: Path, number: int, split: str) -> Path:
    """The file of one part's tokens."""
    return folder / f"{number:05d}.{split}.bin"


def total(parts: list[dict], unit: str, splits=SPLITS) -> int:
    """The "tokens" or "bytes" of parts in these splits together."""
    return sum(part[split][unit] for part in parts for split in splits)


@contextmanager
def _locked(folder: Path, log):
    """One process builds, the others wait. Without a lock a complete cache can still be read."""
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Closing unlocks, and so does a kill.
            lock = stack.enter_context(open(folder / "lock", "w"))
            if fcntl:
                _acquire(lock, folder, log)
        except OSError:
            pass  # if anything has to be written, atomic_write reports the reason
        yield


def _acquire(lock, folder: Path, log):
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log(f"waiting for another process that prepares {folder.name}")
        fcntl.flock(lock, fcntl.LOCK_EX)


# ---- reuse ---------------------------------------------------------------------------------------


def _reusable(folder: Path, identity: dict, log) -> dict:
    """corpus.json without its damaged parts, if it fits `identity`; otherwise a fresh start."""
    fresh = {**identity, "split": None, "parts": [], "complete": False}
    try:
        meta = json.loads(read_bytes(folder / "corpus.json"))
        if meta.pop("sha256") != _sha256(json.dumps(meta).encode()):
            raise ValueError
        if {key: meta.get(key) for key in identity} != identity:
            log(f"{folder.name}: {_difference(meta, identity)}; rebuilding its token files")
            return fresh
        for number, part in enumerate(meta["parts"]):
            if not _intact(folder, number, part):
                log(f"{folder.name}: part {number} is damaged; rebuilding from there")
                return {**meta, "parts": meta["parts"][:number], "complete": False}
        return {**fresh, **meta}
    except FileNotFoundError:
        return fresh
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = f" ({error.strerror})" if isinstance(error, OSError) else ""
        log(f"{folder.name}: corpus.json is damaged{reason}; rebuilding")
        return fresh


def _difference(meta: dict, identity: dict) -> str:
    """Why token files cannot be reused, in words."""
    if meta.get("reading") != identity["reading"]:
        return "made by an earlier version, which read some files otherwise"
    return "the source has changed"


def _intact(folder: Path, number: int, part: dict) -> bool:
    """Whether both files of a part have the sha256 that corpus.json names."""
    for split in SPLITS:
        path = token_file(folder, number, split)
        if not path.exists() or _sha256(read_bytes(path)) != part[split]["sha256"]:
            return False
    return True


def _sha256(data) -> str:
    return hashlib.sha256(data).hexdigest()


def _save(folder: Path, meta: dict):
    """Write corpus.json with its sha256: a wrong count would silently falsify measurements."""
    content = {**meta, "sha256": _sha256(json.dumps(meta).encode())}
    with atomic_write(folder / "corpus.json") as file:
        file.write(json.dumps(content, indent=1).encode())


# ---- build ---------------------------------------------------------------------------------------


def _build(folder: Path, meta: dict, source: str, tokenizer: Tokenizer, workers, log):
    """Tokenize the documents that meta["parts"] lacks, until meta and the files are complete."""
    parts = meta["parts"]
    documents_before = sum(part["documents"] for part in parts)
    tokens_before = total(parts, "tokens")
    if documents_before:
        log(f"{source}: continuing after document {documents_before:,}")
    else:
        log(f"{source}: token files go to {folder}")

    def log_printable(line):  # names of files and fields may hold anything
        log(terminal.printable(line))

    for note in notes(source):
        log_printable(note)
    files = pretokenized(source)
    text_field = meta.get("text_field")
    if meta["split"] is None:  # a resumed build keeps the rule it began with
        meta["split"] = _split_rule(source, files, text_field, meta["val_fraction"], log)
    position = Position(log=log_printable)
    digest = hashlib.sha256()
    # Skipping reads the text again; that is cheap compared with tokenizing it, and the digest must
    # see all of it.
    if files:
        pieces = _split_files(files, meta["split"], tokenizer, position)
        pieces = islice(pieces, documents_before, None)
    else:
        texts = documents(source, position, text_field)
        pieces = _split_texts(texts, meta["split"], meta["val_fraction"], digest)
        pieces = _encoded(islice(pieces, documents_before, None), tokenizer, workers)
    start = time.monotonic()
    for part in _parts(pieces, tokenizer.dtype):
        _add_part(folder, meta, part, position)
        if total(parts[-1:], "tokens") >= PART:
            tokens = total(parts, "tokens")
            rate = (tokens - tokens_before) / (time.monotonic() - start)
            log(_progress_line(source, tokens, rate, position))
    meta["complete"] = True
    meta["text_sha256"] = None if files else digest.hexdigest()
    _save(folder, meta)
    _remove_leftovers(folder, len(parts))
    log(_summary_line(source, meta))
    if position.skipped:
        log(f"note      {source}: rows skipped because their text is null: {position.skipped:,}")


def _share_read(position: Position) -> float | None:
    """The share of the source that has been read; None if its size is not known."""
    return position.done / position.total if position.total else None


class Part:
    """The documents of a part, their ids in two buffers: short documents take no more memory."""

    def __init__(self, dtype):
        self.dtype = np.dtype(dtype)
        self.documents = 0
        self.n_tokens = 0
        self.ids = {split: bytearray() for split in SPLITS}
        self.n_bytes = dict.fromkeys(SPLITS, 0)

    def add(self, piece: Piece):
        """Add an encoded piece."""
        self.documents += 1
        self.n_tokens += len(piece.content)
        self.ids[piece.split] += piece.content.astype(self.dtype, copy=False).tobytes()
        self.n_bytes[piece.split] += piece.n_bytes


def _parts(pieces: Iterator[Piece], dtype) -> Iterator[Part]:
    """Consecutive pieces as parts, each of at least PART tokens except the last."""
    part = Part(dtype)
    for piece in pieces:
        part.add(piece)
        if part.n_tokens >= PART:
            yield part
            part = Part(dtype)
    if part.documents:
        yield part


def _add_part(folder: Path, meta: dict, part: Part, position: Position):
    """Write the next part, and corpus.json with it."""
    parts = meta["parts"]
    tokens = total(parts, "tokens") + part.n_tokens
    try:
        parts.append(_write_part(folder, len(parts), part))
        _save(folder, meta)
    except UserError as error:
        share = _share_read(position)
        about = "about" if share else "more than"
        megabytes = tokens * part.dtype.itemsize / (share or 1) / 1e6
        raise UserError(
            f"{error} The token files take {about} {megabytes:,.0f} MB; "
            "CRATE_CACHE=FOLDER puts them elsewhere."
        ) from None


def _write_part(folder: Path, number: int, part: Part) -> dict:
    """Write a part as two files; returns its entry for corpus.json."""
    entry = {"documents": part.documents}
    for split in SPLITS:
        ids = part.ids[split]
        entry[split] = {
            "tokens": len(ids) // part.dtype.itemsize,
            "bytes": part.n_bytes[split],
            "sha256": _sha256(ids),
        }
        with atomic_write(token_file(folder, number, split)) as file:
            file.write(ids)
    return entry


def _remove_leftovers(folder: Path, n_parts: int):
    """Delete files left by a killed run, or by a longer text that had this folder before."""
    current = {token_file(folder, number, split) for number in range(n_parts) for split in SPLITS}
    for path in [*folder.glob("*.tmp"), *folder.glob("*.bin")]:
        if path not in current:
            path.unlink()


def _progress_line(source: str, tokens: int, rate: float, position: Position) -> str:
    """The progress of a build as text; rate: tokens per second since it started."""
    line = f"{source}: {tokens / 1e6:,.1f} M tokens, {rate / 1e6:.2f} M tokens/s"
    share = _share_read(position)
    if share:
        line += f", ETA {terminal.eta(tokens * (1 / share - 1) / rate)}"
    return line


def _summary_line(source: str, meta: dict) -> str:
    """Size and identity of a finished corpus."""
    parts = meta["parts"]
    n_documents = sum(part["documents"] for part in parts)
    line = f"{source}: {total(parts, 'bytes'):,} bytes of text, documents: {n_documents:,}"
    for key, value in meta["source"].items():
        if isinstance(value, str):
            line += f", {key} {value}"
    if meta["text_sha256"]:
        line += f", sha256 {meta['text_sha256'][:16]}"
    return line


# ---- train or val --------------------------------------------------------------------------------


def _split_rule(source: str, files: list, text_field, val_fraction: float, log) -> dict:
    """The rule that splits documents, for corpus.json.

    {"rule": "cut", "at": n}: "val" is all after n bytes of text, or n tokens of token files.
    """
    if files:
        if len({_is_val(file.path) for file in files}) == 2:
            return {"rule": "file name"}
        sizes = [file.count for file in files]
    else:
        # Looks at up to FEW documents; if there are fewer, these are all, with their sizes.
        texts = documents(source, text_field=text_field)
        sizes = [len(text.encode()) for text in islice(texts, FEW)]
        if not sizes:
            raise UserError(f"{source} is empty: expected text.")
        if len(sizes) == FEW:
            return {"rule": "document hash"}
        log(
            f"{source}: too few documents ({len(sizes)}); "
            f"validation is the last {val_fraction:.0%} of the text"
        )
    return {"rule": "cut", "at": round(sum(sizes) * (1 - val_fraction))}


def _is_val(path: Path) -> bool:
    """By name: nanoGPT writes val.bin, llm.c fineweb_val_000000.bin."""
    return "val" in path.name


def _split_texts(texts: Iterator[str], rule: dict, val_fraction: float, digest) -> Iterator[Piece]:
    """The pieces of each document, as text; `digest` hashes all of it."""
    start = 0  # of the document, in bytes of the whole text
    for text in texts:
        raw = text.encode()
        digest.update(raw)
        if rule["rule"] == "document hash":
            split = "val" if is_held_out(raw, val_fraction) else "train"
            yield Piece(split, text, len(raw))
            continue
        left = _cut_at_blank(text, raw, rule["at"] - start)
        right = text[len(left) :]
        if left:
            yield Piece("train", left, len(left.encode()))
        if right:
            yield Piece("val", right, len(right.encode()))
        start += len(raw)


def _cut_at_blank(text: str, raw: bytes, n_bytes: int) -> str:
    """The beginning of `text` (UTF-8: `raw`), at most n_bytes long, that ends at a blank."""
    left = raw[: max(0, n_bytes)].decode("utf-8", "ignore")  # no half character at the end
    if len(left) == len(text):
        return left
    last_blank = max(left.rfind("\n"), left.rfind(" "))
    return left[: last_blank + 1] or left


def _encoded(pieces: Iterator[Piece], tokenizer: Tokenizer, workers: int | None) -> Iterator[Piece]:
    """The same pieces as ids with eot at the end; BATCH characters of text in memory at a time."""
    for group in _groups(pieces, BATCH):
        encoded = tokenizer.encode_batch([piece.content for piece in group], workers)
        for piece, ids in zip(group, encoded):
            eot = ids.dtype.type(tokenizer.eot)
            yield piece._replace(content=np.append(ids, eot))


def _split_files(
    files: list[TokenFile], rule: dict, tokenizer: Tokenizer, position: Position
) -> Iterator[Piece]:
    """The pieces of ready-made token files, at most BATCH ids each; position counts ids."""
    lengths = [len(tokenizer.token_bytes(i)) for i in range(tokenizer.eot)]
    lengths = np.array([*lengths, 0])  # in bytes; eot spells nothing
    position.total = sum(file.count for file in files)
    for file in files:
        width = int(file.dtype[-1])
        for start in range(0, file.count, BATCH):
            count = min(BATCH, file.count - start)
            ids = np.fromfile(file.path, file.dtype, count, offset=file.offset + width * start)
            _check_ids(ids, file, start, tokenizer)
            if rule["rule"] == "cut":
                cut = max(0, rule["at"] - position.done)
            else:
                cut = 0 if _is_val(file.path) else len(ids)
            for split, piece in (("train", ids[:cut]), ("val", ids[cut:])):
                if len(piece):
                    yield Piece(split, piece, int(lengths[piece].sum()))
            position.done += len(ids)


def _check_ids(ids: np.ndarray, file: TokenFile, start: int, tokenizer: Tokenizer):
    """Raise UserError for ids that are none of the tokenizer's, or that are read too narrowly."""
    highest = ids.max()
    bare = file.offset == 0
    if bare and start == 0 and len(ids) >= FEWEST_BARE and not ids[1::2].any() and highest:
        raise UserError(
            f"{file.path} has no header, and every second uint16 in it is 0, so it seems to hold "
            f"uint32 ids; {HEADER_ADVICE}."
        )
    if highest > tokenizer.eot:
        other = ""
        if bare:
            wide = ids[: len(ids) // 2 * 2].view("<u4").max(initial=0)
            other = (
                "; it has no header, so its ids were read as uint16 (as uint32, the highest would "
                f"be {wide}, but {HEADER_ADVICE})"
            )
        raise UserError(
            f"{file.path} holds id {highest}, but tokenizer {tokenizer.name} has only "
            f"{tokenizer.vocab_size} ids: choose the one it was made with{other}."
        )


def _groups(pieces: Iterator[Piece], size: int) -> Iterator[list[Piece]]:
    """Lists of consecutive pieces, each of at least `size` characters except the last."""
    group = []
    total = 0
    for piece in pieces:
        group.append(piece)
        total += len(piece.content)
        if total >= size:
            yield group
            group = []
            total = 0
    if group:
        yield group
