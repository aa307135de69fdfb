"""Simulators without a language model: closed forms, brute force, planted neurons."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from planted_windows import correlation, held_out, ngram_table

from crate_mini.neurons.planted import INDEX
from crate_mini.neurons.simulators import NgramTable, TokenTable, excerpt_table, label_table


def test_shrinkage_is_the_closed_form():
    counts, token_sum = np.array([3, 1, 0]), np.array([[6.0], [0.0], [0.0]])
    pairs = np.array([[1, 0]])
    pair_counts, pair_sum = np.array([2]), np.array([[5.0]])
    table = NgramTable(counts, token_sum, pairs, pair_counts, pair_sum, shrink=(2, 3))
    mean = 6 / 4
    token = (6 + 2 * mean) / 5
    assert np.allclose(table.values[:, 0], [token, 2 * mean / 3, mean, mean])
    expected = table(np.array([[1, 0, 0, 2, -1]]))[0, :, 0]
    assert np.allclose(expected, [(5 + 3 * token) / 5, token, mean, mean])


@given(st.integers(0, 2**32 - 1))
def test_all_neurons_at_once_equal_brute_force(seed):
    rng = np.random.default_rng(seed)
    V = rng.integers(2, 8)
    h = rng.integers(1, 4)
    P = rng.integers(0, 12)
    every_pair = [(u, v) for u in range(V) for v in range(V)]
    pairs = rng.permutation(every_pair)[:P]
    counts, pair_counts = rng.integers(0, 9, V), rng.integers(1, 9, len(pairs))
    token_sum, pair_sum = rng.random((V, h)), rng.random((len(pairs), h))
    tokens = rng.integers(-1, V, (3, 6))
    table = NgramTable(counts, token_sum, pairs, pair_counts, pair_sum, (1, 2))
    numbers = {tuple(pair): i for i, pair in enumerate(pairs.tolist())}
    mean = token_sum.sum(0) / max(counts.sum(), 1)

    def plain(u, v):
        if v < 0:
            return mean
        token_mean = (token_sum[v] + mean) / (counts[v] + 1)
        i = numbers.get((u, v))
        return token_mean if i is None else (pair_sum[i] + 2 * token_mean) / (pair_counts[i] + 2)

    for row, expected in zip(tokens, table(tokens)):
        for t in range(1, 6):
            assert np.allclose(expected[t - 1], plain(row[t - 1], row[t]), rtol=1e-5)
    # One neuron, and one neuron for each row of tokens, give the same.
    token_table = TokenTable(table.values)
    for j in range(h):
        assert np.array_equal(table(tokens, j), table(tokens)[..., j])
        assert np.array_equal(token_table(tokens, j), token_table(tokens)[..., j])
    rolled = np.stack([np.roll(tokens, j) for j in range(h)])
    at_once = table(rolled, np.arange(h)[:, None, None])
    assert np.array_equal(at_once, np.stack([table(rolled[j], j) for j in range(h)]))


def test_planted_neurons_are_recovered():
    tokens, acts = held_out()
    table = ngram_table()
    by_token, by_ngram = TokenTable(table.values)(tokens), table(tokens)

    def both(name):
        j = INDEX[name]
        true = acts[..., j]
        return correlation(true, by_token[..., j]), correlation(true, by_ngram[..., j])

    assert min(both("token set")) > 0.999
    assert both("bigram")[1] > 0.99 > 0.6 > both("bigram")[0]
    assert max(both("third token back")) < 0.1
    assert both("always on") == both("dead") == (None, None)
    assert min(both("negative only")) > 0.999


def test_planted_noise_is_not_predicted():
    tokens, acts = held_out()
    j = INDEX["noise"]
    expected = ngram_table()(tokens, j)
    rng = np.random.default_rng(0)
    redrawn = []
    for _ in range(200):
        i = rng.integers(len(acts), size=len(acts))
        redrawn.append(correlation(acts[i, :, j], expected[i]))
    low, high = np.quantile(redrawn, (0.0015, 0.9985))
    assert low < 0 < high


def test_five_excerpts_know_only_what_they_show():
    tokens = np.array([[7, 1, 2], [-1, 1, -1]])
    acts = np.array([[3.0, 0.0], [1.0, 9.0]])  # the 9 is at a padded position
    table = excerpt_table(tokens, acts, shrink=0)
    assert np.allclose(table(np.array([[1, 1, 2, 5]])), [[2, 0, 4 / 3]])


def test_five_excerpts_recover_a_token_set():
    tokens, acts = held_out()
    true = acts[..., INDEX["token set"]]
    top = np.argsort(-true.sum(1))[:5]
    assert correlation(true, excerpt_table(tokens[top], true[top])(tokens)) > 0.95


def test_the_label_simulator_sees_only_the_label():
    table = label_table({"tokens": [[4, 2.5, 10, 0.5], [1, 0.5, 3, 0.1]], "rest": 0.25})
    assert np.allclose(table(np.array([[4, 4, 1, 0, -1]])), [[2.5, 0.5, 0.25, 0.25]])
    empty = label_table({"tokens": [], "rest": 0.5})
    assert np.allclose(empty(np.zeros((1, 3), int)), 0.5)
