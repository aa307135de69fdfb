"""Held-out documents dealt to two parts, "fit" and "score": no document is in both. Read in bounded memory.

documents -> part_of -> chunks of at most T tokens -> batches of chunks of about equal length
"""

import hashlib

import numpy as np

PARTS = ("fit", "score")
WINDOW = 64  # tokens of a window; those of a chunk follow one another from its start
LONG = 1 << 16  # tokens of the longest document
KEYS = 1 << 22  # different bigrams counted at a time


def documents(corpus, split, eot):
    """(number, ids int64) of each document of a split: what lies between the ids `eot`, empty ones left out.

    A stretch longer than a sixteenth of the split, or than LONG, counts as several documents: memory stays
    bounded, and one long text can be dealt to two parts too.
    """
    longest, number, rest = max(4 * WINDOW, min(LONG, corpus.n_tokens[split] // 16)), 0, None
    for x, y in corpus.blocks(split, 16, 1024):
        rest = x[0, :1].numpy() if rest is None else rest
        ids = np.concatenate((rest, y.numpy().ravel()))
        pieces = np.split(ids, np.flatnonzero(ids == eot))
        for i, piece in enumerate(pieces, 1):
            piece = piece[
                int(len(piece) and piece[0] == eot) :
            ]  # less the mark that it begins with
            while len(piece) > longest or len(piece) and i < len(pieces):
                yield number, piece[:longest]
                number, piece = number + 1, piece[longest:]
        rest = piece  # it may go on in the next block
    if rest is not None and len(rest):
        yield number, rest


def part_of(number, seed, share=1.0):
    """ "fit", "score" or None for a document: `share` of all are used, half of these for each part."""
    raw = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest()
    place = int.from_bytes(raw, "little") / 2**64
    return PARTS[place >= share / 2] if place < share else None


class Parts:
    """The documents of a split, about `limit` tokens of them, dealt by `seed`; T is the model's context.

    The documents used are spread evenly over the split, not its first ones.
    """

    def __init__(self, corpus, split, eot, T, seed, limit):
        self.documents, self.T, self.seed = lambda: documents(corpus, split, eot), T, seed
        self.share = min(1.0, limit / max(1, corpus.n_tokens[split]))

    def survey(self, V, pairs):
        """One pass over the tokens: (counts, token counts of fit (V,), frequent bigrams of fit (P, 2)).

        counts: {"tokens", "documents", "windows"} by part. Bigrams: at most `pairs`, those that occur at
        least 3 times inside a chunk, most frequent first. Beyond KEYS different ones the rarest so far are
        forgotten, so that on huge corpora "3" and the order are near misses; recording counts again.
        """
        counts = {name: dict.fromkeys(PARTS, 0) for name in ("tokens", "documents", "windows")}
        seen, keys, times = np.zeros(V, np.int64), np.empty(0, np.int64), np.empty(0, np.int64)
        fresh, size = [], 0
        for number, ids in self.documents():
            part = part_of(number, self.seed, self.share)
            if not part:
                continue
            counts["tokens"][part] += len(ids)
            counts["documents"][part] += 1
            counts["windows"][part] += (
                len(ids) // self.T * (self.T // WINDOW) + len(ids) % self.T // WINDOW
            )
            if part == "fit":
                seen += np.bincount(ids, minlength=V)
                inside = np.arange(1, len(ids)) % self.T != 0
                fresh.append((ids[:-1] * V + ids[1:])[inside])
                size += len(ids)
                if size > KEYS // 4:
                    keys, times = _merge(keys, times, fresh)
                    fresh, size = [], 0
        keys, times = _merge(keys, times, fresh)
        keys, times = keys[times >= 3], times[times >= 3]
        keys = keys[np.argsort(-times, kind="stable")[:pairs]]
        return counts, seen, np.stack((keys // V, keys % V), 1)

    def chunks(self, part):
        """(document, ids, number of its first window among those of the part) of each chunk."""
        ordinal = 0
        for number, ids in self.documents():
            if part_of(number, self.seed, self.share) == part:
                for start in range(0, len(ids), self.T):
                    chunk = ids[start : start + self.T]
                    yield number, chunk, ordinal
                    ordinal += len(chunk) // WINDOW

    def batches(self, part, tokens):
        """Lists of chunks, about `tokens` tokens, sorted by length among neighbours: little is padded."""
        held, size = [], 0
        for chunk in self.chunks(part):
            held.append(chunk)
            size += len(chunk[1])
            if size >= 16 * tokens:
                yield from _even(held, tokens)
                held, size = [], 0
        yield from _even(held, tokens)


def _merge(keys, times, fresh):
    """(distinct keys, how often each was seen), at most KEYS of them, after those in the arrays `fresh`."""
    more, again = np.unique(np.concatenate([np.empty(0, np.int64), *fresh]), return_counts=True)
    keys, place = np.unique(np.concatenate((keys, more)), return_inverse=True)
    times = np.bincount(place, np.concatenate((times, again)), len(keys)).astype(np.int64)
    floor = 1
    while len(keys) > KEYS:
        floor += 1
        keys, times = keys[times >= floor], times[times >= floor]
    return keys, times


def _even(chunks, tokens):
    """Batches of chunks, longest first."""
    chunks = sorted(chunks, key=lambda chunk: -len(chunk[1]))
    while chunks:
        rows = max(1, tokens // len(chunks[0][1]))
        yield chunks[:rows]
        chunks = chunks[rows:]
