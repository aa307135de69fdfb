"""A Kneser-Ney trigram of the same tokens: the loss that a language model has to beat."""

import math

import numpy as np

MOST = 5_000_000  # training tokens that are counted in a few seconds


def trigram_loss(corpus, vocab):
    """Nats per token of the held-out split under a trigram of the training split.

    None for a training split that is too large to be counted in passing, and for an empty one.
    """
    n_train, n_val = corpus.n_tokens["train"], corpus.n_tokens["val"]
    if not 3 <= n_train <= MOST or not 1 <= n_val <= MOST:
        return None
    train, held = corpus.streams["train"].read(0, n_train), corpus.streams["val"].read(0, n_val)
    return math.log(2) * trigram_bits(train, held, vocab)


def trigram_bits(train, held, vocab, discount=0.75):
    """Bits per token of `held` under an interpolated Kneser-Ney trigram model of `train`.

    Both are arrays of ids below `vocab`. Chen & Goodman 1998, one discount D:
    p(w | uv) = (c(uvw) - D)+ / c(uv) + D n(uv) / c(uv) p(w | v), where lower orders count distinct
    left neighbours instead of occurrences and the last falls back to 1 / V.
    """
    seen = [np.unique(ngrams(train, n, vocab), return_counts=True) for n in (1, 2, 3)]
    probability = np.full(len(held), 1.0 / vocab)
    for n in (1, 2, 3):
        if n == 3:
            keys, counts = seen[2]
        else:  # how many different tokens were seen before this n-gram
            keys, counts = np.unique(seen[n][0] % vocab**n, return_counts=True)
        contexts, first = np.unique(keys // vocab, return_index=True)
        totals = np.add.reduceat(counts, first)
        followers = np.diff([*first, len(keys)])  # different tokens seen after a context
        padded = np.concatenate([np.zeros(n - 1, np.int64), held])
        wanted = ngrams(padded, n, vocab)
        row, known = find(keys, wanted)
        count = np.where(known, counts[row], 0)
        row, known = find(contexts, wanted // vocab)
        mass = np.maximum(count - discount, 0) + discount * followers[row] * probability
        probability = np.where(known, mass / totals[row], probability)
    return float(-np.log2(probability).mean())


def ngrams(ids, n, vocab):
    """Each n ids in a row as one number, its digits in base `vocab`; int64."""
    length = len(ids) - n + 1
    keys = np.zeros(length, np.int64)
    for i in range(n):
        keys = keys * vocab + ids[i : i + length]
    return keys


def find(keys, wanted):
    """(row in the sorted keys, whether it is there) of each wanted key."""
    rows = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return rows, keys[rows] == wanted
