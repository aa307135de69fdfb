"""Is a codebook any good? Reconstruction next to its controls, and stability over seeds.

A decoder that can look around the codes reconstructs the upper layer well even when the codes hold
nothing. So every number here comes with what the same words give without codes, with wrong codes
and with untrained codes.
"""

import itertools
from dataclasses import replace

import numpy as np
import torch

from crate_mini.concepts import clvqvae
from crate_mini.concepts.kmeans import kmeans, means

DECODERS = {  # changes to clvqvae.Settings for each decoder that `reconstruction` trains
    "codes": {"memory": "q"},
    "codes, memory z": {"memory": "z"},
    "memory only": {"memory": "z", "stream": "mean"},
    "no codes": {"memory": "z", "stream": "z"},
    "k-means codes": {"memory": "q", "learn": False},
}
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
CELLS = 1 << 20  # terms of the expected information held at a time
PENALTIES = [10.0**i for i in range(-4, 3)]  # in units of the mean eigenvalue of the words


# ---- reconstruction ------------------------------------------------------------------------------


def explained_variance(y, guess, mean):
    """1 - sum |y - guess|^2 / sum |y - mean|^2 over words (N, d); None where y is the mean.

    mean (d,): of the training words. 0 for a guess that is as good, below 0 for a worse one.
    """
    spread = (y - mean).double().square().sum().item()
    if not spread:
        return None
    return 1 - (y - guess).double().square().sum().item() / spread


def states(vectors, split):
    """(lower, upper) states of a split, as tensors (n, d)."""
    rows = vectors.rows(split)
    return torch.from_numpy(vectors.lower[rows]), torch.from_numpy(vectors.upper[rows])


def explained_by_codes(vectors, codes, split="test"):
    """Share of the upper layer's variance that a word's code alone explains; None without words.

    No decoder and no other words: the guess is the mean upper state of the code's training words,
    or of all training words for a code without any. The one number that all methods share.
    """
    _, y = states(vectors, "train")
    _, y_split = states(vectors, split)
    index = torch.from_numpy(codes.assignment)
    train = torch.from_numpy(vectors.rows("train"))
    in_split = torch.from_numpy(vectors.rows(split))
    mean, count = means(y, index[train], len(codes.centroids))
    guess = torch.where(count[:, None] > 0, mean, y.mean(0))
    return explained_variance(y_split, guess[index[in_split]], y.mean(0))


def ridge(vectors):
    """(explained variance on test, penalty) of ridge regression from lower to upper states.

    The penalty is the one that explains most of the stop split.
    """
    x, y = states(vectors, "train")
    x_stop, y_stop = states(vectors, "stop")
    x_test, y_test = states(vectors, "test")
    x_mean, y_mean = x.double().mean(0), y.double().mean(0)
    a, b = x.double() - x_mean, y.double() - y_mean
    values, basis = torch.linalg.eigh(a.T @ a)
    projected = basis.T @ (a.T @ b)

    def guess(penalty, x):
        shrunk = projected / (values.clamp_min(0) + penalty * values.mean())[:, None]
        return (x.double() - x_mean) @ (basis @ shrunk) + y_mean

    best, lowest = PENALTIES[0], -np.inf
    for penalty in PENALTIES:
        score = explained_variance(y_stop, guess(penalty, x_stop), y_mean)
        if score is not None and score > lowest:
            best, lowest = penalty, score
    return explained_variance(y_test, guess(best, x_test), y_mean), best


def reconstruction(vectors, settings, seed=0, rows=ROWS, device="cpu"):
    """{row: share of the upper layer's variance on the test split that is explained}.

    mean                        of the training words: 0 but for the drift between splits
    ridge                       a linear map of each word's lower state; no codes, no other words
    codes                       CLVQ-VAE whose decoder sees nothing but codes (memory q)
    codes, shuffled             its decoder, each word with the code of another word of its batch
    codes, memory z             the authors' CLVQ-VAE: cross-attention sees the states themselves
    codes, memory z, shuffled   close to the row above if that decoder did not need the codes
    memory only                 trained with memory z and the same start for all words: no codes
    no codes                    trained with states in place of all codes: the ceiling
    k-means codes               codes of k-means that do not learn: what is gained by learning them

    Each decoder among `rows` is trained; a shuffled row uses the one of the row above.
    """
    values = {}
    for name in rows:
        if name == "mean":
            _, y_test = states(vectors, "test")
            mean = states(vectors, "train")[1].mean(0)
            values[name] = explained_variance(y_test, mean, mean)
        elif name == "ridge":
            values[name], _ = ridge(vectors)
        elif name in DECODERS:
            values |= train_decoder(vectors, settings, name, seed, device)
    return {name: values[name] for name in rows if name in values}


def train_decoder(vectors, settings, name, seed, device):
    """{name: explained variance} of one of DECODERS; if it has codes, also with these shuffled."""
    changes = {"target": "upper", "stream": "q", "learn": True, **DECODERS[name]}
    settings = replace(settings, **changes)
    start = None
    if not settings.learn:
        start, _ = kmeans(states(vectors, "train")[0], settings.codes, seed)
    model, _ = clvqvae.fit(vectors, settings, seed, start, device)
    train, test = (
        clvqvae.Words(vectors, split, "upper", model.scale, device) for split in ("train", "test")
    )
    mean = train.y.mean(0)
    values = {name: clvqvae.evaluate(model, test, mean)["explained"]}
    if name.startswith("codes"):
        shuffle = torch.Generator().manual_seed(seed)
        shuffled = clvqvae.evaluate(model, test, mean, shuffle)
        values[f"{name}, shuffled"] = shuffled["explained"]
    return values


# ---- stability -----------------------------------------------------------------------------------


def adjusted_mutual_information(first, second):
    """Agreement of two assignments (N,) of the same words: 1 if equal, 0 as expected by chance.

    (MI - E) / ((H + H') / 2 - E), where E is the expected MI when the codes keep their sizes and
    the words are dealt at random (Vinh, Epps & Bailey 2010, theorem 1). Also 1 where both have one
    part only, or single words only.
    """
    N = len(first)
    cells, counts = np.unique(np.stack([first, second]), axis=1, return_counts=True)
    labels_a, sizes_a = np.unique(first, return_counts=True)
    labels_b, sizes_b = np.unique(second, return_counts=True)
    if len(counts) == len(sizes_a) == len(sizes_b):  # equal, even where chance leaves no choice
        return 1.0
    rows = sizes_a[np.searchsorted(labels_a, cells[0])].astype(float)
    columns = sizes_b[np.searchsorted(labels_b, cells[1])].astype(float)
    counts = counts.astype(float)
    information = float((counts / N * np.log(N * counts / rows / columns)).sum())
    mean_entropy = (entropy(sizes_a) + entropy(sizes_b)) / 2
    chance = expected_information(sizes_a, sizes_b)
    return (information - chance) / max(mean_entropy - chance, np.finfo(float).eps)


def agreement_on_test(vectors, first, second):
    """Adjusted mutual information of two assignments (N,) over the test words; None without any."""
    test = vectors.rows("test")
    return adjusted_mutual_information(first[test], second[test]) if test.any() else None


def entropy(sizes):
    """Entropy, in nats, of a partition with parts of these sizes."""
    N = sizes.sum()
    return -(sizes / N * np.log(sizes / N)).sum()


def expected_information(a, b):
    """Expected mutual information, in nats, of random partitions with part sizes a and b.

    Sum over i, j and n of n/N log(N n / a_i b_j) times the hypergeometric probability of n common
    words.
    """
    N = a.sum()
    sizes, repeats = np.unique(a, return_counts=True)
    b, b_repeats = np.unique(b, return_counts=True)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, N + 1)))])
    total = 0.0
    for size, repeat in zip(sizes, repeats):
        common = np.arange(1, min(size, b.max()) + 1)[:, None]
        for n in np.array_split(common, 1 + len(common) * len(b) // CELLS):
            lowest, highest = np.maximum(1, size + b - N), np.minimum(size, b)
            m = np.clip(n, lowest, highest)  # n where it can occur, else anything finite
            p = hypergeometric(m, size, b, N, log_factorial)
            terms = (n == m) * (m / N * np.log(N * m / (size * b)) * p)
            total += repeat * (b_repeats * terms).sum()
    return float(total)


def hypergeometric(m, a, b, N, log_factorial):
    """Probability that parts of sizes a and b, drawn from N words, have m words in common."""
    f = log_factorial
    ways = f[a] + f[b] + f[N - a] + f[N - b]
    return np.exp(ways - f[N] - f[m] - f[a - m] - f[b - m] - f[N - a - b + m])


def stability(runs, rows=None):
    """How well Codes of several seeds agree: {"pairs": adjusted MI of each pair, "mean"}.

    rows: (N,) bool, the words to compare, such as vectors.rows("test"). mean: None for one run.
    """
    rows = slice(None) if rows is None else rows
    pairs = []
    for a, b in itertools.combinations(runs, 2):
        pairs.append(adjusted_mutual_information(a.assignment[rows], b.assignment[rows]))
    return {"pairs": pairs, "mean": float(np.mean(pairs)) if pairs else None}
