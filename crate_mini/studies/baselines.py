"""What a language model has to beat: gzip, and Kneser-Ney trigrams of bytes and of tokens."""

import gzip

import numpy as np
import torch

from crate_mini.data.batches import open_corpus
from crate_mini.data.tokenizer import load_tokenizer


def baselines(source="pydocs", spec="pydocs:4095"):
    """Bits per byte of the held-out text by gzip -9, and by trigrams of the training text."""
    tokenizer = load_tokenizer(spec)
    corpus = open_corpus(source, tokenizer, log=quiet)
    ids = {split: all_ids(corpus, split) for split in ("train", "val")}
    text, letters = {}, {}
    for split, row in ids.items():
        words = (tokenizer.token_bytes(int(i)) for i in row if i != tokenizer.eot)
        text[split] = b"".join(words)
        letters[split] = np.frombuffer(text[split], np.uint8)
    by_byte = trigram_bits(letters["train"], letters["val"], 256)
    by_token = trigram_bits(ids["train"], ids["val"], tokenizer.vocab_size)
    return {
        "gzip -9": 8 * len(gzip.compress(text["val"], 9)) / len(text["val"]),
        "trigram of bytes (Kneser-Ney)": by_byte,
        "trigram of the same tokens (Kneser-Ney)": by_token
        * (len(ids["val"]) / corpus.n_bytes["val"]),
    }


def quiet(*words):
    """Print nothing: the `log` of what need not be seen."""


def all_ids(corpus, split):
    """The ids of a split as one array."""
    blocks = list(corpus.blocks(split, 64, 1024))
    first = blocks[0][0].flatten()[:1]
    return torch.cat([first, *(y.flatten() for _, y in blocks)]).numpy()


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
