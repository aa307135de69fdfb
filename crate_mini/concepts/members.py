"""What people and judges are shown of a concept: its words with counts, its texts, its classes.

And two ways to ask whether the words tell what the classifier said: a naive Bayes (a proxy, under its own
name, for nobody's judgement), and the tables that the judges and the packet for people are made from.
"""

from collections import Counter

import numpy as np

from crate_mini.concepts.types import SPLITS

TOP = 10  # words of a concept that anyone is shown


def members(codes, vectors):
    """[(word, count), ..] of each of the K codes, most frequent first (ties by spelling), from the training
    words by the rule of test time; a code that no training word has gets none."""
    train = vectors.rows("train")
    found = [Counter() for _ in codes.centroids]
    for code, word in zip(codes.assignment[train].tolist(), vectors.word[train].tolist()):
        found[code][vectors.vocabulary[word]] += 1
    return [sorted(counter.items(), key=lambda pair: (-pair[1], pair[0])) for counter in found]


def class_mix(codes, vectors):
    """(K, C) how many of a code's training words stand in texts of each class."""
    train = vectors.rows("train")
    mix = np.zeros((len(codes.centroids), len(vectors.classes)), np.int64)
    np.add.at(mix, (codes.assignment[train], vectors.label[vectors.sentence[train]]), 1)
    return mix


def wordless(found):
    """How many codes with members have none that holds a letter: digits and signs only."""
    return sum(
        bool(words) and not any(c.isalpha() for word, _ in words for c in word) for words in found
    )


def naive_bayes(words, of, train, C):
    """A function words -> (C,) log posterior, learned from texts (lists of words) `train` and what the model
    said of each, of (S,): multinomial, one added to each count."""
    counts = [Counter() for _ in range(C)]
    for s in train:
        counts[of[s]].update(words[s])
    vocabulary = len(set().union(*counts))
    total = np.array([sum(c.values()) for c in counts], float)
    prior = np.log((np.bincount(of[train], minlength=C) + 1) / (len(train) + C))

    def posterior(shown):
        each = np.array([[counts[c][word] + 1 for word in shown] for c in range(C)], float).reshape(
            C, -1
        )
        return prior + np.log(each / (total[:, None] + vocabulary)).sum(1)

    return posterior


def proxy(codes, vectors, text, found, said, seed=0):
    """naive_bayes_proxy: is the model's answer to a test text told by the TOP words of its concept alone?

    found: Items; said (S,) what the model answers to every text. {"agreement" by what is shown: the own
    concept, another text's, TOP random training words; "majority", chance; "empty": concepts without words}.
    A concept without words is answered by the majority.
    """
    train = np.flatnonzero(vectors.split == SPLITS["train"])
    C, shown = (
        len(vectors.classes),
        [[w for w, _ in words[:TOP]] for words in members(codes, vectors)],
    )
    posterior = naive_bayes(text.words, said, train, C)
    rng, pool = np.random.default_rng(seed), vectors.word[vectors.rows("train")]
    of, truth = codes.assignment[found.row], said[found.text]
    random = [[vectors.vocabulary[i] for i in rng.choice(pool, TOP)] for _ in of]
    given = {
        "own": [shown[j] for j in of],
        "another": [shown[j] for j in of[rng.permutation(len(of))]],
        "random words": random,
    }
    agreement = {
        name: float(np.mean([posterior(words).argmax() == t for words, t in zip(lists, truth)]))
        for name, lists in given.items()
    }
    most = np.bincount(said[train], minlength=C).argmax()
    return {
        "agreement": agreement,
        "majority": float((truth == most).mean()),
        "n": len(of),
        "words": TOP,
        "empty": float(np.mean([not words for words in given["own"]])),
    }
