"""Is a codebook any good, before it is asked what it means: reconstruction against controls, stability.

A decoder that sees around its codes rebuilds the upper layer well with codes that say nothing. So every
number here stands beside what the same words give without codes, with wrong codes, with untrained codes.
"""

import itertools
from dataclasses import replace

import numpy as np
import torch

from crate_mini.concepts import clvqvae
from crate_mini.concepts.kmeans import kmeans, means

ROWS = (
    "mean",
    "ridge",
    "codes",
    "codes, shuffled",
    "codes, memory z",
    "codes, memory z, shuffled",
    "memory only",
    "no codes",
    "k-means codes",
)
CELLS = 1 << 20  # terms of the expectation held at a time
RIDGE = [10.0**i for i in range(-4, 3)]  # of the mean eigenvalue of the words' second moments


def explained(y, guess, mean):
    """1 - sum |y - guess|^2 / sum |y - mean|^2 over words (N, d); None where y is the mean.

    mean (d,) is that of the training words: 0 for a guess as good as it, below 0 for a worse one.
    """
    spread = (y - mean).double().square().sum().item()
    return 1 - (y - guess).double().square().sum().item() / spread if spread else None


def _split(vectors, split):
    rows = vectors.rows(split)
    return torch.from_numpy(vectors.lower[rows]), torch.from_numpy(vectors.upper[rows])


def explained_by_codes(vectors, codes, split="test"):
    """Share of the upper layer's variance that a word's code alone explains: no decoder, no other words.

    The guess is the mean upper state of the code's training words, for a code without any that of all. The
    one number that is the same for all methods. None without words in the split.
    """
    _, y = _split(vectors, "train")
    index = torch.from_numpy(codes.assignment)
    train, held = (torch.from_numpy(vectors.rows(name)) for name in ("train", split))
    mean, count = means(y, index[train], len(codes.centroids))
    guess = torch.where(count[:, None] > 0, mean, y.mean(0))
    return explained(_split(vectors, split)[1], guess[index[held]], y.mean(0))


def ridge(vectors):
    """(explained on test, penalty) of the best linear map with a constant; penalty by the stop split."""
    (x, y), (xs, ys), (xt, yt) = (_split(vectors, split) for split in ("train", "stop", "test"))
    mx, my = x.double().mean(0), y.double().mean(0)
    a, b = x.double() - mx, y.double() - my
    values, basis = torch.linalg.eigh(a.T @ a)
    right = basis.T @ (a.T @ b)

    def guess(penalty, at):
        weights = basis @ (right / (values.clamp_min(0) + penalty * values.mean())[:, None])
        return (at.double() - mx) @ weights + my

    scores = [(explained(ys, guess(penalty, xs), my), penalty) for penalty in RIDGE]
    penalty = max(scores, key=lambda pair: -np.inf if pair[0] is None else pair[0])[1]
    return explained(yt, guess(penalty, xt), my), penalty


def reconstruction(vectors, settings, seed=0, rows=ROWS, device="cpu"):
    """{name in ROWS: share of the upper layer's variance on the test split that is explained}.

    mean                        of the training words: 0 but for the drift between splits
    ridge                       linear map of each word's lower state, no other words, no codes
    codes                       CLVQ-VAE whose decoder sees nothing but codes (memory q)
    codes, shuffled             its decoder, each word's code swapped for that of another of the batch
    codes, memory z             the authors': cross-attention sees the states themselves
    codes, memory z, shuffled   near the row above where its decoder did not need the codes
    memory only                 trained with memory z, the same start for all words: goes around codes
    no codes                    trained with states in place of codes everywhere: the ceiling
    k-means codes               codes of k-means that do not learn, same decoder: what learning them gained
    Costs a training for each decoder among `rows` (a shuffled row needs none of its own).
    """
    found = {}
    for name in rows:
        if name == "mean":
            found[name] = explained(
                _split(vectors, "test")[1], *[_split(vectors, "train")[1].mean(0)] * 2
            )
        elif name == "ridge":
            found[name] = ridge(vectors)[0]
        elif not name.endswith(", shuffled"):
            found |= _trained(vectors, settings, name, seed, device)
    return {name: found[name] for name in rows if name in found}


def _trained(vectors, settings, name, seed, device):
    """{name: explained, and the same with shuffled codes} of one decoder, trained for it."""
    changes = {
        "codes": {"memory": "q"},
        "codes, memory z": {"memory": "z"},
        "memory only": {"memory": "z", "stream": "mean"},
        "no codes": {"memory": "z", "stream": "z"},
        "k-means codes": {"memory": "q", "learn": False},
    }[name]
    s, start = replace(settings, target="upper", **{"stream": "q", "learn": True, **changes}), None
    if not s.learn:
        start = kmeans(_split(vectors, "train")[0], s.codes, seed)[0]
    model, _ = clvqvae.fit(vectors, s, seed, start, device)
    test = clvqvae.Words(vectors, "test", s.target, model.scale, device)
    mean = clvqvae.Words(vectors, "train", s.target, model.scale, device).y.mean(0)
    found = {name: clvqvae.evaluate(model, test, mean)["explained"]}
    if name.startswith("codes"):
        draw = torch.Generator().manual_seed(seed)
        found[f"{name}, shuffled"] = clvqvae.evaluate(model, test, mean, draw)["explained"]
    return found


# ---- stability -------------------------------------------------------------------------------------------


def adjusted_mutual_information(one, other):
    """Agreement of two assignments (N,) of the same words: 1 the same partition, 0 as expected by chance.

    (MI - E) / ((H + H') / 2 - E), E the expectation of MI when the sizes of the codes stay and the words are
    dealt at random (Vinh, Epps, Bailey 2010, theorem 1). Also 1 where both are one part, or all single words.
    """
    table = np.unique(np.stack([one, other]), axis=1, return_counts=True)
    N, cells = len(one), table[1].astype(float)
    a, b = (np.unique(side, return_counts=True) for side in (one, other))
    if len(table[1]) == len(a[0]) == len(b[0]):  # the same, even where chance can do no other
        return 1.0
    rows = a[1][np.searchsorted(a[0], table[0][0])].astype(float)
    columns = b[1][np.searchsorted(b[0], table[0][1])].astype(float)
    information = float((cells / N * np.log(N * cells / rows / columns)).sum())
    h = sum(-(n / N * np.log(n / N)).sum() for n in (a[1], b[1])) / 2
    chance = expected_information(a[1], b[1])
    return (information - chance) / max(h - chance, np.finfo(float).eps)


def expected_information(a, b):
    """Mean mutual information, in nats, of partitions with part sizes a and b of the same N words.

    Sum over i, j and n of n/N log(N n / a_i b_j) times the hypergeometric probability of n common words.
    """
    N, (sizes, repeats) = a.sum(), np.unique(a, return_counts=True)
    b, weight = np.unique(b, return_counts=True)
    log = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, N + 1)))])  # log factorials
    total = 0.0
    for size, times in zip(sizes, repeats):
        common = np.arange(1, min(size, b.max()) + 1)[:, None]
        for n in np.array_split(common, 1 + len(common) * len(b) // CELLS):
            least, most = np.maximum(1, size + b - N), np.minimum(size, b)
            m = np.clip(n, least, most)  # n where it can occur, else anything finite
            p = np.exp(
                log[size]
                + log[b]
                + log[N - size]
                + log[N - b]
                - log[N]
                - log[m]
                - log[size - m]
                - log[b - m]
                - log[N - size - b + m]
            )
            total += times * (weight * (n == m) * (m / N * np.log(N * m / (size * b)) * p)).sum()
    return float(total)


def stability(runs, rows=None):
    """How far Codes of several seeds agree: {"pairs": adjusted mutual information of each pair, "mean"}.

    rows: (N,) bool, which words to compare, such as vectors.rows("test"). mean is None for a single run.
    """
    rows = slice(None) if rows is None else rows
    pairs = [
        adjusted_mutual_information(a.assignment[rows], b.assignment[rows])
        for a, b in itertools.combinations(runs, 2)
    ]
    return {"pairs": pairs, "mean": float(np.mean(pairs)) if pairs else None}
