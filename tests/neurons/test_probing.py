"""Sparse probes: which words are ambiguous, what k features tell, average precision."""

import numpy as np
import pytest
import torch
from made_up_texts import made_up_texts

from crate_mini.neurons import metrics, probing
from crate_mini.neurons.beyond_token import Properties
from crate_mini.neurons.feature_sets import Features, TokenMeans

TEXTS = made_up_texts(types=8, properties=3)
WORDS = [b" the", b"the", b" a", b"ab", b"1", b" (", b"", b" \xc3\xa9"]  # of the eight types


def word(id):
    return WORDS[id]


N = len(TEXTS.token)
PUZZLES = probing.puzzles(TEXTS, Properties(TEXTS), word)


def test_only_ambiguous_words_are_probed():
    texts = made_up_texts(types=8, properties=2)
    texts.states[:, 0] |= texts.token == 1  # always
    texts.states[:, 1] &= texts.token == 2  # on one word only
    first, second = probing.puzzles(texts, Properties(texts), word)
    assert set(texts.token[first.fit].tolist()) == {0, 2, 3, 7}
    assert set(texts.token[second.score].tolist()) == {2}
    for puzzle in (first, second):
        assert texts.is_fit[puzzle.fit].all() and not texts.is_fit[puzzle.score].any()
        assert np.array_equal(puzzle.score_holds, texts.states[puzzle.score, puzzle.number])


def auprc(predictions):
    values = []
    for puzzle, predicted in zip(PUZZLES, predictions):
        weights = np.ones((1, len(predicted)))
        values.append(probing.average_precision(puzzle.score_holds, predicted, weights)[0])
    return np.array(values)


def test_probes_find_what_features_tell_and_no_more():
    rng = np.random.default_rng(0)
    holds = TEXTS.states.numpy()
    noise = rng.normal(size=(len(holds), 20))
    halves = [holds + 2 * rng.normal(size=holds.shape) for _ in range(4)]
    acts = torch.from_numpy(np.column_stack([noise, *halves])).float()
    one, five = (auprc(probing.probe(PUZZLES, Features(acts), N)[k]) for k in probing.KS)
    table = auprc([puzzle.table for puzzle in PUZZLES])
    nothing = auprc(probing.probe(PUZZLES, Features(acts[:, :20]), N)[1])
    chance = np.array([puzzle.score_holds.mean() for puzzle in PUZZLES])
    assert (five > one + 0.05).all() and (one > nothing + 0.05).all()
    assert abs(nothing - chance).max() < 0.05
    by_token = auprc(probing.probe(PUZZLES, TokenMeans(acts, TEXTS), N)[5])
    assert (by_token < table + 0.03).all(), "functions of the token tell no more than the table"


def test_average_precision_is_that_of_metrics_and_takes_weights():
    rng = np.random.default_rng(1)
    holds = rng.random(300) < 0.3
    predicted = np.round(holds + rng.normal(size=300), 1)  # with ties
    weights = np.stack([np.ones(300), rng.integers(0, 4, 300)])
    values = probing.average_precision(holds, predicted, weights)
    expected = metrics.firing(holds, predicted)["auprc"][0][0]
    assert values[0] == pytest.approx(expected)
    repeated = np.repeat(np.arange(300), weights[1].astype(int))
    expected = metrics.firing(holds[repeated], predicted[repeated])["auprc"][0][0]
    assert values[1] == pytest.approx(expected)


def test_logistic_regression_recovers_its_weights():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(20_000, 2))
    y = rng.random(20_000) < 1 / (1 + np.exp(-(2 * x[:, 0] - x[:, 1] - 1)))
    origin, along_0, along_1 = probing.logistic(x, y, np.array([[0, 0], [1, 0], [0, 1]]))
    assert origin == pytest.approx(-1, abs=0.1)
    assert along_0 - origin == pytest.approx(2, abs=0.1)
    assert along_1 - origin == pytest.approx(-1, abs=0.1)
    separable = probing.logistic(y[:, None] * 1.0, y, np.array([[0.0], [1.0]]))
    assert np.isfinite(separable).all() and separable[1] > separable[0]
