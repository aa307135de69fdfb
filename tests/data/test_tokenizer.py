"""Tokenizers: compared with a slow BPE, truncated, and loaded from every malformed ranks file."""

import base64
import functools
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
from crate_mini.data.formats import END
from crate_mini.data.tokenizer import Tokenizer, load_tokenizer, train_bpe

EMBEDDED = Path(tokenizer.__file__).with_name("pydocs.tiktoken")
SPECS = ["pydocs", "pydocs:4095", "pydocs:300", "bytes"]
BYTES = [bytes([i]) for i in range(256)]
# The split as GPT-2 published it, without tiktoken's possessive quantifiers.
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


# ---- encoding and decoding -----------------------------------------------------------------------


def slow_bpe(text: str, ranks: dict) -> list[int]:
    """The definition: in each word, join the pair of lowest rank until no pair has one."""
    ids = []
    for word in regex.findall(SPLIT, text):
        parts = [bytes([byte]) for byte in word.encode()]
        while len(parts) > 1:
            pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
            i = pairs.index(min(pairs))
            if pairs[i] == len(ranks):
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


@functools.cache
def tokenizer_and_ranks(spec):
    loaded = load_tokenizer(spec)
    return loaded, {loaded.token_bytes(i): i for i in range(loaded.eot)}


WORDS = ["return", " the", " docu", "ment's", "\n", "    ", "self", "__", ".", "42", " é"]
TEXTS = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=60),
    st.lists(st.sampled_from([*WORDS, END])).map("".join),
)


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_ids_are_those_of_the_slow_bpe_and_decode_to_the_text(spec, text):
    loaded, ranks = tokenizer_and_ranks(spec)
    ids = loaded.encode(text)
    assert ids == slow_bpe(text, ranks)
    assert loaded.decode(ids) == text
    assert b"".join(map(loaded.token_bytes, ids)) == text.encode()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("workers", [None, 1, 3])
def test_a_batch_is_encoded_text_by_text(spec, workers):
    loaded = load_tokenizer(spec)
    texts = [f"Text {i}: {'so ' * i}{END}" for i in range(37)] + [""]
    arrays = loaded.encode_batch(texts, workers)
    assert [ids.tolist() for ids in arrays] == [loaded.encode(text) for text in texts]
    assert {ids.dtype for ids in arrays} == {np.dtype(np.uint16)}
    assert loaded.encode_batch([], workers) == []


def test_the_embedded_vocabulary_has_not_changed():
    loaded = load_tokenizer("pydocs")
    assert (loaded.name, loaded.vocab_size, loaded.eot) == ("pydocs", 8192, 8191)
    assert loaded.token_bytes(8191) == END.encode()
    assert loaded.hash == load_tokenizer(str(EMBEDDED)).hash  # by content, whatever the path
    # A change of this file makes every pydocs checkpoint unreadable: it must be intended.
    assert loaded.hash == "2b27ce7f5c971e0e354734d27f2e9291248a27a66e3b27381ccd7bf349e3be2f"
    text = "Return the docstring of the given object, or None if it has no documentation."
    assert len(loaded.encode(text)) < len(text) / 4


def test_the_first_ranks_are_a_bpe_of_their_own():
    whole = load_tokenizer("pydocs")
    part = load_tokenizer("pydocs:4095")
    assert (part.name, part.vocab_size, part.eot) == ("pydocs:4095", 4096, 4095)
    assert part.hash != whole.hash
    for i in range(4095):
        assert part.token_bytes(i) == whole.token_bytes(i)
    assert load_tokenizer("bytes").encode("aé") == [97, 195, 169]


def test_half_a_character_and_ids_out_of_range():
    loaded = load_tokenizer("bytes")
    assert loaded.decode([97, 195]) == "a\ufffd"
    assert loaded.decode([loaded.eot]) == END
    assert loaded.decode([]) == ""
    for bad in (-1, 257):
        with pytest.raises(UserError, match="its ids are 0 to 256"):
            loaded.decode([bad])


def test_wide_vocabularies_take_four_bytes():
    tokens = BYTES + [a + b for a in BYTES for b in BYTES]
    for count, dtype in ((65535, np.uint16), (65536, np.uint32)):
        wide = Tokenizer("wide", {token: i for i, token in enumerate(tokens[:count])})
        assert wide.dtype == dtype
        assert wide.encode_batch(["ab"])[0].tolist() == [tokens.index(b"ab")]
        assert np.iinfo(dtype).max >= wide.eot


# ---- GPT-2 ---------------------------------------------------------------------------------------


def test_gpt2_is_tiktokens_pattern_over_its_ranks(monkeypatch):
    assert tokenizer.PATTERN == openai_public.r50k_pat_str
    ranks = {token: i for i, token in enumerate([*BYTES, b"ab"])}
    monkeypatch.setattr(openai_public, "gpt2", lambda: {"mergeable_ranks": ranks})
    assert load_tokenizer("gpt2").encode("ab") == [256]
    assert load_tokenizer("gpt2:256").name == "gpt2:256"


def test_gpt2_without_a_network_is_one_sentence(monkeypatch):
    def offline():
        raise ConnectionError("no route")

    monkeypatch.setattr(openai_public, "gpt2", offline)
    with pytest.raises(UserError, match="no route.*--tokenizer PATH"):
        load_tokenizer("gpt2")


@pytest.mark.skipif(
    "CRATE_GPT2_RANKS" not in os.environ, reason="CRATE_GPT2_RANKS names no ranks file"
)
def test_gpt2_from_a_ranks_file():
    loaded = load_tokenizer(os.environ["CRATE_GPT2_RANKS"])
    assert (loaded.vocab_size, loaded.eot) == (50257, 50256)
    ids = [15496, 995, 11, 340, 338, 48609, 13, 628, 220, 7477]
    assert loaded.encode("Hello world, it's 2024.\n\n  OK") == ids


# ---- malformed -----------------------------------------------------------------------------------


def ranks_file(*tokens: bytes) -> bytes:
    """The content of a ranks file with these tokens in order."""
    lines = []
    for rank, token in enumerate(tokens):
        lines.append(base64.b64encode(token) + b" %d\n" % rank)
    return b"".join(lines)


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "lacks some of the 256"),
        (ranks_file(b"a", b"b"), "lacks some"),
        (b"not a ranks file", "is not a ranks file"),
        (b"YQ== one\n", "is not a ranks file"),
        (b"!! 0\n", "is not a ranks file"),
        (ranks_file(*BYTES) + b"YWI= 300\n", "ranks are not"),
        (ranks_file(*BYTES) + b"YWI= 255\n", "ranks are not"),
        (ranks_file(*BYTES, b"a"), "ranks are not"),
        (ranks_file(*BYTES, b""), "is not a ranks file"),
        (ranks_file(*BYTES) + b"YWI= -1\n", "ranks are not"),
    ],
)
def test_a_malformed_ranks_file_is_refused(tmp_path, data, words):
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
def test_a_spec_that_names_no_tokenizer_is_refused(spec):
    with pytest.raises(UserError):
        load_tokenizer(spec)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 3000), st.booleans())
def test_any_bytes_as_a_ranks_file(data, place, plausible):
    if plausible:
        good = ranks_file(*BYTES, b"ab", b"abc")
        data = good[:place] + data[:4] + good[place + 4 :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "fuzz.tiktoken")
        path.write_bytes(data)
        try:
            loaded = load_tokenizer(str(path))
        except UserError:
            return
        assert loaded.decode(loaded.encode("any text, é")) == "any text, é"


# ---- training ------------------------------------------------------------------------------------


def test_training_a_vocabulary(tmp_path):
    pytest.importorskip("tokenizers")
    source = tmp_path / "a.txt"
    source.write_text(END.join(f"the cat {i} and the dog\n" for i in range(200)))
    for name in ("one", "two"):
        train_bpe(str(source), 270, tmp_path / f"{name}.tiktoken")
    assert (tmp_path / "one.tiktoken").read_bytes() == (tmp_path / "two.tiktoken").read_bytes()
    trained = load_tokenizer(str(tmp_path / "one.tiktoken"))
    assert trained.vocab_size == 271
    assert b" the" in [trained.token_bytes(i) for i in range(270)]
    assert trained.decode(trained.encode("the caté")) == "the caté"
    with pytest.raises(UserError, match="ask for no more"):
        train_bpe(str(source), 5000, tmp_path / "three.tiktoken")
    assert not (tmp_path / "three.tiktoken").exists()


def test_training_without_the_package_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install -e .\.\[bpe\]"):
        train_bpe("pydocs", 300, tmp_path / "a.tiktoken")
