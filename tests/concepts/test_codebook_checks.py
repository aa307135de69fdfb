"""Explained variance, reconstruction next to its controls, agreement of partitions."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted_vectors import planted

from crate_mini.concepts import clvqvae, codebook_checks
from crate_mini.concepts.codebook_checks import adjusted_mutual_information as ami
from crate_mini.concepts.types import Codes

LABELS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40)


# ---- reconstruction ------------------------------------------------------------------------------


def test_explained_by_codes_equals_brute_force():
    v = planted(noise=0.5)
    codes = Codes("kmeans", 0, np.arange(len(v.word)) % 3, np.eye(4, 8))
    train, test = v.rows("train"), v.rows("test")
    mean = v.upper[train].mean(0)
    means = np.stack([v.upper[train & (codes.assignment == j)].mean(0) for j in range(3)])
    guess = means[codes.assignment]
    expected = 1 - ((v.upper - guess)[test] ** 2).sum() / ((v.upper - mean)[test] ** 2).sum()
    assert codebook_checks.explained_by_codes(v, codes) == pytest.approx(expected, abs=1e-5)


def test_a_code_without_training_words_guesses_the_mean():
    v = planted(noise=0.5)
    codes = Codes("kmeans", 0, np.where(v.rows("train"), 0, 3), np.eye(4, 8))
    assert codebook_checks.explained_by_codes(v, codes) == pytest.approx(0, abs=1e-6)


def test_ridge_finds_a_linear_map_and_no_more():
    v = planted(noise=0.5)
    assert codebook_checks.ridge(v)[0] > 0.999
    noise = np.random.default_rng(0).normal(size=v.upper.shape)
    assert codebook_checks.ridge(replace(v, upper=noise))[0] < 0.1


def test_reconstruction_with_its_controls():
    """Where a word's concept is all there is, codes suffice, shuffled ones spoil, means are 0."""
    v = planted(noise=0.05)
    settings = clvqvae.Settings(
        codes=2, layers=1, heads=2, dropout=0.0, batch=16, epochs=15, lr=1e-2
    )
    explained = codebook_checks.reconstruction(v, settings)
    assert list(explained) == list(codebook_checks.ROWS)
    assert explained["mean"] == pytest.approx(0, abs=1e-6) and explained["ridge"] > 0.99
    for name in ("codes", "codes, memory z", "no codes", "k-means codes"):
        assert explained[name] > 0.9, name
    assert explained["codes, shuffled"] < 0.5
    assert explained["memory only"] < explained["codes"]


def test_reconstruction_trains_only_what_is_asked_for():
    settings = clvqvae.Settings(codes=2)
    explained = codebook_checks.reconstruction(planted(), settings, rows=("mean", "ridge"))
    assert list(explained) == ["mean", "ridge"]


# ---- agreement -----------------------------------------------------------------------------------


def test_agreement_by_hand():
    """Of the three ways to pair four words, one has MI log 2 and two have 0, so E = log 2 / 3."""
    halves = np.array([2, 2])
    assert codebook_checks.expected_information(halves, halves) == pytest.approx(math.log(2) / 3)
    assert ami([0, 0, 1, 1], [5, 5, 3, 3]) == pytest.approx(1)
    assert ami([0, 0, 1, 1], [0, 1, 0, 1]) == pytest.approx(-0.5)
    assert ami([0, 0, 0], [1, 1, 1]) == 1 and ami([0, 1, 2], [2, 0, 1]) == 1
    assert ami([0, 0, 1, 1], [0, 0, 0, 0]) == pytest.approx(0)


@given(LABELS)
def test_agreement_is_symmetric_and_ignores_names(pairs):
    a, b = (np.array(side) for side in zip(*pairs))
    assert ami(a, b) == pytest.approx(ami(b, a), abs=1e-9)
    assert ami(a, b) == pytest.approx(ami(7 - a, b), abs=1e-9) and ami(a, b) <= 1 + 1e-9
    assert ami(a, a) == pytest.approx(1)


@given(LABELS)
def test_agreement_equals_scikit_learns(pairs):
    metrics = pytest.importorskip("sklearn.metrics")
    a, b = (np.array(side) for side in zip(*pairs))
    assert ami(a, b) == pytest.approx(metrics.adjusted_mutual_info_score(a, b), abs=1e-6)


def test_chance_is_what_dealing_at_random_gives():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, 60), rng.zipf(2, 60) % 4

    def information(b):
        p = np.array([[np.mean((a == i) & (b == j)) for j in range(4)] for i in range(5)])
        independent = p.sum(1, keepdims=True) * p.sum(0)
        positive = p > 0
        return (p[positive] * np.log(p[positive] / independent[positive])).sum()

    dealt = [information(rng.permutation(b)) for _ in range(2000)]
    sizes_a, sizes_b = (np.unique(x, return_counts=True)[1] for x in (a, b))
    expected = codebook_checks.expected_information(sizes_a, sizes_b)
    assert expected == pytest.approx(np.mean(dealt), abs=5 * np.std(dealt) / 2000**0.5)


def test_stability_of_runs():
    first, second = (
        Codes("kmeans", i, x, np.eye(2)) for i, x in enumerate(([0, 0, 1, 1], [0, 1, 0, 1]))
    )
    stability = codebook_checks.stability([first, first, second])
    assert stability["pairs"] == pytest.approx([1, -0.5, -0.5])
    assert stability["mean"] == pytest.approx(0)
    rows = np.array([True, False, False, True])
    assert codebook_checks.stability([first, second], rows)["mean"] == 1
    assert codebook_checks.stability([first])["mean"] is None
