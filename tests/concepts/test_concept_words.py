"""The words of a concept, and the naive Bayes proxy that reads them."""

from types import SimpleNamespace

import numpy as np
import pytest
from planted_concepts import planted_concepts

from crate_mini.concepts import concept_words
from crate_mini.concepts.types import SPLITS, Codes


@pytest.fixture(scope="module")
def planted():
    """(Vectors, Codes, SalientTexts, TextWords) in which each class has one word."""
    _, vectors, codes, texts = planted_concepts()
    words = [[vectors.vocabulary[i]] * 3 for i in vectors.word]
    return vectors, codes, texts, SimpleNamespace(words=words)


def proxy(codes, vectors, text, texts):
    return concept_words.naive_bayes_proxy(codes, vectors, text, texts, vectors.label.copy())


def test_the_proxy_reads_a_concept_that_tells(planted):
    vectors, codes, texts, text = planted
    result = proxy(codes, vectors, text, texts)
    assert result["agreement"]["own"] == 1.0 and result["agreement"]["another"] < 0.7
    assert result["empty"] == 0


def test_the_proxy_learns_nothing_from_test_texts(planted):
    vectors, codes, texts, text = planted
    lies = []
    for words, split, i in zip(text.words, vectors.split, vectors.word):
        lies.append([vectors.vocabulary[1 - i]] * 9 if split == SPLITS["test"] else words)
    lying = proxy(codes, vectors, SimpleNamespace(words=lies), texts)
    assert lying == proxy(codes, vectors, text, texts)


def test_the_proxy_cannot_read_a_concept_of_all_words(planted):
    vectors, codes, texts, text = planted
    one_code = Codes("blind", 0, np.zeros(len(vectors.word), int), codes.centroids)
    assert proxy(one_code, vectors, text, texts)["agreement"]["own"] < 0.7


def test_words_are_counted_by_code_and_class(planted):
    vectors, codes, *_ = planted
    assert concept_words.words_of_codes(codes, vectors)[0][0][0] == "bad"
    assert concept_words.class_mix(codes, vectors)[0, 1] == 0


def test_codes_without_a_letter_are_counted():
    words = [[("12", 3), ("!", 1)], [("a1", 1)], []]
    assert concept_words.count_wordless(words) == 1
