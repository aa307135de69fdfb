"""Held-out documents, split into two parts, "fit" and "score", that share no document.

    documents -> part_of -> chunks of at most T tokens -> batches of chunks of similar length

Tables, labels and patterns come from the fit part; they are judged on the score part. Everything
is read in bounded memory.
"""

import hashlib
from typing import NamedTuple

import numpy as np

PARTS = ("fit", "score")
WINDOW = 64  # tokens; the windows of a chunk lie side by side from its start
LONGEST = 1 << 16  # tokens of a document
MAX_BIGRAMS = 1 << 22  # distinct bigrams counted at a time
LEAST = 3  # occurrences of a bigram that counts as frequent


def documents(corpus, split, eot):
    """Yield (number, ids int64) of each non-empty document between the `eot` tokens of a split.

    A stretch longer than a sixteenth of the split, or than LONGEST, counts as several documents.
    That bounds the memory, and lets a single long text fill both parts.
    """
    longest = max(4 * WINDOW, min(LONGEST, corpus.n_tokens[split] // 16))
    number = 0
    rest = None
    for x, y in corpus.blocks(split, 16, 1024):
        if rest is None:
            rest = x[0, :1].numpy()  # the first token of the split, which no y holds
        ids = np.concatenate((rest, y.numpy().ravel()))
        *complete, last = np.split(ids, np.flatnonzero(ids == eot))
        for piece in complete:
            document = _without_eot(piece, eot)
            for start in range(0, len(document), longest):
                yield number, document[start : start + longest]
                number += 1
        rest = _without_eot(last, eot)  # it may continue in the next block
        while len(rest) > longest:
            yield number, rest[:longest]
            number += 1
            rest = rest[longest:]
    if rest is not None and len(rest):
        yield number, rest


def _without_eot(piece, eot):
    """A piece of text without the eot that it begins with, if any."""
    return piece[1:] if len(piece) and piece[0] == eot else piece


def part_of(number, seed, share=1.0):
    """The part of a document: "fit", "score", or None if it is not among the `share` in use."""
    digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "little") / 2**64  # uniform in [0, 1)
    if place >= share:
        return None
    return "fit" if place < share / 2 else "score"


class Chunk(NamedTuple):
    """At most T consecutive tokens of a document: what the model reads as one context."""

    document: int
    ids: np.ndarray
    first_window: int  # number of its first window among all windows of the part


class FitScoreSplit:
    """The documents of a corpus split, dealt to the two parts by `seed`.

    About `limit` tokens are used. Their documents are spread evenly over the split instead of
    taken from its beginning. T: the model's context.
    """

    def __init__(self, corpus, split, eot, T, seed, limit):
        self.corpus = corpus
        self.split = split
        self.eot = eot
        self.T = T
        self.seed = seed
        self.share = min(1.0, limit / max(1, corpus.n_tokens[split]))

    def documents(self):
        """Yield (number, ids, part) of each document in use."""
        for number, ids in documents(self.corpus, self.split, self.eot):
            part = part_of(number, self.seed, self.share)
            if part is not None:
                yield number, ids, part

    def count_tokens(self):
        """{part: number of tokens}. A pass over the text, but not through the model."""
        tokens = dict.fromkeys(PARTS, 0)
        for _, ids, part in self.documents():
            tokens[part] += len(ids)
        return tokens

    def count(self, V, max_bigrams):
        """Count the tokens in one pass: (counts, token counts (V,), frequent bigrams (P, 2)).

        counts: {"tokens", "documents", "windows"}, each {part: n}. Token counts and bigrams are
        those of the fit part. Bigrams: at most `max_bigrams`, the most frequent first, that occur
        at least LEAST times inside a chunk. A corpus with more than MAX_BIGRAMS distinct ones loses
        the rarest along the way, so that there LEAST and the order are approximate; recording
        counts the chosen ones again.
        """
        counts = {name: dict.fromkeys(PARTS, 0) for name in ("tokens", "documents", "windows")}
        token_counts = np.zeros(V, np.int64)
        bigrams = BigramCounter(V, self.T)
        for _, ids, part in self.documents():
            counts["tokens"][part] += len(ids)
            counts["documents"][part] += 1
            counts["windows"][part] += self._n_windows(len(ids))
            if part == "fit":
                token_counts += np.bincount(ids, minlength=V)
                bigrams.add(ids)
        return counts, token_counts, bigrams.most_frequent(max_bigrams)

    def _n_windows(self, n):
        """Windows in a document of n tokens."""
        whole, rest = divmod(n, self.T)
        return whole * (self.T // WINDOW) + rest // WINDOW

    def chunks(self, part):
        """Yield every Chunk of a part."""
        first_window = 0
        for number, ids, owner in self.documents():
            if owner != part:
                continue
            for start in range(0, len(ids), self.T):
                chunk = Chunk(number, ids[start : start + self.T], first_window)
                yield chunk
                first_window += len(chunk.ids) // WINDOW

    def batches(self, part, tokens):
        """Yield lists of chunks, about `tokens` tokens each.

        The chunks of 16 batches at a time are sorted by length, so that little is padding.
        """
        held = []
        size = 0
        for chunk in self.chunks(part):
            held.append(chunk)
            size += len(chunk.ids)
            if size >= 16 * tokens:
                yield from batches_by_length(held, tokens)
                held = []
                size = 0
        yield from batches_by_length(held, tokens)


def batches_by_length(chunks, tokens):
    """Yield lists of chunks, the longest first, that hold about `tokens` tokens when padded."""
    chunks = sorted(chunks, key=_length, reverse=True)
    while chunks:
        rows = max(1, tokens // _length(chunks[0]))
        yield chunks[:rows]
        chunks = chunks[rows:]


def _length(chunk):
    return len(chunk.ids)


class BigramCounter:
    """How often each bigram occurs inside a chunk; the bigram (u, v) has the key u V + v."""

    def __init__(self, V, T):
        self.V, self.T = V, T
        self.keys = np.empty(0, np.int64)  # distinct, ascending
        self.counts = np.empty(0, np.int64)
        self.pending = []  # arrays of keys that are not counted yet
        self.pending_tokens = 0

    def add(self, ids):
        """Take the bigrams of a document, without those that straddle two chunks."""
        keys = ids[:-1] * self.V + ids[1:]
        inside = np.arange(1, len(ids)) % self.T != 0
        self.pending.append(keys[inside])
        self.pending_tokens += len(ids)
        if self.pending_tokens > MAX_BIGRAMS // 4:
            self.merge()

    def merge(self):
        """Count the pending keys; beyond MAX_BIGRAMS distinct ones the rarest are forgotten."""
        pending = np.concatenate([np.empty(0, np.int64), *self.pending])
        new_keys, new_counts = np.unique(pending, return_counts=True)
        all_keys = np.concatenate((self.keys, new_keys))
        all_counts = np.concatenate((self.counts, new_counts))
        keys, index = np.unique(all_keys, return_inverse=True)
        counts = np.bincount(index, all_counts, len(keys)).astype(np.int64)
        least = 1
        while len(keys) > MAX_BIGRAMS:
            least += 1
            enough = counts >= least
            keys, counts = keys[enough], counts[enough]
        self.keys, self.counts = keys, counts
        self.pending = []
        self.pending_tokens = 0

    def most_frequent(self, n):
        """(P, 2): at most n bigrams that occur at least LEAST times, the most frequent first."""
        self.merge()
        frequent = self.counts >= LEAST
        keys, counts = self.keys[frequent], self.counts[frequent]
        keys = keys[np.argsort(-counts, kind="stable")[:n]]
        return np.stack((keys // self.V, keys % self.V), 1)
