"""Held-out documents, split into two parts, "fit" and "score", that share no document.

    documents -> deal -> chunks of at most T tokens -> batches of chunks of similar length

Tables, labels and patterns come from the fit part; they are judged on the score part. A document
lies in one part as a whole, and the parts have about the same number of tokens. Everything is read
in bounded memory.
"""

from typing import NamedTuple

import numpy as np

PARTS = ("fit", "score")
WINDOW = 64  # tokens; the windows of a chunk lie side by side from its start
LONGEST = 1 << 16  # tokens of a document in memory at a time
SHARE = 16  # of a limited number of tokens, a document gives a sixteenth at most, if others can
FEW = 4  # documents below which the log says what that means
UNEVEN = 0.1  # difference between the parts, as a share of all tokens, that the log tells
MAX_BIGRAMS = 1 << 22  # distinct bigrams counted at a time
LEAST = 3  # occurrences of a bigram that counts as frequent


def documents(corpus, split, eot):
    """Yield (number, ids int64) of the documents between the `eot` tokens of a split, in order.

    Empty ones are left out. A document of more than LONGEST tokens comes in several pieces, which
    share its number.
    """
    number = 0
    rest = None
    for x, y in corpus.blocks(split, 16, 1024):
        if rest is None:
            rest = x[0, :1].numpy()  # the first token of the split, which no y holds
        ids = np.concatenate((rest, y.numpy().ravel()))
        *complete, last = np.split(ids, np.flatnonzero(ids == eot))
        for piece in complete:
            document = _without_eot(piece, eot)
            for start in range(0, len(document), LONGEST):
                yield number, document[start : start + LONGEST]
            number += len(document) > 0
        rest = _without_eot(last, eot)  # it may continue in the next block
        while len(rest) > LONGEST:
            yield number, rest[:LONGEST]
            rest = rest[LONGEST:]
    if rest is not None and len(rest):
        yield number, rest


def _without_eot(piece, eot):
    """A piece of text without the eot that it begins with, if any."""
    return piece[1:] if len(piece) and piece[0] == eot else piece


def deal(lengths, seed, limit):
    """How many tokens of each document to use (D,), and the part of each (D,): 0 fit, 1 score.

    lengths: (D,) tokens of the documents. They are taken in an order drawn by the seed until
    `limit` tokens are used; a document that is left out has no tokens to use. If there are more
    tokens than that, only the beginning of a document much longer than the others is used. The
    longest are dealt first (documents within a factor of two in the drawn order), each to the part
    that has fewer tokens.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    used = np.array(lengths, np.int64)
    if used.sum() > limit:
        used = np.minimum(used, max(4 * WINDOW, limit // SHARE, _level(used, limit)))
        before = np.cumsum(used[order]) - used[order]
        used[order] = np.clip(limit - before, 0, used[order])
    octave = np.floor(np.log2(np.maximum(used, 1)))
    part = np.zeros(len(used), np.int8)
    sums = [0, 0]
    first = int(rng.integers(2))  # where the longest goes
    for i in order[np.argsort(-octave[order], kind="stable")]:
        part[i] = first if sums[0] == sums[1] else np.argmin(sums)
        sums[part[i]] += used[i]
    return used, part


def _level(lengths, limit):
    """The least of the lengths (D,) which, if none were longer, would give `limit` tokens."""
    ordered = np.sort(lengths)
    shorter = np.cumsum(ordered) - ordered
    totals = shorter + ordered * np.arange(len(ordered), 0, -1)
    return int(ordered[np.searchsorted(totals, limit)])


class Chunk(NamedTuple):
    """At most T consecutive tokens of a document: what the model reads as one context."""

    document: int
    ids: np.ndarray
    first_window: int  # number of its first window among all windows of the part


class FitScoreSplit:
    """The documents of a corpus split, dealt to the two parts by `seed`.

    About `limit` tokens are used, of documents from everywhere in the split. A split of one
    document is cut into stretches, which count as documents. T: the model's context. notes:
    sentences about few documents and uneven parts.
    """

    def __init__(self, corpus, split, eot, T, seed, limit):
        self.corpus = corpus
        self.split = split
        self.eot = eot
        self.T = T
        lengths = {}
        for number, ids in documents(corpus, split, eot):
            lengths[number] = lengths.get(number, 0) + len(ids)
        total = sum(lengths.values())
        self.stretch = None  # tokens of a stretch
        if len(lengths) == 1 and total >= 2 * WINDOW:
            self.stretch = max(4 * WINDOW, min(LONGEST, total // SHARE))
            cuts = np.arange(0, total + self.stretch, self.stretch).clip(max=total)
            lengths = dict(enumerate(np.diff(cuts).tolist()))
        self.used, self.part = deal(list(lengths.values()), seed, limit)
        self.notes = self._notes(len(lengths))

    def documents(self):
        """Yield (number, ids, part) of each document in use; a long one in several pieces."""
        seen = np.zeros(len(self.used), np.int64)
        for number, ids in self._pieces():
            ids = ids[: self.used[number] - seen[number]]
            seen[number] += len(ids)
            if len(ids):
                yield number, ids, PARTS[self.part[number]]

    def _pieces(self):
        """`documents` of the split, or its stretches."""
        if self.stretch is None:
            yield from documents(self.corpus, self.split, self.eot)
            return
        held = np.empty(0, np.int64)
        number = 0
        for _, ids in documents(self.corpus, self.split, self.eot):
            held = np.concatenate((held, ids))
            while len(held) >= self.stretch:
                yield number, held[: self.stretch]
                held = held[self.stretch :]
                number += 1
        if len(held):
            yield number, held

    def count_tokens(self):
        """{part: number of tokens}."""
        return {part: int(self.used[self.part == i].sum()) for i, part in enumerate(PARTS)}

    def _notes(self, n_documents):
        """Sentences about few documents, and about parts that could not be made even."""
        sentences = []
        if self.stretch is not None:
            sentences.append(
                f"the text is one document: {n_documents} stretches of it are dealt to the parts "
                "as if they were documents, so intervals are too narrow"
            )
        elif n_documents < FEW:
            sentences.append(
                f"the text has {n_documents} documents, too few to tell how scores vary "
                "from text to text; give text of more documents with --data"
            )
        tokens = self.count_tokens()
        share = self.used / max(1, self.used.sum())
        if len(share) > 1 and self.stretch is None:
            longest = int(share.argmax())
            if abs(share @ (1 - 2 * self.part)) > UNEVEN:
                sentences.append(
                    f"document {longest} has {share[longest]:.0%} of the tokens, too many for even "
                    f"parts: fit {tokens['fit']:,}, score {tokens['score']:,}"
                )
        return sentences

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
        for i, part in enumerate(PARTS):
            counts["documents"][part] = int(((self.part == i) & (self.used > 0)).sum())
        for _, ids, part in self.documents():
            counts["tokens"][part] += len(ids)
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
        """Take the bigrams of a piece of a document, without those that straddle two chunks."""
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
