"""Windows of the planted model with its activations, and the n-gram table of others like them."""

from functools import cache

import numpy as np
import torch

from crate_mini import stats
from crate_mini.neurons import planted
from crate_mini.neurons.simulators import NgramTable

V = planted.EOT + 1
TOKENS = [*(bytes([i]) for i in range(256)), b"<|endoftext|>"]


def windows(seed, n, size=64):
    """Tokens (W, size + 1) and activations (W, size, h), one window of each of n documents."""
    documents = [list(text.encode()) for text in planted.texts(n, seed, size, 2 * size)]
    padded = torch.zeros(n, 2 * size, dtype=torch.int64)  # the model is causal: padding is harmless
    for i, ids in enumerate(documents):
        padded[i, : len(ids)] = torch.tensor(ids)
    codes = planted.PlantedModel().trunk(padded)[1][0].numpy()  # (n, 2 size, h)
    rows, acts = [], []
    for i, ids in enumerate(documents):
        start = 0 if i % 3 == 0 else (i * 37) % (len(ids) - size + 1)
        before = ids[start - 1] if start else -1
        rows.append([before, *ids[start : start + size]])
        acts.append(codes[i, start : start + size])
    return np.array(rows), np.array(acts)


def sums(tokens, acts, most=200):
    """The sums of a record, computed without batches: the arguments of an NgramTable."""
    x = acts.reshape(-1, acts.shape[-1])  # (N, h)
    current, previous = tokens[:, 1:].ravel(), tokens[:, :-1].ravel()
    token_sum = np.zeros((V, x.shape[1]))
    np.add.at(token_sum, current, x)
    known = previous >= 0
    bigrams = np.stack((previous, current), 1)[known]
    pairs, index, counts = np.unique(bigrams, axis=0, return_inverse=True, return_counts=True)
    pair_sum = np.zeros((len(pairs), x.shape[1]))
    np.add.at(pair_sum, index.ravel(), x[known])
    frequent = np.argsort(-counts, kind="stable")[:most]
    frequent = frequent[counts[frequent] >= 3]
    return (
        np.bincount(current, minlength=V),
        token_sum,
        pairs[frequent],
        counts[frequent],
        pair_sum[frequent],
    )


@cache
def ngram_table():
    """The NgramTable of the planted model."""
    return NgramTable(*sums(*windows(1, 1000), most=2000))


@cache
def held_out():
    """(tokens (W, 65), acts (W, 64, h)) of documents that the table was not made from."""
    return windows(2, 200)


def correlation(x, y):
    """Pearson r over all elements, or None if it is undefined."""
    values, reasons = stats.pearson(np.ravel(x), np.ravel(y))
    return None if reasons[0] else float(values[0])
