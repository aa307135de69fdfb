"""Sparse probing: can k features tell a property of the text where the token cannot?

Only tokens of *ambiguous word types* count: words that the fit documents hold often, and on which
the property holds neither seldom nor mostly. The k features that correlate most with the property
there are chosen on the fit documents, a logistic regression is fitted to them, and its average
precision (AUPRC) is read on the score documents, next to that of a token table, which predicts the
share of its type's fit tokens on which the property holds (Gurnee et al. 2023 probe so, for
features of words rather than of their types).
"""

from dataclasses import dataclass

import numpy as np

from crate_mini.neurons.beyond_token import SAME, blocks
from crate_mini.neurons.text_states import LETTERS

KS = (1, 5)  # features in a probe
OFTEN = 20  # occurrences of a word type in the fit documents
AMBIGUOUS = (0.1, 0.9)  # share of its tokens on which the property holds
POSITIVES = 30  # tokens on which the property holds and does not, in each part
MOST = 10_000  # tokens of each part in one probe
RIDGE = 1.0  # of the weights, for standardised features
NEWTON_STEPS = 12


@dataclass
class Puzzle:
    """One property on ambiguous words: rows of Texts in each part, and whether it holds there.

    table: what the token table predicts on the score rows; document: which of score_documents.
    """

    number: int  # of the property
    fit: np.ndarray
    score: np.ndarray
    fit_holds: np.ndarray
    score_holds: np.ndarray
    table: np.ndarray
    document: np.ndarray


def puzzles(texts, properties, token_bytes):
    """The Puzzles of all properties that have enough ambiguous words."""
    counts = texts.counts.numpy()
    is_word = np.array([_is_word(token_bytes(int(id))) for id in texts.ids])
    states = texts.states[:, properties.numbers].float()
    shares = (texts.by_type(states) / texts.counts[:, None]).numpy()  # (U, p)
    ambiguous = (shares > AMBIGUOUS[0]) & (shares < AMBIGUOUS[1])
    ambiguous &= (is_word & (counts >= OFTEN))[:, None]
    token, is_fit = texts.token.numpy(), texts.is_fit.numpy()
    document = np.full(len(token), -1)
    document[~is_fit] = texts.score_document
    made = []
    for i, number in enumerate(properties.numbers.tolist()):
        chosen = ambiguous[token, i]
        holds = texts.states[:, number].numpy()
        parts = [_at_most(np.flatnonzero(chosen & mask), MOST) for mask in (is_fit, ~is_fit)]
        least = min(min(holds[rows].sum(), (~holds[rows]).sum()) for rows in parts)
        if least < POSITIVES:
            continue
        fit, score = parts
        made.append(
            Puzzle(
                number,
                fit,
                score,
                holds[fit],
                holds[score],
                shares[token[score], i],
                document[score],
            )
        )
    return made


def _is_word(token):
    text = token.strip()
    return bool(text) and all(byte in LETTERS or byte >= 128 for byte in text)


def _at_most(rows, n):
    """At most n of the rows, evenly spread."""
    if len(rows) <= n:
        return rows
    return rows[np.linspace(0, len(rows) - 1, n).astype(int)]


def probe(puzzles, features, n):
    """{k: [prediction on the score rows of each puzzle]} of a set of features of n tokens."""
    most = max(KS)
    r = np.zeros((len(puzzles), features.width))
    for block in blocks(features.width, n):
        x = features.columns(block)
        for i, puzzle in enumerate(puzzles):
            r[i, block] = _correlation(x[puzzle.fit].numpy(), puzzle.fit_holds)
    ranked = np.argsort(-abs(r), axis=1, kind="stable")[:, :most]
    predictions = {k: [] for k in KS}
    used, places = np.unique(ranked, return_inverse=True)
    x = features.columns(used).numpy()
    for puzzle, columns in zip(puzzles, places.reshape(ranked.shape)):
        for k in KS:
            fit = x[np.ix_(puzzle.fit, columns[:k])]
            score = x[np.ix_(puzzle.score, columns[:k])]
            predictions[k].append(logistic(fit, puzzle.fit_holds, score))
    return predictions


def _correlation(x, holds):
    """(b,): Pearson r of x (n, b) with holds (n,); 0 where x does not vary."""
    y = holds - holds.mean()
    x = x - x.mean(0)
    power = (x * x).sum(0)
    floor = SAME * max(power.max(initial=0), 1e-30)
    scale = np.sqrt(np.maximum(power, floor) * (y * y).sum())
    return np.where(power > floor, y @ x / scale, 0)


def logistic(x, y, queries):
    """(m,): log-odds at queries (m, k) of a logistic regression of y (n,) on x (n, k).

    Newton's method with a small ridge on standardised features.
    """
    mean, scale = x.mean(0), x.std(0)
    scale[scale == 0] = 1

    def design(rows):
        return np.column_stack([np.ones(len(rows)), (rows - mean) / scale]).astype(np.float64)

    a = design(x)
    penalty = np.diag([0.0] + [RIDGE] * x.shape[1])
    w = np.zeros(a.shape[1])
    for _ in range(NEWTON_STEPS):
        p = 1 / (1 + np.exp(-np.clip(a @ w, -30, 30)))
        gradient = a.T @ (p - y) + penalty @ w
        hessian = (a * (p * (1 - p))[:, None]).T @ a + penalty
        w -= np.linalg.solve(hessian + 1e-9 * np.eye(len(w)), gradient)
    return design(queries) @ w


def average_precision(holds, predicted, weights):
    """(m,): AUPRC of predicted (n,) for holds (n,), tokens weighted by each row of weights (m, n).

    The sum over thresholds of precision times gain in recall; equal predictions pass together. 0 if
    nothing holds.
    """
    order = np.argsort(-predicted, kind="stable")
    ordered = predicted[order]
    last = np.append(ordered[1:] != ordered[:-1], True)  # of equal predictions
    passed = np.cumsum(weights[:, order], 1)[:, last]
    hits = np.cumsum(weights[:, order] * holds[order], 1)[:, last]
    gains = np.diff(hits, axis=1, prepend=0)
    with np.errstate(all="ignore"):
        precision = np.where(passed > 0, hits / passed, 0)
        return np.where(hits[:, -1] > 0, (precision * gains).sum(1) / hits[:, -1], 0)
