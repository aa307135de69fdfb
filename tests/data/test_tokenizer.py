"""Tokenizers: held against a slow BPE, truncation, and every malformed ranks file."""

import base64
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from crate_mini import UserError
from crate_mini.data import tokenizer
from crate_mini.data.tokenizer import Tokenizer, load_tokenizer, train_bpe

EMBEDDED = Path(tokenizer.__file__).with_name("pydocs.tiktoken")
SPECS = ["pydocs", "pydocs:4095", "pydocs:300", "bytes"]


def slow_bpe(text: str, ranks: dict) -> list[int]:
    """The definition: in each word of the split, join the pair of lowest rank until none is left."""
    ids = []
    # The split as GPT-2 published it, without tiktoken's possessive quantifiers.
    words = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    for word in regex.findall(words, text):
        parts = [bytes([byte]) for byte in word.encode()]
        while True:
            found = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
            i = found.index(min(found)) if found else 0
            if not found or found[i] == len(ranks):
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


TEXTS = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=60),
    st.lists(
        st.sampled_from(
            [
                "return",
                " the",
                " docu",
                "ment's",
                "\n",
                "    ",
                "self",
                "__",
                ".",
                "42",
                " é",
                "<|endoftext|>",
            ]
        )
    ).map("".join),
)


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_ids_are_those_of_the_slow_bpe_and_decode_to_the_text(spec, text):
    tok = load_tokenizer(spec)
    ids = tok.encode(text)
    assert ids == slow_bpe(text, {tok.token_bytes(i): i for i in range(tok.eot)})
    assert tok.decode(ids) == text and b"".join(map(tok.token_bytes, ids)) == text.encode()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("workers", [None, 1, 3])
def test_a_batch_is_encoded_text_by_text(spec, workers):
    tok, texts = (
        load_tokenizer(spec),
        [f"Text {i}: {'so ' * i}<|endoftext|>" for i in range(37)] + [""],
    )
    found = tok.encode_batch(texts, workers)
    assert [ids.tolist() for ids in found] == [tok.encode(text) for text in texts]
    assert {ids.dtype for ids in found} == {np.dtype(np.uint16)}
    assert tok.encode_batch([], workers) == []


def test_the_embedded_vocabulary():
    tok = load_tokenizer("pydocs")
    assert (tok.name, tok.vocab_size, tok.eot) == ("pydocs", 8192, 8191)
    assert tok.token_bytes(8191) == b"<|endoftext|>"
    assert tok.hash == load_tokenizer(str(EMBEDDED)).hash  # known by content, whatever the path
    # A change of this file makes every pydocs checkpoint unreadable: it must be meant.
    assert tok.hash == "2b27ce7f5c971e0e354734d27f2e9291248a27a66e3b27381ccd7bf349e3be2f"
    text = "Return the docstring of the given object, or None if it has no documentation."
    assert len(tok.encode(text)) < len(text) / 4


def test_the_first_ranks_are_a_bpe_of_their_own():
    whole, part = load_tokenizer("pydocs"), load_tokenizer("pydocs:4095")
    assert (part.name, part.vocab_size, part.eot) == (
        "pydocs:4095",
        4096,
        4095,
    ) and part.hash != whole.hash
    assert [part.token_bytes(i) for i in range(4095)] == [whole.token_bytes(i) for i in range(4095)]
    assert load_tokenizer("bytes").encode("aé") == [97, 195, 169]


def test_half_a_character_and_ids_out_of_range():
    tok = load_tokenizer("bytes")
    assert (tok.decode([97, 195]), tok.decode([tok.eot]), tok.decode([])) == (
        "a\ufffd",
        "<|endoftext|>",
        "",
    )
    for bad in (-1, 257):
        with pytest.raises(UserError, match="its ids are 0 to 256"):
            tok.decode([bad])


def test_wide_vocabularies_take_four_bytes():
    tokens = [bytes([i]) for i in range(256)] + [
        bytes([i, j]) for i in range(256) for j in range(256)
    ]
    for count, dtype in ((65535, np.uint16), (65536, np.uint32)):
        tok = Tokenizer("wide", {token: i for i, token in enumerate(tokens[:count])})
        assert tok.dtype == dtype and tok.encode_batch(["ab"])[0].tolist() == [tokens.index(b"ab")]
        assert np.iinfo(dtype).max >= tok.eot


# ---- GPT-2


def test_gpt2_is_tiktokens_pattern_over_its_ranks(monkeypatch):
    assert tokenizer.PATTERN == openai_public.r50k_pat_str
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 256}
    monkeypatch.setattr(openai_public, "gpt2", lambda: {"mergeable_ranks": ranks})
    assert (
        load_tokenizer("gpt2").encode("ab") == [256]
        and load_tokenizer("gpt2:256").name == "gpt2:256"
    )


def test_gpt2_without_a_network(monkeypatch):
    def offline():
        raise ConnectionError("no route")

    monkeypatch.setattr(openai_public, "gpt2", offline)
    with pytest.raises(UserError, match="ConnectionError.*--tokenizer PATH"):
        load_tokenizer("gpt2")


@pytest.mark.skipif(
    "CRATE_GPT2_RANKS" not in os.environ, reason="CRATE_GPT2_RANKS names no ranks file"
)
def test_gpt2_from_a_ranks_file():
    tok = load_tokenizer(os.environ["CRATE_GPT2_RANKS"])
    assert (tok.vocab_size, tok.eot) == (50257, 50256)
    ids = [15496, 995, 11, 340, 338, 48609, 13, 628, 220, 7477]
    assert tok.encode("Hello world, it's 2024.\n\n  OK") == ids


# ---- malformed


def lines(*tokens: bytes) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


BYTES = [bytes([i]) for i in range(256)]


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "lacks some of the 256"),
        (lines(b"a", b"b"), "lacks some"),
        (b"not a ranks file", "no ranks file"),
        (b"YQ== one\n", "is no ranks file"),
        (b"!! 0\n", "is no ranks file"),
        (lines(*BYTES) + b"YWI= 300\n", "ranks are not"),
        (lines(*BYTES) + b"YWI= 255\n", "ranks are not"),
        (lines(*BYTES, b"a"), "ranks are not"),
        (lines(*BYTES, b""), "ranks are not|no ranks file"),
        (lines(*BYTES) + b"YWI= -1\n", "ranks are not"),
    ],
)
def test_a_malformed_ranks_file(tmp_path, data, words):
    (tmp_path / "bad.tiktoken").write_bytes(data)
    with pytest.raises(UserError, match=words):
        load_tokenizer(str(tmp_path / "bad.tiktoken"))


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "nowhere",
        "gpt-2",
        "a\0b",
        "pydocs:255",
        "pydocs:8192",
        "bytes:0",
        "bytes:257",
        "pydocs:" + "9" * 5000,
        "x" * 5000,
        "pydocs:-1",
        ":300",
    ],
)
def test_specs_that_name_no_tokenizer(spec):
    with pytest.raises(UserError):
        load_tokenizer(spec)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 3000), st.booleans())
def test_any_bytes_as_a_ranks_file(data, place, plausible):
    if plausible:
        good = lines(*BYTES, b"ab", b"abc")
        data = good[:place] + data[:4] + good[place + 4 :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "fuzz.tiktoken")
        path.write_bytes(data)
        try:
            tok = load_tokenizer(str(path))
        except UserError:
            return
        assert tok.decode(tok.encode("any text, é")) == "any text, é"


# ---- training


def test_training_a_vocabulary(tmp_path):
    pytest.importorskip("tokenizers")
    source = tmp_path / "a.txt"
    source.write_text("<|endoftext|>".join(f"the cat {i} and the dog\n" for i in range(200)))
    for name in ("one", "two"):
        train_bpe(str(source), 270, tmp_path / f"{name}.tiktoken")
    assert (tmp_path / "one.tiktoken").read_bytes() == (tmp_path / "two.tiktoken").read_bytes()
    tok = load_tokenizer(str(tmp_path / "one.tiktoken"))
    assert tok.vocab_size == 271 and b" the" in [tok.token_bytes(i) for i in range(270)]
    assert tok.decode(tok.encode("the caté")) == "the caté"
    with pytest.raises(UserError, match="ask for no more"):
        train_bpe(str(source), 5000, tmp_path / "three.tiktoken")
    assert not (tmp_path / "three.tiktoken").exists()


def test_training_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install -e .\.\[bpe\]"):
        train_bpe("pydocs", 300, tmp_path / "a.tiktoken")
