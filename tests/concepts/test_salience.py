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
    assert words.facts(16)["gap_max"] < 1e-5
