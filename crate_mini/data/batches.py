"""Batches of tokens from memory-mapped files: each is a pure function of (seed, split, step).

A text becomes documents (sources.py, formats.py, pydocs.py), token ids (tokenizer.py), token files
(token_files.py) and, here, batches.
"""

import bisect
import hashlib
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from crate_mini import UserError
from crate_mini.data.sources import check_text_field, describe
from crate_mini.data.token_files import FORMAT, SPLITS, prepare, token_file, total
from crate_mini.data.tokenizer import Tokenizer

OPEN_FILES = 48  # of each split at a time; macOS lets a process open 256


class TokenStream:
    """The tokens of one split, as if its files were one array.

    A file is mapped when it is first read, and OPEN_FILES stay mapped: a large corpus has more
    files than a process may open.
    """

    def __init__(self, folder: Path, parts: list[dict], split: str, dtype: np.dtype):
        self.paths = []
        self.starts = [0]  # index of each file's first token, then the total
        for number, part in enumerate(parts):
            count = part[split]["tokens"]
            if count:
                self.paths.append(token_file(folder, number, split))
                self.starts.append(self.starts[-1] + count)
        self.dtype = dtype
        self.array = lru_cache(OPEN_FILES)(self._map)

    def _map(self, number: int) -> np.ndarray:
        """The tokens of one file."""
        # A plain view: slicing numpy's memmap class costs several times as much.
        return np.memmap(self.paths[number], self.dtype, "r").view(np.ndarray)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count - 1 as int64."""
        end = start + count
        number = bisect.bisect_right(self.starts, start) - 1
        slices = []
        while start < end:
            first = self.starts[number]
            slices.append(self.array(number)[start - first : end - first])
            number += 1
            start = self.starts[number]
        return np.concatenate(slices, dtype=np.int64)


class Corpus:
    """The tokens of one source.

    n_tokens, n_bytes: {"train": n, "val": n}; bytes of the UTF-8 text. meta: a JSON-able dict of
    source, tokenizer and its hash, split rule, counts, hash of the text.
    """

    def __init__(self, folder: Path, meta: dict):
        parts = meta["parts"]
        self.n_tokens = {split: total(parts, "tokens", [split]) for split in SPLITS}
        self.n_bytes = {split: total(parts, "bytes", [split]) for split in SPLITS}
        left_out = ("parts", "complete", "reading")
        self.meta = {key: value for key, value in meta.items() if key not in left_out}
        self.meta["documents"] = sum(part["documents"] for part in parts)
        self.meta["tokens"] = self.n_tokens
        self.meta["bytes"] = self.n_bytes
        dtype = np.dtype(meta["dtype"])
        self.streams = {split: TokenStream(folder, parts, split, dtype) for split in SPLITS}

    def batch(
        self,
        seed: int,
        split: str,
        step: int,
        batch_size: int,
        block_size: int,
        rows: slice = slice(None),
    ):
        """Random windows (x, y), int64 (B, T) each, where y is one token ahead of x.

        Pure: the same arguments give the same batch. The B starts are uniform over all n - T
        windows, from a counter-based generator (Philox) keyed by the first three arguments. There
        is no state, so resuming is exact and evaluation cannot disturb training. numpy guarantees
        that Philox's raw output never changes, which it does not for `integers`; the bias of the
        modulo is below n / 2^64. rows: those to read, of the B. Raises UserError if the split is
        too short.
        """
        windows = self.n_tokens[split] - block_size
        if windows < 1:
            raise UserError(
                f"The {split} split has {self.n_tokens[split]:,} tokens, too few for a context "
                f"of {block_size}, which needs one more: lower --block-size or give more text."
            )
        key = hashlib.blake2b(f"{seed}/{split}/{step}".encode(), digest_size=16).digest()
        raw = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(batch_size)
        starts = (raw[rows] % np.uint64(windows)).tolist()
        stream = self.streams[split]
        tokens = torch.from_numpy(
            np.stack([stream.read(start, block_size + 1) for start in starts])
        )
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def blocks(
        self, split: str, batch_size: int, block_size: int, limit: int | None = None
    ) -> Iterator:
        """Consecutive windows in order, as batches (x, y) like those of `batch`.

        Each token but the first is predicted once. A last window shorter than T is a separate
        batch. limit: the most tokens to predict.
        """
        predicted = self.n_tokens[split] - 1
        if limit is not None:
            predicted = min(predicted, limit)
        windows, remainder = divmod(max(0, predicted), block_size)
        shapes = []
        for first in range(0, windows, batch_size):
            shapes.append((min(batch_size, windows - first), block_size))
        if remainder:
            shapes.append((1, remainder))
        start = 0
        for rows, columns in shapes:
            ids = torch.from_numpy(self.streams[split].read(start, rows * columns + 1))
            yield ids[:-1].view(rows, columns), ids[1:].view(rows, columns)
            start += rows * columns


def open_corpus(
    source: str,
    tokenizer: Tokenizer,
    cache_dir=None,
    val_fraction: float = 0.1,
    workers: int | None = None,
    log=print,
    text_field: str | None = None,
) -> Corpus:
    """The Corpus of `source`, from the cache if its files still fit, else tokenized now.

    A document's hash decides whether it goes to "val". A source of fewer than 100 documents is cut
    instead: its last `val_fraction` is "val" (0 and 1 leave one split empty). Token files (.bin)
    are cut in the same way, unless some have "val" in their names: those are "val" then. The cache
    is cache_dir, else $CRATE_CACHE, else ~/.cache/crate_mini; its files are verified by sha256.

    workers: threads, by default one per core. text_field: the field of rows (.jsonl, .csv and so
    on) to read, by default "text"; see rows.py. Raises UserError for a source that cannot be read
    (see sources.py), a split that would be empty, and a cache that cannot be written.
    """
    if not 0 <= val_fraction <= 1:
        raise UserError(
            f"val_fraction is {val_fraction}; expected a fraction from 0 to 1, such as 0.1."
        )
    identity = {
        "format": FORMAT,
        "source": describe(source),
        "tokenizer": tokenizer.name,
        "tokenizer_hash": tokenizer.hash,
        "dtype": np.dtype(tokenizer.dtype).name,
        "val_fraction": val_fraction,
    }
    if text_field:
        check_text_field(source, text_field)
        identity["text_field"] = text_field
    folder = _cache_folder(source, identity, cache_dir)
    meta = prepare(folder, identity, source, tokenizer, workers, log)
    corpus = Corpus(folder, meta)
    for split, share in (("train", 1 - val_fraction), ("val", val_fraction)):
        if share > 0 and corpus.n_tokens[split] < 2:
            raise UserError(
                f"The {split} split of {source} would have {corpus.n_tokens[split]} of "
                f"{sum(corpus.n_tokens.values())} tokens: give more text or another val_fraction "
                f"than {val_fraction}."
            )
    return corpus


def _cache_folder(source: str, identity: dict, cache_dir=None) -> Path:
    """The folder for a source's token files; files of the same name elsewhere get another one."""
    location = source
    if "files" in identity["source"]:
        location = str(Path(source).resolve())
    label = f"{location} {identity['tokenizer_hash']} {identity['val_fraction']}"
    if "text_field" in identity:
        label += f" {identity['text_field']}"
    key = hashlib.sha256(os.fsencode(label)).hexdigest()[:8]
    name = f"{identity['source']['name'][:40]}-{identity['tokenizer'][:40]}-{key}"
    return _cache_root(cache_dir) / re.sub(r"[^\w.-]+", "-", name)


def _cache_root(cache_dir=None) -> Path:
    """The folder of all caches."""
    root = cache_dir or os.environ.get("CRATE_CACHE")
    if root:
        return Path(root)
    try:
        return Path.home() / ".cache" / "crate_mini"
    except RuntimeError:
        raise UserError(
            "no home folder is known for the cache of prepared text; name a folder that can be "
            "written, like CRATE_CACHE=/tmp/crate_mini python train.py."
        ) from None
