"""The words of a concept, as people and judges see them, and how well they predict the answer.

A naive Bayes classifier predicts the model's answer from a concept's words alone. It is a proxy,
reported under its own name; it does not replace human judgement.
"""

from collections import Counter

import numpy as np

from crate_mini.concepts.types import SPLITS

TOP = 10  # words of a concept that anyone is shown


def words_of_codes(codes, vectors):
    """For each of the K codes [(word, count), ...] of its training words, the most frequent first.

    Ties go by spelling. A code without training words has an empty list.
    """
    train = vectors.rows("train")
    counters = [Counter() for _ in codes.centroids]
    for code, word in zip(codes.assignment[train].tolist(), vectors.word[train].tolist()):
        counters[code][vectors.vocabulary[word]] += 1
    return [sorted(counter.items(), key=by_frequency) for counter in counters]


def by_frequency(pair):
    word, count = pair
    return -count, word


def top_words(codes, vectors):
    """For each of the K codes its TOP words, without counts."""
    return [[word for word, _ in words[:TOP]] for words in words_of_codes(codes, vectors)]


def class_mix(codes, vectors):
    """(K, C) int64: how many of a code's training words are in texts of each class."""
    train = vectors.rows("train")
    classes = vectors.label[vectors.sentence[train]]
    mix = np.zeros((len(codes.centroids), len(vectors.classes)), np.int64)
    np.add.at(mix, (codes.assignment[train], classes), 1)
    return mix


def count_wordless(words_by_code):
    """How many codes with training words have only digits and signs, not one letter."""
    count = 0
    for words in words_by_code:
        text = "".join(word for word, _ in words)
        count += bool(words) and not any(c.isalpha() for c in text)
    return count


# ---- naive Bayes ---------------------------------------------------------------------------------


class NaiveBayes:
    """Multinomial naive Bayes over words, one added to each count.

    words: a list of words for each text. answers (S,): class for each text. rows: of the texts to
    learn from.
    """

    def __init__(self, words, answers, rows, n_classes):
        self.counts = [Counter() for _ in range(n_classes)]
        for s in rows:
            self.counts[answers[s]].update(words[s])
        vocabulary = set().union(*self.counts)
        totals = np.array([sum(counter.values()) for counter in self.counts], float)
        self.denominator = totals + len(vocabulary)
        texts = np.bincount(answers[rows], minlength=n_classes)
        self.prior = np.log((texts + 1) / (len(rows) + n_classes))

    def predict(self, words):
        """The class of a list of words; without any, the most frequent class."""
        log_posterior = self.prior.copy()
        for c, counter in enumerate(self.counts):
            smoothed = np.array([counter[word] + 1 for word in words], float)
            log_posterior[c] += np.log(smoothed / self.denominator[c]).sum()
        return int(log_posterior.argmax())


def naive_bayes_proxy(codes, vectors, text, salient_texts, answers, seed=0):
    """How often the TOP words of a concept alone predict the model's answer.

    text: TextWords. answers (S,): what the model answered to every text. Returns {"agreement": by
    what the classifier is shown (the text's own concept, another text's, TOP random training
    words), "majority": share of the most frequent answer, "n": texts, "words": TOP, "empty": share
    of concepts without words}.
    """
    n_classes = len(vectors.classes)
    train = np.flatnonzero(vectors.split == SPLITS["train"])
    classifier = NaiveBayes(text.words, answers, train, n_classes)
    concepts = top_words(codes, vectors)
    code = codes.assignment[salient_texts.row]
    expected = answers[salient_texts.text]
    rng = np.random.default_rng(seed)
    pool = vectors.word[vectors.rows("train")]
    random_words = [[vectors.vocabulary[i] for i in rng.choice(pool, TOP)] for _ in code]
    shown = {
        "own": [concepts[j] for j in code],
        "another": [concepts[j] for j in code[rng.permutation(len(code))]],
        "random words": random_words,
    }
    agreement = {}
    for name, lists in shown.items():
        predicted = np.array([classifier.predict(words) for words in lists])
        agreement[name] = float((predicted == expected).mean())
    most_frequent = np.bincount(answers[train], minlength=n_classes).argmax()
    return {
        "agreement": agreement,
        "majority": float((expected == most_frequent).mean()),
        "n": len(code),
        "words": TOP,
        "empty": float(np.mean([not words for words in shown["own"]])),
    }
