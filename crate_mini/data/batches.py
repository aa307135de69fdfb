"""Batches of tokens from memory-mapped files; a batch is a pure function of (seed, split, step).

documents (corpora.py, formats.py, pydocs.py) -> ids (tokenizer.py) -> token files (prepare.py) -> batches
"""

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from crate_mini import UserError
from crate_mini.data.sources import describe
from crate_mini.data.token_files import FORMAT, SPLITS, prepare, shard
from crate_mini.data.tokenizer import Tokenizer, load_tokenizer, train_bpe

__all__ = ["Corpus", "Tokenizer", "load_tokenizer", "open_corpus", "train_bpe"]


class Corpus:
    """The tokens of one source.

    n_tokens, n_bytes: by split, "train" and "val"; bytes are those of the UTF-8 text.
    meta: JSON-able; source, tokenizer and its hash, split rule, counts, hash of the text.
    """

    def __init__(self, folder: Path, meta: dict):
        parts, dtype = meta["parts"], np.dtype(meta["dtype"])
        self.n_tokens = {split: sum(part[split]["tokens"] for part in parts) for split in SPLITS}
        self.n_bytes = {split: sum(part[split]["bytes"] for part in parts) for split in SPLITS}
        self.meta = {key: value for key, value in meta.items() if key not in ("parts", "complete")}
        self.meta |= {
            "documents": sum(part["documents"] for part in parts),
            "tokens": self.n_tokens,
            "bytes": self.n_bytes,
        }
        self._shards, self._starts = (
            {},
            {},
        )  # by split: arrays, and the index of each one's first token
        for split in SPLITS:
            numbers = [number for number, part in enumerate(parts) if part[split]["tokens"]]
            # A plain view: slicing numpy's memmap class costs several times as much.
            self._shards[split] = [
                np.memmap(shard(folder, number, split), dtype, "r").view(np.ndarray)
                for number in numbers
            ]
            self._starts[split] = np.cumsum(
                [0] + [parts[number][split]["tokens"] for number in numbers]
            )

    def batch(self, seed: int, split: str, step: int, batch_size: int, block_size: int):
        """Random windows (x, y): int64 (B, T) each, y one token ahead of x. Pure: same arguments, same batch.

        The B starts are uniform over all n - T windows, from a counter-based generator (Philox) keyed by the
        first three arguments. No state: resuming is exact, evaluation cannot disturb training. numpy keeps
        Philox's raw output stable for good, which it does not promise of `integers`; the modulo is off by
        less than n / 2^64.
        Raises UserError when the split is too short.
        """
        windows = self.n_tokens[split] - block_size
        if windows < 1:
            raise UserError(
                f"The {split} split has {self.n_tokens[split]:,} tokens, too few for a context "
                f"of {block_size}, which needs one more: lower --block-size or give more text."
            )
        key = hashlib.blake2b(f"{seed}/{split}/{step}".encode(), digest_size=16).digest()
        raw = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(batch_size)
        starts = (raw % np.uint64(windows)).tolist()
        rows = torch.from_numpy(
            np.stack([self._read(split, start, block_size + 1) for start in starts])
        )
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def blocks(
        self, split: str, batch_size: int, block_size: int, limit: int | None = None
    ) -> Iterator:
        """Consecutive windows in order, in batches (x, y): each token after the first is predicted once.

        The last window, if shorter than T, is a batch of its own. limit: predict at most so many tokens.
        """
        total = self.n_tokens[split] - 1
        total = max(0, total if limit is None else min(total, limit))
        whole, ragged = divmod(total, block_size)
        shapes = [(min(batch_size, whole - row), block_size) for row in range(0, whole, batch_size)]
        start = 0
        for rows, columns in shapes + [(1, ragged)] * (ragged > 0):
            ids = torch.from_numpy(self._read(split, start, rows * columns + 1))
            yield ids[:-1].view(rows, columns), ids[1:].view(rows, columns)
            start += rows * columns

    def _read(self, split: str, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count - 1 of the split as int64, across the borders of files."""
        shards, starts, end = self._shards[split], self._starts[split], start + count
        number, pieces = int(np.searchsorted(starts, start, "right")) - 1, []
        while start < end:
            pieces.append(shards[number][start - starts[number] : end - starts[number]])
            number, start = number + 1, starts[number + 1]
        return np.concatenate(pieces, dtype=np.int64)


def open_corpus(
    source: str,
    tokenizer: Tokenizer,
    cache_dir=None,
    val_fraction: float = 0.1,
    workers: int | None = None,
    log=print,
) -> Corpus:
    """The token files of `source`: built now, or reused if source, tokenizer and split are still the same.

    A document goes to "val" if its hash says so. A source of fewer than 100 documents is cut instead: its
    last `val_fraction` is "val" (0 and 1 leave one split empty). Token files (.bin) are cut likewise, unless
    some have "val" in their names: those are "val" then. The files lie in cache_dir, else $CRATE_CACHE, else
    ~/.cache/crate_mini; their sha256 are checked on opening. workers: threads, by default one per core.
    Raises UserError for a bad source (see corpora.py), an empty split, a cache that cannot be written.
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
    # One folder per place, so that two files of the same name do not take turns in one.
    place = str(Path(source).resolve()) if "files" in identity["source"] else source
    key = hashlib.sha256(f"{place} {tokenizer.hash} {val_fraction}".encode()).hexdigest()[:8]
    root = Path(cache_dir or os.environ.get("CRATE_CACHE") or Path.home() / ".cache" / "crate_mini")
    name = re.sub(
        r"[^\w.-]+", "-", f"{identity['source']['name'][:40]}-{tokenizer.name[:40]}-{key}"
    )
    corpus = Corpus(root / name, prepare(root / name, identity, source, tokenizer, workers, log))
    for split, wanted in (("train", val_fraction < 1), ("val", val_fraction > 0)):
        if wanted and corpus.n_tokens[split] < 2:
            raise UserError(
                f"The {split} split of {source} would have {corpus.n_tokens[split]} of "
                f"{sum(corpus.n_tokens.values())} tokens: give more text or another val_fraction "
                f"than {val_fraction}."
            )
    return corpus
