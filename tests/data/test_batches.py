"""Token files hold the text, a batch is a function of its arguments, bad text is one sentence."""

import gzip
import hashlib
import json
import os
import re
import tempfile
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import story_corpora
import torch
from forked import run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from story_corpora import BYTES, decoded, quiet, stories, stream, write

from crate_mini import UserError
from crate_mini.data import batches, formats, token_files
from crate_mini.data.batches import open_corpus
from crate_mini.data.formats import CHUNK, END
from crate_mini.data.tokenizer import Tokenizer, load_tokenizer

small_parts = story_corpora.small_parts  # a fixture


# ---- what the files hold -------------------------------------------------------------------------


def n_bytes(texts):
    return sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("spec", ["bytes", "pydocs:500"])
def test_documents_are_split_by_their_hash(tmp_path, small_parts, spec):
    texts = stories(300)
    tokenizer = load_tokenizer(spec)
    corpus = open_corpus(write(tmp_path, texts), tokenizer, tmp_path / "cache", log=quiet)
    train = decoded(corpus, "train", tokenizer)
    val = decoded(corpus, "val", tokenizer)
    assert sorted(train + val) == sorted(texts)
    assert len(corpus.streams["train"].paths) > 5
    assert 10 < len(val) < 55
    assert corpus.n_bytes == {"train": n_bytes(train), "val": n_bytes(val)}
    assert corpus.meta["documents"] == 300
    assert corpus.meta["split"] == {"rule": "document hash"}
    assert corpus.meta["text_sha256"] == hashlib.sha256("".join(texts).encode()).hexdigest()
    assert json.loads(json.dumps(corpus.meta)) == corpus.meta

    # Neither order nor neighbours matter: the documents that remain stay in their split.
    fewer = texts[:150:-1]
    source = write(tmp_path, fewer, "fewer.txt")
    corpus = open_corpus(source, tokenizer, tmp_path / "cache", log=quiet)
    assert set(decoded(corpus, "val", tokenizer)) == set(val) & set(fewer)


@pytest.mark.parametrize("count, fraction", [(1, 0.1), (5, 0.25), (99, 0.5)])
def test_few_documents_are_cut_at_the_end_instead(tmp_path, count, fraction):
    texts = stories(count, 200)
    lines = []
    source = write(tmp_path, texts)
    corpus = open_corpus(source, BYTES, tmp_path / "cache", fraction, log=lines.append)
    train = decoded(corpus, "train")
    val = decoded(corpus, "val")
    # In order, and nothing is lost where a document was cut.
    assert "".join(train + val) == "".join(texts)
    assert train[:-1] == texts[: len(train) - 1]
    assert val[1:] == texts[count - len(val) + 1 :]
    assert corpus.n_bytes == {"train": n_bytes(train), "val": n_bytes(val)}
    total = sum(corpus.n_bytes.values())
    assert abs(corpus.n_bytes["val"] - fraction * total) < 12
    assert train[-1][-1] in " 0123456789"
    assert f"too few documents ({count})" in lines[1]
    assert corpus.meta["split"]["rule"] == "cut"


def test_all_or_none_of_a_text_can_be_for_validation(tmp_path):
    source = write(tmp_path, ["one two three"])
    corpus = open_corpus(source, BYTES, tmp_path / "cache", 0, log=quiet)
    assert corpus.n_bytes == {"train": 13, "val": 0}
    corpus = open_corpus(source, BYTES, tmp_path / "cache", 1, log=quiet)
    assert corpus.n_bytes == {"train": 0, "val": 13}


def test_wide_ids_take_four_bytes(tmp_path):
    singles = [bytes([i]) for i in range(256)]
    pairs = [bytes([i, j]) for i in range(256) for j in range(256)]
    wide = Tokenizer("wide", {token: i for i, token in enumerate(singles + pairs)})
    texts = stories(120)
    corpus = open_corpus(write(tmp_path, texts), wide, tmp_path / "cache", log=quiet)
    assert corpus.meta["dtype"] == "uint32"
    assert stream(corpus, "train").max() == wide.eot == 65792
    assert sorted(decoded(corpus, "train", wide) + decoded(corpus, "val", wide)) == sorted(texts)


# ---- batches and blocks --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_files, "PART", 3000)
        return open_corpus(write(folder, stories(300)), BYTES, folder / "cache", log=quiet)


def test_a_process_reads_only_its_rows_of_a_batch(corpus, monkeypatch):
    x, y = corpus.batch(7, "train", 3, 6, 64)
    stream, lengths = corpus.streams["train"], []
    read = stream.read
    monkeypatch.setattr(stream, "read", lambda *place: lengths.append(place) or read(*place))
    mine, next_ids = corpus.batch(7, "train", 3, 6, 64, slice(2, 4))
    assert torch.equal(mine, x[2:4]) and torch.equal(next_ids, y[2:4])
    assert len(lengths) == 2


def test_a_batch_is_a_function_of_its_arguments(corpus):
    numpy_state = np.random.get_state()[1].copy()
    torch_state = torch.get_rng_state()
    x, y = corpus.batch(7, "train", 3, 5, 64)
    for step in range(4):
        corpus.batch(7, "val", step, 2, 8)
    x_again, y_again = corpus.batch(7, "train", 3, 5, 64)
    assert torch.equal(x, x_again) and torch.equal(y, y_again)
    for seed, split, step in ((7, "train", 4), (8, "train", 3), (7, "val", 3)):
        assert not torch.equal(x, corpus.batch(seed, split, step, 5, 64)[0])
    # A row does not depend on the others.
    assert torch.equal(corpus.batch(7, "train", 3, 2, 64)[0], x[:2])
    assert (np.random.get_state()[1] == numpy_state).all()
    assert torch.equal(torch.get_rng_state(), torch_state)


# The first token of each row; if these change, no older run can be repeated.
GOLDEN = [[79, 91, 123, 43], [52, 234, 161, 180], [21, 92, 68, 88]]


def test_a_batch_is_the_same_in_every_process_and_version(tmp_path):
    numbers = tmp_path / "numbers.bin"  # token i is i, so that x shows where its window starts
    numbers.write_bytes(np.arange(256, dtype="<u2").tobytes())
    corpus = open_corpus(str(numbers), BYTES, tmp_path / "cache", 0, log=quiet)
    starts = []
    for step in (0, 1, 10**9):
        x, _ = corpus.batch(1337, "train", step, 4, 8)
        starts.append(x[:, 0].tolist())
    assert starts == GOLDEN


def test_windows_lie_in_the_data_and_each_is_as_likely(corpus):
    tokens = stream(corpus, "val")
    size = corpus.n_tokens["val"] - 40  # 40 possible starts
    windows = np.lib.stride_tricks.sliding_window_view(tokens, size)
    numbers = {window.tobytes(): start for start, window in enumerate(windows)}
    counts = Counter()
    for step in range(20):
        x, y = corpus.batch(0, "val", step, 200, size)
        assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (200, size)
        assert torch.equal(x[:, 1:], y[:, :-1]) and x.is_contiguous() and y.is_contiguous()
        for row, last in zip(x.numpy(), y[:, -1].tolist()):
            start = numbers[row.tobytes()]
            assert start < 40
            assert tokens[start + size] == last
            counts[start] += 1
    chi2 = sum((counts[start] - 100) ** 2 / 100 for start in range(40))
    assert chi2 < 73.4  # 39 degrees of freedom: 0.1 % of fair draws are above


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 200), st.one_of(st.none(), st.integers(0, 700)))
def test_blocks_predict_every_token_once(corpus, rows, columns, limit):
    tokens = stream(corpus, "val")
    start = 0
    batches = list(corpus.blocks("val", rows, columns, limit))
    for number, (x, y) in enumerate(batches):
        assert x.shape == y.shape and x.dtype == y.dtype == torch.int64
        assert len(x) <= rows
        is_remainder = number == len(batches) - 1 and len(x) == 1
        assert x.shape[1] == columns or is_remainder
        end = start + x.numel()
        assert (x.flatten().numpy() == tokens[start:end]).all()
        assert (y.flatten().numpy() == tokens[start + 1 : end + 1]).all()
        start = end
    assert start == min(len(tokens) - 1, len(tokens) if limit is None else limit)


def test_a_context_as_long_as_the_split_is_refused(corpus):
    n = corpus.n_tokens["val"]
    assert corpus.batch(0, "val", 0, 2, n - 1)[0].shape == (2, n - 1)
    with pytest.raises(UserError, match=f"context of {n}, .* --block-size"):
        corpus.batch(0, "val", 0, 2, n)


# ---- what a large corpus needs -------------------------------------------------------------------


def test_a_corpus_of_many_files_needs_few_descriptors(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(token_files, "PART", 100)
    corpus = open_corpus(write(tmp_path, stories(300)), BYTES, tmp_path / "cache", log=quiet)
    assert len(corpus.streams["train"].paths) > 250
    text = "".join(decoded(corpus, "train") + decoded(corpus, "val"))
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/dev/fd"))  # by other tests
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limit, opened + 120), most))  # macOS allows 256
    try:
        again = open_corpus(str(tmp_path / "corpus.txt"), BYTES, tmp_path / "cache", log=quiet)
        assert "".join(decoded(again, "train") + decoded(again, "val")) == text
        for step in range(20):
            again.batch(0, "train", step, 64, 150)
            again.batch(0, "val", step, 64, 150)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))


def test_a_split_that_is_not_read_is_not_opened(corpus, monkeypatch):
    opened = []
    monkeypatch.setattr(batches.np, "memmap", lambda path, *_: opened.append(path))
    for tokens in corpus.streams.values():
        tokens.array.cache_clear()
    with pytest.raises(AttributeError):  # nothing was mapped
        corpus.batch(0, "val", 0, 1, 8)
    assert [path.name.split(".")[1] for path in opened] == ["val"]


def peak_memory(folder, megabytes):
    """Bytes of memory at most in use while a text of so many megabytes is prepared in small parts.

    Every buffer is a thousandth of the usual one.
    """
    path = folder / f"{megabytes}.jsonl"
    with open(path, "w") as file:
        for i in range(megabytes * 22_000):
            file.write(f'{{"text": "short document {i:014}"}}\n')
    tracemalloc.start()
    try:
        open_corpus(str(path), BYTES, folder / "cache", workers=1, log=quiet)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "PART", 1 << 14)
    monkeypatch.setattr(token_files, "BATCH", 1 << 12)
    monkeypatch.setattr(formats, "CHUNK", 1 << 10)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    assert peak_memory(tmp_path, 1) < 1_000_000


@pytest.mark.slow
def test_a_gigabyte_of_text_is_prepared_in_a_gigabyte_and_a_half(tmp_path):
    pytest.importorskip("resource")
    line = "A line of ordinary words, of which a large text has very many indeed, {:09}.\n"
    with open(tmp_path / "large.txt", "w") as file:
        for i in range(13_000_000):
            file.write(line.format(i))
    done = run_script(["-c", PREPARE, tmp_path / "large.txt", tmp_path / "cache"], timeout=3000)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 1.5e9


PREPARE = """
import resource, sys
from crate_mini.data.batches import open_corpus
from crate_mini.data.tokenizer import load_tokenizer
open_corpus(sys.argv[1], load_tokenizer("bytes"), sys.argv[2])
unit = 1 if sys.platform == "darwin" else 1024
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
"""


# ---- where the cache is --------------------------------------------------------------------------


def test_without_a_home_folder_the_error_names_crate_cache(tmp_path, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("CRATE_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(UserError, match="no home folder .*CRATE_CACHE="):
        open_corpus(write(tmp_path, stories(3)), BYTES, log=quiet)


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX alone")
def test_a_name_that_is_not_utf_8_names_a_corpus_too(tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("this file system wants UTF-8")
    texts = stories(3)
    name = os.fsdecode(b"gr\xfcn.txt")
    Path(folder, name).write_text(END.join(texts))
    for source in (folder, os.path.join(folder, name)):
        corpus = open_corpus(source, BYTES, tmp_path / "cache", log=quiet)
        assert "".join(decoded(corpus, "train") + decoded(corpus, "val")) == "".join(texts)
        json.dumps(corpus.meta).encode()


def test_the_field_of_text_has_its_own_token_files(tmp_path):
    rows = [json.dumps({"a": f"one {i}", "b": f"two {i}"}) + "\n" for i in range(5)]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    for field, word in (("a", "one"), ("b", "two"), ("a", "one")):
        lines = []
        corpus = open_corpus(
            str(tmp_path / "a.jsonl"), BYTES, tmp_path / "cache", log=lines.append, text_field=field
        )
        assert decoded(corpus, "train")[0] == f"{word} 0"
        assert corpus.meta["text_field"] == field
    assert lines == []  # the files of the first field were still there
    with pytest.raises(UserError, match="--text-field"):
        open_corpus(str(tmp_path / "a.jsonl"), BYTES, tmp_path / "cache", log=quiet)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, fraction, words",
    [
        ("", 0.1, "is empty"),
        (" \n\n \t\n", 0.1, "is empty"),
        (END * 5, 0.1, "is empty"),
        ("x", 0.1, "split of"),
        ("xy", 0.0001, "val split of"),
        ("words and words", 1.5, "val_fraction is 1.5"),
        ("words and words", float("nan"), "val_fraction is nan"),
    ],
)
def test_too_little_text_is_one_sentence(tmp_path, content, fraction, words):
    source = write(tmp_path, [content])
    with pytest.raises(UserError, match=words):
        open_corpus(source, BYTES, tmp_path / "cache", fraction, log=quiet)


def test_one_letter_is_text_enough_where_nothing_is_held_out(tmp_path):
    assert open_corpus(write(tmp_path, ["x"]), BYTES, tmp_path / "cache", 0, log=quiet)


@pytest.mark.parametrize("before", [0, 5, CHUNK - 1, CHUNK, 2 * CHUNK + 3])
@pytest.mark.parametrize("mark, packed", [(b"", False), (b"\xef\xbb\xbf", False), (b"", True)])
def test_the_first_byte_that_is_not_utf_8_is_named(tmp_path, before, mark, packed):
    path = tmp_path / ("latin.txt.gz" if packed else "latin.txt")
    position = len(mark) + before
    raw = mark + b"x" * before + "ü".encode() + "ü".encode("latin-1") + b" and more"
    path.write_bytes(gzip.compress(raw, 1) if packed else raw)
    with pytest.raises(UserError, match=f"latin.txt.* is not UTF-8 text at byte {position + 2:,} "):
        open_corpus(str(path), BYTES, tmp_path / "cache", log=quiet)
    raw = raw[: position + 1]  # half a character at the end
    path.write_bytes(gzip.compress(raw, 1) if packed else raw)
    with pytest.raises(UserError, match=f" at byte {position:,} "):
        open_corpus(str(path), BYTES, tmp_path / "cache", log=quiet)


@pytest.mark.parametrize(
    "source, words",
    [
        ("nowhere.txt", "{}/nowhere.txt, and the named corpora are py"),
        ("tinystorys", "did you mean tinystories[?].; there is no file"),
    ],
)
def test_the_error_for_a_missing_corpus_names_the_path(tmp_path, monkeypatch, source, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words.format(re.escape(str(tmp_path)))):
        open_corpus(source, BYTES, tmp_path / "cache", log=quiet)


def test_a_split_that_no_document_hashes_into_is_refused(tmp_path):
    source = write(tmp_path, stories(120))
    with pytest.raises(UserError, match="val split .* 0 of"):
        open_corpus(source, BYTES, tmp_path / "cache", 1e-9, log=quiet)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([".txt", ".jsonl", ".txt.gz", ".jsonl.xz", ".bin", ""]),
    st.binary(max_size=200),
    st.sampled_from([BYTES, load_tokenizer("pydocs:300")]),
    st.floats(0, 1),
)
def test_any_bytes_as_a_corpus(suffix, raw, tokenizer, fraction):
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, f"fuzz{suffix}")
        source.write_bytes(raw)
        try:
            corpus = open_corpus(str(source), tokenizer, f"{folder}/cache", fraction, log=quiet)
        except UserError as error:
            assert "\n" not in str(error)
            return
        for split in ("train", "val"):
            if corpus.n_tokens[split] > 1:
                assert stream(corpus, split).max() < tokenizer.vocab_size


# ---- token files as a source ---------------------------------------------------------------------


def test_token_files_are_checked_counted_and_cut(tmp_path, small_parts):
    folder = tmp_path / "source"
    folder.mkdir()
    text = " ".join(stories(100))
    ids = np.array([*BYTES.encode(text), BYTES.eot], "<u2")
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(ids) - 5000
    (folder / "a.bin").write_bytes(ids[:5000].tobytes())
    (folder / "b.bin").write_bytes(header.tobytes() + ids[5000:].tobytes())
    corpus = open_corpus(str(folder), BYTES, tmp_path / "cache", 0.2, log=quiet)
    tokens = np.concatenate([stream(corpus, "train"), stream(corpus, "val")])
    assert (tokens == ids).all()
    assert corpus.n_tokens["train"] == round(0.8 * len(ids))
    assert sum(corpus.n_bytes.values()) == len(text.encode())


def test_token_files_named_val_are_the_validation_split(tmp_path):
    for name, low in (("train.bin", 0), ("val.bin", 100)):
        (tmp_path / name).write_bytes(np.arange(low, low + 50, dtype="<u2").tobytes())
    corpus = open_corpus(str(tmp_path), BYTES, tmp_path / "cache", log=quiet)
    assert stream(corpus, "train").tolist() == [*range(50)]
    assert stream(corpus, "val").tolist() == [*range(100, 150)]
    assert corpus.meta["split"] == {"rule": "file name"}


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_both_types_of_llm_c_are_read(tmp_path, dtype):
    ids = np.array([*BYTES.encode("some text of a model " * 9), BYTES.eot])
    head = np.zeros(256, "<i4")
    head[:3] = (20240520, 1, len(ids)) if dtype == "<u2" else (20240801, 7, len(ids))
    (tmp_path / "a.bin").write_bytes(head.tobytes() + ids.astype(dtype).tobytes())
    corpus = open_corpus(str(tmp_path / "a.bin"), BYTES, tmp_path / "cache", 0, log=quiet)
    assert (stream(corpus, "train") == ids).all()


def test_wide_ids_without_a_header_are_not_read_as_narrow_ones(tmp_path):
    ids = np.frombuffer(b"some text of a model " * 9, np.uint8).astype("<u4")
    (tmp_path / "a.bin").write_bytes(ids.tobytes())
    with pytest.raises(UserError, match="a.bin has no header.*uint32 ids.*20240801, 7, count"):
        open_corpus(str(tmp_path / "a.bin"), BYTES, tmp_path / "cache", log=quiet)
    ids[1] = 70000
    (tmp_path / "a.bin").write_bytes(ids.tobytes())
    with pytest.raises(UserError, match="holds id 4464.*read as uint16.*as uint32.* 70000"):
        open_corpus(str(tmp_path / "a.bin"), BYTES, tmp_path / "cache", log=quiet)


def test_token_files_of_another_tokenizer_are_refused(tmp_path):
    (tmp_path / "a.bin").write_bytes(np.array([1, 257, 3], "<u2").tobytes())
    with pytest.raises(UserError, match="a.bin holds id 257, but tokenizer bytes has only 257 ids"):
        open_corpus(str(tmp_path / "a.bin"), BYTES, tmp_path / "cache", log=quiet)
