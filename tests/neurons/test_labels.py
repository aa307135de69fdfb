"""Labels of planted neurons name what was planted."""

import numpy as np
import pytest
from planted_windows import TOKENS, correlation, held_out, ngram_table

from crate_mini.neurons.labels import label_neurons, position_fit, token_classes
from crate_mini.neurons.planted import EXPLANATIONS, INDEX
from crate_mini.neurons.simulators import NgramTable, label_table


def test_labels_say_what_was_planted():
    tokens, acts = held_out()
    every_label = label_neurons(ngram_table(), TOKENS)
    labels = {name: every_label[j] for name, j in INDEX.items()}

    def shown(name):
        return {TOKENS[i].decode() for i, *_ in labels[name]["tokens"]}

    token_set = labels["token set"]
    assert shown("token set") == {"a", "i", "o"}
    assert sum(share for *_, share in token_set["tokens"]) == pytest.approx(1, abs=1e-3)
    assert token_set["left"] == [] and token_set["rest"] == 0
    assert shown("bigram") == {"u"}
    assert [TOKENS[i] for i in labels["bigram"]["left"]] == [b"q"]
    assert labels["dead"]["tokens"] == labels["always on"]["tokens"] == []
    assert labels["noise"]["class"] == labels["third token back"]["class"] == "mixed"
    true = acts[..., INDEX["token set"]]
    assert correlation(true, label_table(token_set)(tokens)) > 0.999


def made_up_table(values, counts):
    """The NgramTable of neurons (V, h) that depend on the token alone."""
    none = np.zeros((0, 2), int)
    sums = values * counts[:, None]
    return NgramTable(counts, sums, none, np.zeros(0, int), np.zeros((0, values.shape[1])))


def test_a_neuron_on_some_capitals_is_no_mixture():
    tokens = [f" {chr(65 + i)}".encode() for i in range(20)] + [b" the", b" of", b"ing", b",", b"."]
    counts = np.array([50] * 20 + [2000, 1500, 900, 900, 700])
    values = np.zeros((25, 5))
    values[[2, 5], 0] = 1  # two capitals of twenty
    values[[2, 5, 20], 1] = 1  # and as much on " the" and more
    values[:20, 2] = 1  # all capitals: it follows the class
    values[23, 3] = 1  # the comma
    values[:, 4] = 1  # everything
    labels = label_neurons(made_up_table(values, counts), tokens)
    assert [label["class"] for label in labels] == [
        "capital",
        "word start",
        "capital",
        "punctuation",
        "mixed",
    ]


def test_tokens_come_in_the_order_of_their_share():
    rng = np.random.default_rng(0)
    values, counts = rng.random((40, 6)) ** 6, rng.integers(1, 4000, 40)
    tokens = [bytes([97 + i % 26]) for i in range(40)]
    for label in label_neurons(made_up_table(values, counts), tokens):
        shares = [share for *_, share in label["tokens"]]
        assert shares == sorted(shares, reverse=True) and len(shares) > 3


def test_class_of_digits_and_of_position():
    tokens, acts = held_out()
    texts = [explanation.text for _, explanation in EXPLANATIONS]
    digits = texts.index("digits")
    start = np.where(tokens[:, 0] < 0, 0, 40)
    labels = label_neurons(ngram_table(), TOKENS, position_fit(acts, start))
    assert labels[digits]["class"] == "digit"
    is_first = (np.arange(64) + start[:, None] < 1)[..., None].astype(float)
    assert position_fit(is_first, start)[0] == pytest.approx(1)
    for scale in (1e30, 1e-30):  # of which no square is a float32
        np.testing.assert_allclose(
            position_fit(scale * acts, start), position_fit(acts, start), atol=1e-5
        )


def test_classes_are_fixed_tests_of_tokens():
    tokens = [b"12", b" 7", b",", b" The", b" the", b"ing", b"\n", b"  ", b"\xff", b"Ab"]
    in_class = {}
    for name, members in token_classes(tokens).items():
        in_class[name] = [tokens[i] for i in np.flatnonzero(members)]
    assert in_class == {
        "newline": [b"\n"],
        "blank": [b"  "],
        "digit": [b"12", b" 7"],
        "punctuation": [b","],
        "capital": [b" The", b"Ab"],
        "word start": [b" The", b" the"],
        "suffix": [b"ing"],
    }
