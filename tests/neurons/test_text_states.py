"""Properties of the text so far: exact, frozen, never looking ahead, defined for any bytes."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crate_mini.data.tokenizer import load_tokenizer
from crate_mini.neurons.text_states import NAMES, VERSION, TextStates

BYTES, WORDS = load_tokenizer("bytes"), load_tokenizer("pydocs")
SAMPLE = (
    'The film (a long "one, the" best [of {all}]) was 12.5 years old.\n\n'
    "    def foo(bar_baz):  # Note: not it\n        x = foo('it')  # it it it\nWhat can "
    "they do to `run` quickly, walked and running? City music: 2nd\n- it is the very"
    "\r\n\n\xe9 ½ “so”"
)
FROZEN = {1: "05b03d42"}  # version: digest of the names and of their values on SAMPLE


def states(text, tokenizer=WORDS):
    """(T, P) of a text (str, or bytes for the tokenizer of bytes)."""
    ids = list(text) if isinstance(text, bytes) else tokenizer.encode(text)
    return TextStates(tokenizer.token_bytes).of(ids)


def at_the_last(text):
    """The properties that hold at the last byte of a text."""
    return {name for name, holds in zip(NAMES, states(text.encode(), BYTES)[-1]) if holds}


def test_the_list_is_frozen():
    assert len(NAMES) == len(set(NAMES)) >= 40
    digest = hashlib.sha256("\n".join(NAMES).encode())
    for tokenizer in (WORDS, BYTES):
        digest.update(states(SAMPLE, tokenizer).tobytes())
    assert digest.hexdigest()[:8] == FROZEN[VERSION], "a change of the list is a new VERSION"


HOLDS = [  # (property, a text at whose last byte it holds, one at which it does not)
    ("in round brackets", "a (b", "a (b)c"),
    ("in square brackets", "a[b", "a[b] c"),
    ("in curly brackets", "{b", "{b}c"),
    ("in nested brackets", "([x", "(x"),
    ("in round brackets", "(\nx", "(\n\nx"),
    ("in double quotes", 'a "b', 'a "b" c'),
    ("in double quotes", "a “b", "a “b” c"),
    ("after a determiner", "“the b", "été b"),
    ("inside a word", "éé", "“b"),
    ("in single quotes", "a 'b", "don't b"),
    ("in backticks", "a `b", "a `b` c"),
    ("first word of the line", "a b\n c", "a b\n c d"),
    ("start of the line", "abc", "a" * 30),
    ("end of a long line", "a " * 40 + "b", "a " * 40 + "\nb"),
    ("indented line", "    b", "   b"),
    ("indented line", "\tb", "b    b"),
    ("after an indented line", "    a\nb", "a\nb"),
    ("after a line that ends in a colon", "a: \nb", "a: c\nb"),
    ("first line of a paragraph", "a\n\nb", "a\n\nb\nc"),
    ("capitalised line", "A b", "a B"),
    ("line that begins with a digit", "1 b", "b 1"),
    ("line that begins with a sign", "- b", "b - b"),
    ("after = in the line", "a = b", "a =\nb"),
    ("after : in the line", "a: b", "a:\nb"),
    ("after # in the line", "# b", "b"),
    ("first word of the sentence", "A b. C", "A b. C d"),
    ("first word of the sentence", "A b.\n\nC", "1.5"),
    ("start of the sentence", "a b c", "a b c d e f g"),
    ("end of a long sentence", "a " * 21 + "b", "a " * 21 + ". b"),
    ("after a comma in the sentence", "a, b c", "a, b. c"),
    ("after a number in the sentence", "a 7 b", "a 7. B"),
    ("after a negation in the sentence", "do not go", "do knot go"),
    ("sentence that begins with a pronoun", "They go", "Go they go"),
    ("sentence that begins with a question word", "What is", "Is what"),
    ("inside a word", "ab", "a b"),
    ("inside a capitalised word", "Ab", "ab"),
    ("inside a number", "12", "a1 2"),
    ("inside a name with _", "a_b", "a b"),
    ("after a sign without a space", "(b", "( b"),
    ("after a comma", "a, b", "a, b c"),
    ("after a dot without a space", "os.p", "os. p"),
    ("after a capitalised word", "Paul is", "paul is"),
    ("after a number", "42 is", "is"),
    ("after a word in -ing", "running f", "run f"),
    ("after a word in -ly", "quickly f", "quick f"),
    ("after a word in -ed", "walked f", "walk f"),
    ("two words after a determiner", "the red c", "the c"),
    ("after a determiner", "the c", "then c"),
    ("after a determiner", "The c", "the. c"),
    ("after a preposition", "of c", "off c"),
    ("after to", "to c", "too c"),
    ("after a modal", "may c", "maya c"),
    ("after a pronoun", "they c", "the c"),
    ("after an auxiliary", "is c", "its c"),
    ("after a conjunction", "and c", "band c"),
    ("text has said film", "a Film. b\n\nc", "films c"),
    ("token seen in the last 64", "aba", "aab"),
    ("bigram seen in the last 200", "ab ab", "ab ac"),
    ("third or later occurrence of the token", "aaa", "aa"),
    ("after a token seen in the last 64", "aab", "abc"),
    ("first 8 tokens of the context", "a", "abcdefghi"),
    ("beyond 64 tokens of the context", "a" * 65, "a" * 64),
]


@pytest.mark.parametrize("name, text, other", HOLDS)
def test_a_property_holds_where_it_says(name, text, other):
    assert name in at_the_last(text)
    assert name not in at_the_last(other)


def test_every_property_has_an_example():
    topics = {name for name in NAMES if name.startswith("text has said ")}
    assert {name for name, _, _ in HOLDS} | topics == set(NAMES)


TEXTS = st.binary(max_size=120) | st.text("the film.(\"'` \n\t12A=,:#_-é“”–", max_size=120)


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.integers(0, 120))
def test_later_text_changes_nothing(text, cut):
    """The values of a prefix are a prefix of the values, whatever bytes there are."""
    raw = text if isinstance(text, bytes) else text.encode()
    whole = states(raw, BYTES)
    assert whole.shape == (len(raw), len(NAMES)) and whole.dtype == bool
    assert np.array_equal(states(raw[:cut], BYTES), whole[:cut])


@settings(max_examples=60, deadline=None)
@given(st.text("the film. (It 12)=\n“”é", max_size=80))
def test_how_a_text_is_cut_into_tokens_does_not_matter(text):
    """At tokens of several bytes the properties of bytes are those of their first visible byte."""
    ids = WORDS.encode(text)
    by_word, by_byte = states(text), states(text.encode(), BYTES)
    from_bytes = [i for i, name in enumerate(NAMES) if not ("oken" in name or "bigram" in name)]
    start = 0
    for row, id in zip(by_word, ids):
        token = WORDS.token_bytes(id)
        visible = len(token) - len(token.lstrip())
        if visible < len(token):
            assert np.array_equal(row[from_bytes], by_byte[start + visible][from_bytes])
        start += len(token)


def test_a_text_without_tokens():
    assert states(b"", BYTES).shape == (0, len(NAMES))
