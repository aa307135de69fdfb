"""Token files: made from documents, checked, resumed, reused. The folder of one corpus holds

    00000.train.bin ...     token ids of part 0, uint16 (uint32 for more than 65,536 ids)
    00000.val.bin ...       the same for validation
    corpus.json             source, tokenizer, split rule; for each part its counts and sha256

A part is PART tokens of consecutive documents; its entry in corpus.json is written after its files. So an
interrupted build loses one part at most, and a rerun ends with the same bytes as an undisturbed one.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

import numpy as np

from crate_mini import UserError, atomic_write
from crate_mini.data.formats import Position
from crate_mini.data.sources import documents, held_out, token_files
from crate_mini.data.tokenizer import Tokenizer

try:
    import fcntl
except ImportError:  # Windows, where two first runs at once are not kept apart
    fcntl = None

FORMAT = 1  # of the token files; raise it when their meaning changes
PART = 1 << 24  # tokens of a part: 32 MB as uint16
BATCH = 1 << 22  # characters tokenized, or ready-made ids copied, at a time
FEW = 100  # with fewer documents than this, the stream is cut instead of dealt out by hash
SPLITS = ("train", "val")


def prepare(folder: Path, identity: dict, source: str, tokenizer: Tokenizer, workers, log) -> dict:
    """Make `folder` hold the tokens of `source`, reusing what fits `identity`; returns what corpus.json says.

    workers: threads (None: one per core). log: called with each line of progress. Errors as open_corpus.
    """
    with _locked(folder, log):
        meta = _reusable(folder, identity, log)
        if not meta["complete"]:
            _build(folder, meta, source, tokenizer, workers, log)
    return meta


def shard(folder: Path, number: int, split: str) -> Path:
    """The file of one part's tokens."""
    return folder / f"{number:05d}.{split}.bin"


@contextmanager
def _locked(folder: Path, log):
    """One process builds, the others wait. Where no lock can be made, a complete cache can still be read."""
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(
                open(folder / "lock", "w")
            )  # closing unlocks, and so does a kill
            try:
                fcntl and fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log(f"waiting for another process that prepares {folder.name}")
                fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass  # if there is something to write, atomic_write will tell why it cannot be
        yield


def _reusable(folder: Path, identity: dict, log) -> dict:
    """corpus.json, less its damaged parts, if it is about this source and tokenizer; else a fresh start."""
    fresh = {**identity, "split": None, "parts": [], "complete": False}
    try:
        meta = json.loads((folder / "corpus.json").read_bytes())
        if meta.pop("sha256") != _sha256(json.dumps(meta).encode()):
            raise ValueError
        if {key: meta[key] for key in identity} != identity:
            log(f"{folder.name}: the source has changed; building its token files anew")
            return fresh
        for number, part in enumerate(meta["parts"]):
            files = [(shard(folder, number, split), part[split]["sha256"]) for split in SPLITS]
            if not all(
                path.exists() and _sha256(path.read_bytes()) == sha256 for path, sha256 in files
            ):
                log(f"{folder.name}: part {number} is damaged; building again from there")
                return {**meta, "parts": meta["parts"][:number], "complete": False}
        return {**fresh, **meta}
    except FileNotFoundError:
        return fresh
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        log(f"{folder.name}: corpus.json is damaged ({type(error).__name__}); building anew")
        return fresh


def _sha256(data) -> str:
    return hashlib.sha256(data).hexdigest()


def _build(folder: Path, meta: dict, source: str, tokenizer: Tokenizer, workers, log):
    """Tokenize the documents that meta["parts"] lacks; on return meta and the files are complete."""
    parts, position, digest = meta["parts"], Position(), hashlib.sha256()
    done, before, began = sum(part["documents"] for part in parts), _tokens(parts), time.monotonic()
    log(
        f"{source}: going on after document {done:,}"
        if done
        else f"{source}: token files go to {folder}"
    )
    files = token_files(source)
    # Recorded with the first part: a resumed build deals out documents by the rule it began with.
    meta["split"] = meta["split"] or _split_rule(source, files, meta["val_fraction"], log)
    # Skipping reads the text again, which is cheap beside tokenizing it, and lets the digest see all of it.
    if files:
        items = islice(_from_files(files, meta["split"], tokenizer, position), done, None)
    else:
        texts = _from_text(documents(source, position), meta["split"], meta["val_fraction"], digest)
        items = _encoded(islice(texts, done, None), tokenizer, workers)
    for group in _groups(items, PART):
        share = (
            position.done / position.total if position.total else None
        )  # of the source, read so far
        size = (_tokens(parts) + sum(len(ids) for _, ids, _ in group)) * np.dtype(
            tokenizer.dtype
        ).itemsize
        try:
            parts.append(_write_part(folder, len(parts), group, tokenizer.dtype))
            _save(folder, meta)
        except UserError as error:
            about = "about" if share else "more than"
            raise UserError(
                f"{error} The token files take {about} {size / (share or 1) / 1e6:,.0f} MB; "
                "CRATE_CACHE=FOLDER puts them elsewhere."
            ) from None
        if _tokens(parts[-1:]) >= PART:
            rate = (_tokens(parts) - before) / (time.monotonic() - began)
            left = f", ETA {_tokens(parts) * (1 / share - 1) / rate:,.0f} s" if share else ""
            log(
                f"{source}: {_tokens(parts) / 1e6:,.1f} M tokens, {rate / 1e6:.2f} M tokens/s{left}"
            )
    meta |= {"complete": True, "text_sha256": None if files else digest.hexdigest()}
    _save(folder, meta)
    ours = {shard(folder, number, split) for number in range(len(parts)) for split in SPLITS}
    for path in {*folder.glob("*.tmp"), *folder.glob("*.bin")} - ours:
        path.unlink()  # left by a killed run, or by a longer text that stood here before
    size = sum(part[split]["bytes"] for part in parts for split in SPLITS)
    log(
        f"{source}: {size:,} bytes of text in {sum(part['documents'] for part in parts):,} documents"
        + "".join(
            f", {key} {value}" for key, value in meta["source"].items() if isinstance(value, str)
        )
        + ("" if files else f", sha256 {digest.hexdigest()[:16]}")
    )


def _save(folder: Path, meta: dict):
    """corpus.json, with a sha256 of its own: a wrong count in it would make a wrong measurement, silently."""
    with atomic_write(folder / "corpus.json") as file:
        file.write(
            json.dumps({**meta, "sha256": _sha256(json.dumps(meta).encode())}, indent=1).encode()
        )


def _tokens(parts: list[dict]) -> int:
    """Tokens of `parts`, both splits together."""
    return sum(part[split]["tokens"] for part in parts for split in SPLITS)


def _write_part(folder: Path, number: int, group: list, dtype) -> dict:
    """Write `group`, items (split, ids, bytes), as two files; returns their entry for corpus.json."""
    part = {"documents": len(group)}
    for split in SPLITS:
        ids = [ids for where, ids, _ in group if where == split]
        ids = np.concatenate([np.empty(0, dtype), *ids], dtype=dtype)
        size = sum(size for where, _, size in group if where == split)
        part[split] = {"tokens": len(ids), "bytes": size, "sha256": _sha256(ids)}
        with atomic_write(shard(folder, number, split)) as file:
            file.write(ids)
    return part


def _split_rule(source: str, files: list, val_fraction: float, log) -> dict:
    """Who is "val". {"rule": "cut", "at": n}: all after n bytes of text (n tokens of token files)."""
    if files:
        if len({_is_val(path) for path, _, _ in files}) == 2:
            return {"rule": "file name"}
        sizes = [count for _, _, count in files]
    else:
        # A look ahead: it ends after FEW documents, or has seen the whole source and knows its size.
        sizes = [len(text.encode()) for text in islice(documents(source), FEW)]
        if not sizes:
            raise UserError(f"{source} is empty: expected text.")
        if len(sizes) == FEW:
            return {"rule": "document hash"}
        log(
            f"{source}: only {len(sizes)} documents; validation is the last {val_fraction:.0%} of the text"
        )
    return {"rule": "cut", "at": round(sum(sizes) * (1 - val_fraction))}


def _is_val(path: Path) -> bool:
    """nanoGPT writes train.bin and val.bin, llm.c fineweb_train_000001.bin and fineweb_val_000000.bin."""
    return "val" in path.name


def _from_text(texts: Iterator[str], split: dict, val_fraction: float, digest) -> Iterator[tuple]:
    """(split, text, bytes) of each document; the one that a cut falls into becomes two, parted at a blank."""
    seen = 0
    for text in texts:
        raw = text.encode()
        digest.update(raw)
        if split["rule"] == "document hash":
            yield "val" if held_out(raw, val_fraction) else "train", text, len(raw)
            continue
        left = raw[: max(0, split["at"] - seen)].decode(
            "utf-8", "ignore"
        )  # no half character at its end
        if len(left) < len(text):
            left = left[: max(left.rfind("\n"), left.rfind(" ")) + 1 or len(left)]
        for name, piece in (("train", left), ("val", text[len(left) :])):
            if piece:
                yield name, piece, len(piece.encode())
        seen += len(raw)


def _encoded(items: Iterator[tuple], tokenizer: Tokenizer, workers: int | None) -> Iterator[tuple]:
    """(split, ids, bytes) of each document, eot at its end; BATCH characters of text are held at a time."""
    for group in _groups(items, BATCH):
        splits, texts, sizes = zip(*group)
        ids = tokenizer.encode_batch(texts, workers)
        yield from zip(splits, (np.append(i, i.dtype.type(tokenizer.eot)) for i in ids), sizes)


def _from_files(
    files: list, split: dict, tokenizer: Tokenizer, position: Position
) -> Iterator[tuple]:
    """(split, ids, bytes of the text they spell) of each stretch of token files; eot spells none."""
    lengths = np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.eot)] + [0])
    position.total = sum(count for _, _, count in files)
    for path, offset, count in files:
        for start in range(0, count, BATCH):
            ids = np.fromfile(path, "<u2", min(BATCH, count - start), offset=offset + 2 * start)
            if ids.max() > tokenizer.eot:
                raise UserError(
                    f"{path} holds id {ids.max()}, but tokenizer {tokenizer.name} has only "
                    f"{tokenizer.vocab_size} ids: choose the one it was made with."
                )
            if split["rule"] == "cut":
                at = max(0, split["at"] - position.done)
            else:
                at = 0 if _is_val(path) else len(ids)
            for name, piece in (("train", ids[:at]), ("val", ids[at:])):
                if len(piece):
                    yield name, piece, int(lengths[piece].sum())
            position.done += len(ids)


def _groups(items: Iterator[tuple], size: int) -> Iterator[list]:
    """Lists of consecutive items, each of at least `size` tokens or characters except the last."""
    group, total = [], 0
    for item in items:
        group.append(item)
        total += len(item[1])
        if total >= size:
            yield group
            group, total = [], 0
    if group:
        yield group
