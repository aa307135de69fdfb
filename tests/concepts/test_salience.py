"""Attributions add up, and the salient word is the one that the answer depends on."""

import numpy as np
import pytest
import torch
from random_classifiers import KINDS, SPEC, TEXTS, random_classifier

from crate_mini import model
from crate_mini.concepts import salience, word_vectors
from crate_mini.concepts.classifier import Classifier, encode
from crate_mini.data.tokenizer import load_tokenizer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [1, 2])
def test_attributions_are_complete(kind, layer):
    lm, tokenizer = random_classifier(kind), load_tokenizer(SPEC)
    ids, lengths = encode(tokenizer, TEXTS, 40, "start")
    errors = []
    for nodes in (2, 128):
        attribution, predicted, difference = salience.attributions(lm, ids, lengths, layer, nodes)
        error = (attribution.sum(1) - difference).abs().max()
        errors.append(error / difference.abs().mean())
    assert errors[1] < 0.01 and (errors[1] < errors[0] or errors[0] < 1e-6)
    baseline = lm(torch.full_like(ids, tokenizer.eot), lengths)
    expected = (lm(ids, lengths) - baseline).gather(1, predicted[:, None])[:, 0]
    torch.testing.assert_close(difference, expected)
    for row, n in zip(attribution, lengths):
        assert (row[n:] == 0).all()  # nothing at padding


class FirstCoordinate(Classifier):
    """Without blocks: the logits are plus and minus the sum of each state's first coordinate."""

    def run_from(self, z, layer, lengths):
        total = z[..., 0].sum(1)
        return torch.stack([total, -total], 1), None


def test_the_salient_word_is_the_one_that_is_read():
    """The attribution of a word is then its own term of the logit."""
    lm = model.LM(model.preset("1L", n_embd=8, n_head=2, block_size=16, vocab_size=300))
    classifier = FirstCoordinate(lm, 2).eval().requires_grad_(False)
    lm.tokens.weight.zero_()
    lm.positions.weight.zero_()
    lm.tokens.weight[ord("b"), 0] = 2.0
    lm.tokens.weight[ord("d"), 0] = -3.0
    tokenizer = load_tokenizer("bytes")
    text = word_vectors.read(tokenizer, ["a b c", "  ", "b e b d"], 10, "start")
    words = salience.find_salient_words(classifier, text, np.arange(3), 0)
    # What speaks against the class counts by its size too.
    assert words.position.tolist() == [1, -1, 3]
    assert words.predicted[0] == 0
    assert words.difference[0] == pytest.approx(2.0)
    assert words.facts()["gap_max"] < 1e-5


def many_texts(tokenizer):
    """TextWords of texts of different lengths."""
    texts = [*TEXTS, *(" ".join(TEXTS[2].split()[:n]) for n in range(1, 12))]
    return word_vectors.read(tokenizer, texts, 40, "start")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [1, 4])
def test_texts_whose_attributions_do_not_add_up_get_more_points(kind, first):
    """And only these: every text stays at the first number of points that is enough for it."""
    lm = random_classifier(kind)
    text = many_texts(load_tokenizer(SPEC))
    rows = np.arange(len(text.words))
    bounds = {"nodes": first, "tolerance": 0.01, "most_nodes": 64}
    found = salience.find_salient_words(lm, text, rows, 1, **bounds)
    assert first == 1 or first in found.nodes
    assert found.sentence.tolist() == rows.tolist()
    size = np.abs(found.difference)
    allowed = 0.01 * np.maximum(size, salience.FLOOR * size.mean())
    assert len(set(found.nodes)) > 1
    for row, nodes in zip(rows, found.nodes):
        gaps = []
        for points in (nodes // 2, nodes):
            if points >= first:
                by_token, _, difference = salience.attributions(
                    lm, text.ids[row : row + 1], text.lengths[row : row + 1], 1, points
                )
                gaps.append(abs(float(by_token.sum() - difference)))
        assert gaps[-1] == pytest.approx(abs(found.gap[row]), abs=1e-9)
        assert gaps[-1] <= allowed[row] or nodes == 64
        assert len(gaps) == 1 or gaps[0] > allowed[row]
    facts = found.facts(0.01)
    assert sum(facts["nodes"].values()) == len(rows)
    assert facts["above"] == (np.abs(found.gap) > allowed).sum()
    assert facts["gap_max"] == pytest.approx(0.01 * (np.abs(found.gap) / allowed).max())


def test_points_have_an_upper_bound():
    text = many_texts(load_tokenizer(SPEC))
    rows = np.arange(4)
    lm = random_classifier("crate")
    found = salience.find_salient_words(lm, text, rows, 1, nodes=3, tolerance=1e-15, most_nodes=10)
    assert found.nodes.tolist() == [10] * 4 and found.facts(1e-15)["above"] == 4


def test_a_difference_near_zero_does_not_ask_for_ever_more_points():
    one = np.ones(4)
    difference = np.array([1.0, -1.0, 2.0, 0.0])
    found = salience.Salience(one, one, one, difference, np.array([0.1, 0.1, 0.1, 0.001]), one)
    assert found.relative_gap() == pytest.approx([0.1, 0.1, 0.05, 0.01])
    nothing = salience.Salience(one, one, one, 0 * one, 0 * one, one)
    assert nothing.relative_gap().tolist() == [0.0] * 4
