"""Tries: how patterns match, and that those of planted neurons are found."""

import numpy as np
import pytest
from planted_windows import TOKENS, correlation, held_out

from crate_mini.neurons.planted import EOT, INDEX, PlantedModel
from crate_mini.neurons.trie import ANY, Trie, activation_at_end, fit_trie, precision_recall


def test_trie_walks_backwards_and_the_shortest_match_wins():
    trie = Trie()
    trie.add([5, ANY, 3], 1.0)
    trie.add([5, 4], 2.0)
    trie.add([9], 4.0, anchored=True)
    tokens = np.array([[3, 7, 5, 9, 3, 4, 5], [-1, 9, 9, 5, 4, 5, -1]])
    assert trie(tokens).tolist() == [[0, 1, 0, 0, 0, 2], [4, 0, 0, 0, 2, 0]]


def test_trie_of_equal_patterns_keeps_the_largest():
    trie = Trie()
    for value in (1.0, 3.0, 2.0):
        trie.add([5], value)
    assert trie(np.array([[0, 5, 6]])).tolist() == [[3, 0]]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("token set", {("a",), ("i",), ("o",)}),
        ("bigram", {("u", "q")}),
        ("third token back", {(None, None, None, ";")}),
    ],
)
def test_trie_finds_the_planted_pattern(name, expected):
    tokens, acts = held_out()
    j = INDEX[name]
    true = acts[..., j]
    fires = [(i, t) for i, t in zip(*np.nonzero(true)) if t > 5][:10]
    excerpts = []
    for i, t in fires:
        ids = [id for id in tokens[i, : t + 2].tolist() if id >= 0]
        excerpts.append((ids, 1.0))
    trie = fit_trie(activation_at_end(PlantedModel(), 0, j), excerpts, EOT)
    patterns = set()
    for ids, _, _ in trie.patterns:
        patterns.add(tuple(None if id == ANY else TOKENS[id].decode() for id in ids))
    assert patterns == expected
    assert correlation(true, trie(tokens)) > 0.98
    scores = precision_recall(true, trie(tokens), 0.5)
    assert scores["precision"] == 1 and scores["recall"] > 0.9 and scores["f1"] > 0.9


def test_trie_knows_what_only_begins_a_context():
    def activate(rows):
        return [float(row == [8]) for row in rows]

    trie = fit_trie(activate, [([8], 1.0)], pad=0)
    assert trie.patterns == [[[8], 1.0, True]]
    assert trie(np.array([[-1, 8, 8]])).tolist() == [[1, 0]]


def always(rows):
    return [1.0] * len(rows)


def never(rows):
    return [0.0] * len(rows)


def test_trie_leaves_out_what_fires_everywhere():
    assert fit_trie(always, [([1, 2], 1.0)], pad=0).patterns == []


def test_trie_of_a_silent_neuron_is_empty():
    trie = fit_trie(never, [([1, 2], 0.0), ([1, 2], 1.0)], pad=0)
    assert trie.patterns == []
    assert trie(np.array([[1, 2, 3]])).tolist() == [[0, 0]]
    assert trie(np.zeros((0, 3), int)).shape == (0, 2)


def test_precision_and_recall_by_hand():
    scores = precision_recall(np.array([2, 1, 0, 2.0]), np.array([2, 2, 2, 0.0]), 2)
    assert scores == {"precision": 1 / 3, "recall": 1 / 2, "f1": 2 / 5}
    assert not any(precision_recall(np.zeros(3), np.zeros(3), 1).values())
    assert not any(precision_recall(np.ones(3), np.ones(3), 1).values())
