"""Token files hold the text, a batch is a function of its arguments, bad text is told in one sentence."""

import gzip
import hashlib
import json
import re
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import storybook
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from storybook import BYTES, pieces, quiet, stories, stream, write

from crate_mini import UserError
from crate_mini.data import batches as data
from crate_mini.data import token_files as prepare
from crate_mini.data.batches import load_tokenizer, open_corpus
from crate_mini.data.formats import CHUNK, END

small_parts = storybook.small_parts  # a fixture


# ---- what is in the files


@pytest.mark.parametrize("spec", ["bytes", "pydocs:500"])
def test_the_tokens_are_the_documents_dealt_out_by_their_hash(tmp_path, small_parts, spec):
    texts, tok = stories(300), load_tokenizer(spec)
    corpus = open_corpus(write(tmp_path, texts), tok, tmp_path / "cache", log=quiet)
    train, val = pieces(corpus, "train", tok), pieces(corpus, "val", tok)
    assert sorted(train + val) == sorted(texts) and len(corpus._shards["train"]) > 5
    assert 10 < len(val) < 55
    assert corpus.n_bytes == {
        "train": len("".join(train).encode()),
        "val": len("".join(val).encode()),
    }
    assert corpus.meta["documents"] == 300 and corpus.meta["split"] == {"rule": "document hash"}
    assert corpus.meta["text_sha256"] == hashlib.sha256("".join(texts).encode()).hexdigest()
    assert json.loads(json.dumps(corpus.meta)) == corpus.meta

    # Order and neighbours do not matter: what is left of the documents stays where it was.
    fewer = open_corpus(
        write(tmp_path, texts[:150:-1], "fewer.txt"), tok, tmp_path / "cache", log=quiet
    )
    assert set(pieces(fewer, "val", tok)) == set(val) & set(texts[:150:-1])


@pytest.mark.parametrize("count, fraction", [(1, 0.1), (5, 0.25), (99, 0.5)])
def test_few_documents_are_cut_at_the_end_instead(tmp_path, count, fraction):
    texts, told = stories(count, 200), []
    corpus = open_corpus(
        write(tmp_path, texts), BYTES, tmp_path / "cache", fraction, log=told.append
    )
    train, val = pieces(corpus, "train"), pieces(corpus, "val")
    assert "".join(train + val) == "".join(
        texts
    )  # in order, nothing lost where a document was parted
    assert train[:-1] == texts[: len(train) - 1] and val[1:] == texts[count - len(val) + 1 :]
    assert corpus.n_bytes == {
        "train": len("".join(train).encode()),
        "val": len("".join(val).encode()),
    }
    total = sum(corpus.n_bytes.values())
    assert abs(corpus.n_bytes["val"] - fraction * total) < 12 and train[-1][-1] in " 0123456789"
    assert f"only {count} documents" in told[1] and corpus.meta["split"]["rule"] == "cut"


def test_all_or_nothing_for_validation(tmp_path):
    source = write(tmp_path, ["one two three"])
    assert open_corpus(source, BYTES, tmp_path / "cache", 0, log=quiet).n_bytes == {
        "train": 13,
        "val": 0,
    }
    assert open_corpus(source, BYTES, tmp_path / "cache", 1, log=quiet).n_bytes == {
        "train": 0,
        "val": 13,
    }


def test_wide_ids_take_four_bytes(tmp_path):
    tokens = [bytes([i]) for i in range(256)] + [
        bytes([i, j]) for i in range(256) for j in range(256)
    ]
    wide = data.Tokenizer("wide", {token: i for i, token in enumerate(tokens)})
    texts = stories(120)
    corpus = open_corpus(write(tmp_path, texts), wide, tmp_path / "cache", log=quiet)
    assert corpus.meta["dtype"] == "uint32" and stream(corpus, "train").max() == wide.eot == 65792
    assert sorted(pieces(corpus, "train", wide) + pieces(corpus, "val", wide)) == sorted(texts)


# ---- batches and blocks


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "PART", 3000)
        return open_corpus(write(folder, stories(300)), BYTES, folder / "cache", log=quiet)


def test_a_batch_is_a_function_of_its_arguments(corpus):
    states = np.random.get_state()[1].copy(), torch.get_rng_state()
    first = corpus.batch(7, "train", 3, 5, 64)
    for step in range(4):
        corpus.batch(7, "val", step, 2, 8)
    again, other = corpus.batch(7, "train", 3, 5, 64), corpus.batch(7, "train", 4, 5, 64)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    for different in (other, corpus.batch(8, "train", 3, 5, 64), corpus.batch(7, "val", 3, 5, 64)):
        assert not torch.equal(first[0], different[0])
    assert torch.equal(
        corpus.batch(7, "train", 3, 2, 64)[0], first[0][:2]
    )  # a row knows no other row
    assert (np.random.get_state()[1] == states[0]).all() and torch.equal(
        torch.get_rng_state(), states[1]
    )


# The first token of each row; if these change, no older run can be repeated.
GOLDEN = [[79, 91, 123, 43], [52, 234, 161, 180], [21, 92, 68, 88]]


def test_a_batch_is_the_same_in_every_process_and_version(tmp_path):
    numbers = tmp_path / "numbers.bin"  # token i is i, so that x shows where its window starts
    numbers.write_bytes(np.arange(256, dtype="<u2").tobytes())
    counted = open_corpus(str(numbers), BYTES, tmp_path / "cache", 0, log=quiet)
    found = [counted.batch(1337, "train", step, 4, 8)[0][:, 0].tolist() for step in (0, 1, 10**9)]
    assert found == GOLDEN


def test_windows_lie_in_the_data_and_each_is_as_likely(corpus):
    whole = stream(corpus, "val")
    size = corpus.n_tokens["val"] - 40  # 40 possible starts
    counts = Counter()
    for step in range(20):
        x, y = corpus.batch(0, "val", step, 200, size)
        assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (200, size)
        assert torch.equal(x[:, 1:], y[:, :-1]) and x.is_contiguous() and y.is_contiguous()
        for row, last in zip(x.numpy(), y[:, -1].tolist()):
            start = next(s for s in range(40) if (whole[s : s + size] == row).all())
            assert whole[start + size] == last
            counts[start] += 1
    chi2 = sum((counts[s] - 100) ** 2 / 100 for s in range(40))
    assert chi2 < 73.4  # 39 degrees of freedom: 0.1 % of fair draws are above


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 200), st.one_of(st.none(), st.integers(0, 700)))
def test_blocks_predict_every_token_once(corpus, rows, columns, limit):
    whole, start = stream(corpus, "val"), 0
    batches = list(corpus.blocks("val", rows, columns, limit))
    for number, (x, y) in enumerate(batches):
        assert x.shape == y.shape and x.dtype == y.dtype == torch.int64
        assert len(x) <= rows and (
            x.shape[1] == columns or number == len(batches) - 1 and len(x) == 1
        )
        assert (x.flatten().numpy() == whole[start : start + x.numel()]).all()
        assert (y.flatten().numpy() == whole[start + 1 : start + 1 + x.numel()]).all()
        start += x.numel()
    assert start == min(len(whole) - 1, len(whole) if limit is None else limit)


def test_too_long_a_context(corpus):
    n = corpus.n_tokens["val"]
    assert corpus.batch(0, "val", 0, 2, n - 1)[0].shape == (2, n - 1)
    with pytest.raises(UserError, match=f"context of {n}, .* --block-size"):
        corpus.batch(0, "val", 0, 2, n)


# ---- bad input


@pytest.mark.parametrize(
    "content, fraction, words",
    [
        ("", 0.1, "is empty"),
        (" \n\n \t\n", 0.1, "is empty"),
        (END * 5, 0.1, "is empty"),
        ("x", 0.1, "split of"),
        ("x", 0, None),
        ("xy", 0.0001, "val split of"),
        ("words and words", 1.5, "val_fraction is 1.5"),
        ("words and words", float("nan"), "val_fraction is nan"),
    ],
)
def test_too_little_text(tmp_path, content, fraction, words):
    (tmp_path / "a.txt").write_text(content)
    if words is None:
        assert open_corpus(str(tmp_path / "a.txt"), BYTES, tmp_path / "cache", fraction, log=quiet)
        return
    with pytest.raises(UserError, match=words):
        open_corpus(str(tmp_path / "a.txt"), BYTES, tmp_path / "cache", fraction, log=quiet)


@pytest.mark.parametrize("before", [0, 5, CHUNK - 1, CHUNK, 2 * CHUNK + 3])
@pytest.mark.parametrize("mark, packed", [(b"", False), (b"\xef\xbb\xbf", False), (b"", True)])
def test_bytes_that_are_not_utf_8_are_pointed_at(tmp_path, before, mark, packed):
    path, place = tmp_path / ("latin.txt.gz" if packed else "latin.txt"), len(mark) + before
    raw = mark + b"x" * before + "ü".encode() + "ü".encode("latin-1") + b" and more"
    path.write_bytes(gzip.compress(raw, 1) if packed else raw)
    with pytest.raises(UserError, match=f"latin.txt.* is not UTF-8 text at byte {place + 2:,} "):
        open_corpus(str(path), BYTES, tmp_path / "cache", log=quiet)
    raw = raw[: place + 1]
    path.write_bytes(gzip.compress(raw, 1) if packed else raw)
    with pytest.raises(UserError, match=f" at byte {place:,} "):  # half a letter at the end
        open_corpus(str(path), BYTES, tmp_path / "cache", log=quiet)


@pytest.mark.parametrize(
    "source, words",
    [
        ("nowhere.txt", "{}/nowhere.txt, and the named corpora are py"),
        ("tinystorys", "did you mean tinystories[?].; there is no file"),
    ],
)
def test_a_missing_corpus_says_what_was_looked_for(tmp_path, monkeypatch, source, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words.format(re.escape(str(tmp_path)))):
        open_corpus(source, BYTES, tmp_path / "cache", log=quiet)


def test_no_document_hashes_into_validation(tmp_path):
    with pytest.raises(UserError, match="val split .* 0 of"):
        open_corpus(write(tmp_path, stories(120)), BYTES, tmp_path / "cache", 1e-9, log=quiet)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([".txt", ".jsonl", ".txt.gz", ".jsonl.xz", ".bin", ""]),
    st.binary(max_size=200),
    st.sampled_from([BYTES, load_tokenizer("pydocs:300")]),
    st.floats(0, 1),
)
def test_any_bytes_as_a_corpus(suffix, raw, tok, fraction):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, f"fuzz{suffix}").write_bytes(raw)
        try:
            corpus = open_corpus(
                f"{folder}/fuzz{suffix}", tok, f"{folder}/cache", fraction, log=quiet
            )
        except UserError as error:
            assert "\n" not in str(error)
            return
        for split in ("train", "val"):
            if corpus.n_tokens[split] > 1:
                assert stream(corpus, split).max() < tok.vocab_size


# ---- token files as a source


def test_token_files_are_checked_counted_and_cut(tmp_path, small_parts):
    text = " ".join(stories(100)) + END
    ids = np.array(BYTES.encode(text.removesuffix(END)) + [BYTES.eot], "<u2")
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(ids) - 5000
    (tmp_path / "a.bin").write_bytes(ids[:5000].tobytes())
    (tmp_path / "b.bin").write_bytes(header.tobytes() + ids[5000:].tobytes())
    corpus = open_corpus(
        str(tmp_path), BYTES, tmp_path.parent / f"{tmp_path.name}-cache", 0.2, log=quiet
    )
    assert (np.concatenate([stream(corpus, "train"), stream(corpus, "val")]) == ids).all()
    assert corpus.n_tokens["train"] == round(0.8 * len(ids))
    assert sum(corpus.n_bytes.values()) == len(text.removesuffix(END).encode())


def test_token_files_named_val_are_the_validation_split(tmp_path):
    for name, low in (("train.bin", 0), ("val.bin", 100)):
        (tmp_path / name).write_bytes(np.arange(low, low + 50, dtype="<u2").tobytes())
    corpus = open_corpus(str(tmp_path), BYTES, tmp_path / "cache", log=quiet)
    assert stream(corpus, "train").tolist() == [*range(50)]
    assert stream(corpus, "val").tolist() == [*range(100, 150)]
    assert corpus.meta["split"] == {"rule": "file name"}


def test_token_files_of_another_tokenizer(tmp_path):
    (tmp_path / "a.bin").write_bytes(np.array([1, 257, 3], "<u2").tobytes())
    with pytest.raises(UserError, match="a.bin holds id 257, but tokenizer bytes has only 257 ids"):
        open_corpus(str(tmp_path / "a.bin"), BYTES, tmp_path / "cache", log=quiet)
