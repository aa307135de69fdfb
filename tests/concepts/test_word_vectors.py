"""Words are read as the classifier reads them, and their vectors are its states."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from random_classifiers import KINDS, SPEC, TEXTS, random_classifier

from crate_mini import UserError
from crate_mini.concepts import word_vectors
from crate_mini.concepts.classifier import encode
from crate_mini.concepts.types import SPLITS
from crate_mini.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SPEC)


@pytest.mark.parametrize("cut", ["start", "end"])
@pytest.mark.parametrize("length", [7, 40])
def test_words_are_read_as_the_classifier_reads(tokenizer, cut, length):
    text = word_vectors.read(tokenizer, TEXTS, length, cut)
    ids, lengths = encode(tokenizer, TEXTS, length, cut)
    assert torch.equal(text.ids, ids) and torch.equal(text.lengths, lengths)
    assert "\n" not in "".join(text.words[2]) and "" not in text.words[2]
    for s in range(3):
        ends, numbers = text.last_tokens(s)
        assert numbers.tolist() == list(range(len(text.words[s])))  # the classifier sees each word
        for end, word in zip(ends, text.words[s]):
            tokens = np.flatnonzero(text.word_of[s] == text.word_of[s, end])
            spelled = tokenizer.decode(text.ids[s, tokens].tolist()).strip()
            cut_through = spelled in word and end in (ends[0], ends[-1])
            assert end == tokens[-1] and (spelled == word or cut_through)
    if length == 40:
        assert text.words[0] == ["It", "'s", "a", "fine", ",", "fine", "film", "!"]


def labelled(n=60):
    """Texts of two classes, of which one training text has the word "rare"."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["red", "blue", "green", "tea"], 6)) for _ in range(n)]
    texts[0] += " rare"
    return SimpleNamespace(
        texts=texts,
        label=np.arange(n) % 2,
        classes=["a", "b"],
        split=np.array([0, 0, 0, 1, 2])[np.arange(n) % 5],
        facts={},
    )


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return random_classifier(request.param)


def test_vectors_hold_the_states(model, tokenizer):
    texts = labelled()
    text = word_vectors.read(tokenizer, texts.texts, 40, "start")
    words = word_vectors.choose(text, texts, least=2, most=5)
    v = word_vectors.extract(model, text, texts, (1, 3), words)
    states = model.states(text.ids)
    for i in range(0, len(v.word), 37):
        s = v.sentence[i]
        ends, _ = text.last_tokens(s)
        end = ends[v.position[i]]
        np.testing.assert_allclose(v.lower[i], states[1, s, end], atol=1e-5)
        np.testing.assert_allclose(v.upper[i], states[3, s, end], atol=1e-5)


def test_words_follow_the_frequency_filter(model, tokenizer):
    texts = labelled()
    text = word_vectors.read(tokenizer, texts.texts, 40, "start")
    words = word_vectors.choose(text, texts, least=2, most=5)
    v = word_vectors.extract(model, text, texts, (1, 3), words)
    spelled = np.array(v.vocabulary)[v.word]
    for split in ("train", "stop"):
        words, counts = np.unique(spelled[v.rows(split)], return_counts=True)
        assert "rare" not in words and set(counts) == {5}
    for s in np.flatnonzero(texts.split == SPLITS["test"]):  # every word of every test text
        assert spelled[v.sentence == s].tolist() == text.words[s]
    some = np.flatnonzero(texts.split == SPLITS["test"])[[0, 2, 5]]
    fewer = word_vectors.choose(text, texts, least=2, most=5, tests=some)
    few = word_vectors.extract(model, text, texts, (1, 3), fewer)
    assert set(few.sentence[few.rows("test")]) == set(some)


def test_layers_and_words_that_do_not_exist_are_one_sentence(model, tokenizer):
    texts = labelled()
    text = word_vectors.read(tokenizer, texts.texts, 40, "start")
    with pytest.raises(UserError, match="layers 2,1 do not exist"):
        word_vectors.extract(model, text, texts, (2, 1), word_vectors.choose(text, texts))
    with pytest.raises(UserError, match="no word occurs 99 times"):
        word_vectors.choose(text, texts, least=99)
