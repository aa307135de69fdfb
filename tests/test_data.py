"""Token files hold the text, however often their making was interrupted; a batch is a function."""

import gzip
import hashlib
import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crate_mini import UserError, data
from crate_mini.corpus import prepare
from crate_mini.corpus.formats import CHUNK, END
from crate_mini.data import load_tokenizer, open_corpus

ROOT = Path(__file__).parent.parent
BYTES = load_tokenizer("bytes")


def stories(count: int, words: int = 20) -> list[str]:
    """Different texts, some with bytes beyond ASCII."""
    return [f"Story {i}: " + " ".join(f"wörd{i * k % 97}" for k in range(words)) for i in range(count)]


def write(folder: Path, texts: list[str], name: str = "corpus.txt") -> str:
    (folder / name).write_text(END.join(texts), encoding="utf-8")
    return str(folder / name)


def quiet(line):
    pass


def stream(corpus, split: str) -> np.ndarray:
    """All tokens of a split by way of blocks(): first token, then every target."""
    blocks = list(corpus.blocks(split, 3, 17))
    return np.concatenate([blocks[0][0][0, :1].numpy()] + [y.flatten().numpy() for _, y in blocks])


def pieces(corpus, split: str, tok=BYTES) -> list[str]:
    """The documents of a split, decoded again."""
    whole = tok.decode(stream(corpus, split).tolist()) if corpus.n_tokens[split] else ""
    return whole.split(END)[:-1]


def folder_bytes(cache: Path) -> dict:
    """What lies in a cache, the lock aside."""
    return {path.relative_to(cache): path.read_bytes() for path in sorted(cache.rglob("*"))
            if path.is_file() and path.suffix}


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(prepare, "PART", 3000)
    monkeypatch.setattr(prepare, "BATCH", 1000)


# ---- what is in the files

@pytest.mark.parametrize("spec", ["bytes", "pydocs:500"])
def test_the_tokens_are_the_documents_dealt_out_by_their_hash(tmp_path, small_parts, spec):
    texts, tok = stories(300), load_tokenizer(spec)
    corpus = open_corpus(write(tmp_path, texts), tok, tmp_path / "cache", log=quiet)
    train, val = pieces(corpus, "train", tok), pieces(corpus, "val", tok)
    assert sorted(train + val) == sorted(texts) and len(corpus._shards["train"]) > 5
    assert 10 < len(val) < 55
    assert corpus.n_bytes == {"train": len("".join(train).encode()), "val": len("".join(val).encode())}
    assert corpus.meta["documents"] == 300 and corpus.meta["split"] == {"rule": "document hash"}
    assert corpus.meta["text_sha256"] == hashlib.sha256("".join(texts).encode()).hexdigest()
    assert json.loads(json.dumps(corpus.meta)) == corpus.meta

    # Order and neighbours do not matter: what is left of the documents stays where it was.
    fewer = open_corpus(write(tmp_path, texts[:150:-1], "fewer.txt"), tok, tmp_path / "cache", log=quiet)
    assert set(pieces(fewer, "val", tok)) == set(val) & set(texts[:150:-1])


@pytest.mark.parametrize("count, fraction", [(1, 0.1), (5, 0.25), (99, 0.5)])
def test_few_documents_are_cut_at_the_end_instead(tmp_path, count, fraction):
    texts, told = stories(count, 200), []
    corpus = open_corpus(write(tmp_path, texts), BYTES, tmp_path / "cache", fraction, log=told.append)
    train, val = pieces(corpus, "train"), pieces(corpus, "val")
    assert "".join(train + val) == "".join(texts)       # in order, nothing lost where a document was parted
    assert train[:-1] == texts[:len(train) - 1] and val[1:] == texts[count - len(val) + 1:]
    assert corpus.n_bytes == {"train": len("".join(train).encode()), "val": len("".join(val).encode())}
    total = sum(corpus.n_bytes.values())
    assert abs(corpus.n_bytes["val"] - fraction * total) < 12 and train[-1][-1] in " 0123456789"
    assert f"only {count} documents" in told[1] and corpus.meta["split"]["rule"] == "cut"


def test_all_or_nothing_for_validation(tmp_path):
    source = write(tmp_path, ["one two three"])
    assert open_corpus(source, BYTES, tmp_path / "cache", 0, log=quiet).n_bytes == {"train": 13, "val": 0}
    assert open_corpus(source, BYTES, tmp_path / "cache", 1, log=quiet).n_bytes == {"train": 0, "val": 13}


def test_wide_ids_take_four_bytes(tmp_path):
    tokens = [bytes([i]) for i in range(256)] + [bytes([i, j]) for i in range(256) for j in range(256)]
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
    assert torch.equal(corpus.batch(7, "train", 3, 2, 64)[0], first[0][:2])     # a row knows no other row
    assert (np.random.get_state()[1] == states[0]).all() and torch.equal(torch.get_rng_state(), states[1])


# The first token of each row; if these change, no older run can be repeated.
GOLDEN = [[79, 91, 123, 43], [52, 234, 161, 180], [21, 92, 68, 88]]


def test_a_batch_is_the_same_in_every_process_and_version(tmp_path):
    numbers = tmp_path / "numbers.bin"      # token i is i, so that x shows where its window starts
    numbers.write_bytes(np.arange(256, dtype="<u2").tobytes())
    counted = open_corpus(str(numbers), BYTES, tmp_path / "cache", 0, log=quiet)
    found = [counted.batch(1337, "train", step, 4, 8)[0][:, 0].tolist() for step in (0, 1, 10 ** 9)]
    assert found == GOLDEN


def test_windows_lie_in_the_data_and_each_is_as_likely(corpus):
    whole = stream(corpus, "val")
    size = corpus.n_tokens["val"] - 40                  # 40 possible starts
    counts = Counter()
    for step in range(20):
        x, y = corpus.batch(0, "val", step, 200, size)
        assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (200, size)
        assert torch.equal(x[:, 1:], y[:, :-1]) and x.is_contiguous() and y.is_contiguous()
        for row, last in zip(x.numpy(), y[:, -1].tolist()):
            start = next(s for s in range(40) if (whole[s:s + size] == row).all())
            assert whole[start + size] == last
            counts[start] += 1
    chi2 = sum((counts[s] - 100) ** 2 / 100 for s in range(40))
    assert chi2 < 73.4                                  # 39 degrees of freedom: 0.1 % of fair draws are above


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 200), st.one_of(st.none(), st.integers(0, 700)))
def test_blocks_predict_every_token_once(corpus, rows, columns, limit):
    whole, start = stream(corpus, "val"), 0
    batches = list(corpus.blocks("val", rows, columns, limit))
    for number, (x, y) in enumerate(batches):
        assert x.shape == y.shape and x.dtype == y.dtype == torch.int64
        assert len(x) <= rows and (x.shape[1] == columns or number == len(batches) - 1 and len(x) == 1)
        assert (x.flatten().numpy() == whole[start:start + x.numel()]).all()
        assert (y.flatten().numpy() == whole[start + 1:start + 1 + x.numel()]).all()
        start += x.numel()
    assert start == min(len(whole) - 1, len(whole) if limit is None else limit)


def test_too_long_a_context(corpus):
    n = corpus.n_tokens["val"]
    assert corpus.batch(0, "val", 0, 2, n - 1)[0].shape == (2, n - 1)
    with pytest.raises(UserError, match=f"context of {n}, .* --block-size"):
        corpus.batch(0, "val", 0, 2, n)


# ---- reuse, resume, repair

def test_what_is_ready_is_reused_without_reading_the_text(tmp_path, monkeypatch):
    source = write(tmp_path, stories(120))
    first = open_corpus(source, BYTES, tmp_path / "cache", log=quiet)
    monkeypatch.setattr(prepare, "documents", None)
    told = []
    second = open_corpus(source, BYTES, tmp_path / "cache", log=told.append)
    assert told == [] and second.meta == first.meta
    monkeypatch.setenv("CRATE_CACHE", str(tmp_path / "cache"))
    assert open_corpus(source, BYTES, log=quiet).meta == first.meta


def test_a_changed_source_is_noticed_and_others_are_left_alone(tmp_path, small_parts):
    source, told = write(tmp_path, stories(200)), []
    open_corpus(source, BYTES, tmp_path / "cache", log=quiet)
    open_corpus(source, load_tokenizer("pydocs:300"), tmp_path / "cache", log=quiet)
    open_corpus(source, BYTES, tmp_path / "cache", 0.2, log=quiet)
    assert len(list((tmp_path / "cache").iterdir())) == 3
    texts = stories(130, 5)
    write(tmp_path, texts)
    again = open_corpus(source, BYTES, tmp_path / "cache", log=told.append)
    assert sorted(pieces(again, "train") + pieces(again, "val")) == sorted(texts) and "has changed" in told[0]
    fewest = min(len(list(folder.glob("*.bin"))) for folder in (tmp_path / "cache").iterdir())
    assert fewest == 2 * len(again._shards["train"])        # nothing of the longer text is left


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


@pytest.mark.parametrize("harm", [flip, lambda path: path.write_bytes(path.read_bytes()[:-2]), Path.unlink,
                                  lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", ["00000.train.bin", "00002.val.bin", "corpus.json"])
def test_damage_is_noticed_and_mended(tmp_path, small_parts, harm, name):
    source, told = write(tmp_path, stories(250)), []
    open_corpus(source, BYTES, tmp_path / "cache", log=quiet)
    before = folder_bytes(tmp_path / "cache")
    harm(next((tmp_path / "cache").rglob(name)))
    open_corpus(source, BYTES, tmp_path / "cache", log=told.append)
    assert folder_bytes(tmp_path / "cache") == before
    assert "damaged" in told[0] or (name, harm) == ("corpus.json", Path.unlink)


def test_a_count_changed_by_hand_is_not_believed(corpus_cache):
    source, cache, before = corpus_cache
    index = next(cache.rglob("corpus.json"))
    index.write_text(index.read_text().replace('"bytes": ', '"bytes": 1'))
    open_corpus(source, BYTES, cache, log=quiet)
    assert folder_bytes(cache) == before


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=40), st.floats(0, 1),
       st.sampled_from([b"", b"[]", b"{}", b"null", b'{"sha256": 1}', None]))
def test_any_bytes_as_the_index(corpus_cache, junk, place, whole):
    source, cache, before = corpus_cache
    index = next(cache.rglob("corpus.json"))
    good = before[index.relative_to(cache)]
    at = int(place * len(good))
    index.write_bytes(whole if whole is not None else good[:at] + junk + good[at + len(junk):])
    open_corpus(source, BYTES, cache, log=quiet)
    assert folder_bytes(cache) == before


@pytest.fixture(scope="module")
def corpus_cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached")
    source = write(folder, stories(105, 4))
    open_corpus(source, BYTES, folder / "cache", log=quiet)
    return source, folder / "cache", folder_bytes(folder / "cache")


# Prepares argv[1] in argv[2] with small parts; signal argv[4] comes at the argv[3]-th file operation.
CHILD = """
import hashlib, os, signal, sys
from pathlib import Path
from crate_mini import cli
from crate_mini.corpus import corpora, prepare, tokenizer
source, cache, deadly, number = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
prepare.PART, prepare.BATCH = 3000, 1000
count = 0
def mortal(function):
    def call(*args):
        global count
        count += 1
        if count == deadly:
            os.kill(os.getpid(), number)
        return function(*args)
    return call
os.replace, os.fsync = mortal(os.replace), mortal(os.fsync)
signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background job is born deaf to it
tok = tokenizer.load_tokenizer("bytes")
identity = {"format": 1, "source": corpora.describe(source), "val_fraction": 0.1}
cli.run(lambda: prepare.prepare(cache, identity, source, tok, 1, print) and None)
"""


def child(source, cache, deadly, number=signal.SIGKILL, **options):
    words = [source, str(cache), str(deadly), str(int(number))]
    return subprocess.run([sys.executable, "-c", CHILD, *words], cwd=ROOT, capture_output=True, text=True,
                          **options)


def test_killed_at_any_file_operation_it_ends_with_the_same_bytes(tmp_path):
    source = write(tmp_path, stories(150))
    whole = child(source, tmp_path / "whole", 0)
    assert whole.returncode == 0, whole.stderr
    expected = folder_bytes(tmp_path / "whole")
    assert len(expected) == 2 * 9 + 1
    for deadly in (1, 2, 6, 7, 12, 23, 24, 35, 55):
        cache = tmp_path / f"killed{deadly}"
        assert child(source, cache, deadly).returncode == -signal.SIGKILL
        assert folder_bytes(cache) != expected
        done = child(source, cache, 0)
        assert done.returncode == 0 and folder_bytes(cache) == expected
        assert "going on after document" in done.stdout or deadly < 7


def test_ctrl_c_is_one_sentence_and_the_same_command_goes_on(tmp_path):
    source = write(tmp_path, stories(150))
    assert child(source, tmp_path / "whole", 0).returncode == 0
    for moment in (1, 7, 24, 55):
        cache = tmp_path / f"stopped{moment}"
        stopped = child(source, cache, moment, signal.SIGINT)
        assert stopped.returncode == 130 and stopped.stderr.count("\n") == 2
        assert "interrupted; the same command starts again." in stopped.stderr
        assert not list(cache.glob("*.tmp"))
        done = child(source, cache, 0)
        assert done.returncode == 0 and folder_bytes(cache) == folder_bytes(tmp_path / "whole")
        assert "going on after document" in done.stdout or moment < 7


def test_two_processes_at_once(tmp_path):
    source, told = write(tmp_path, stories(150)), []
    inside, ready = threading.Event(), threading.Event()

    def slow(line):
        told.append(line)
        if "token files go to" in line:
            inside.set()
            assert ready.wait(20)

    def wait(line):
        told.append(line)
        ready.set()

    first = threading.Thread(target=open_corpus, args=(source, BYTES, tmp_path / "cache", 0.1, 1, slow))
    first.start()
    assert inside.wait(20)
    second = open_corpus(source, BYTES, tmp_path / "cache", log=wait)
    first.join()
    assert sum("waiting for another process" in line for line in told) == 1
    assert sum("token files go to" in line for line in told) == 1 and second.meta["documents"] == 150


# ---- a disk that says no

def test_a_cache_that_cannot_be_written(tmp_path):
    source = write(tmp_path, stories(120))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="Cannot write .*CRATE_CACHE=FOLDER"):
        open_corpus(source, BYTES, tmp_path / "file" / "cache", log=quiet)


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    def limit():    # the kernel refuses to let a file grow beyond this, as a full disk would
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
    source = write(tmp_path, stories(150))
    full = child(source, tmp_path / "cache", 0, preexec_fn=limit)
    assert full.returncode == 2 and full.stderr.startswith("error: Cannot write")
    assert "MB; CRATE_CACHE" in full.stderr and "File too large" in full.stderr
    assert not list((tmp_path / "cache").glob("*.tmp"))
    assert child(source, tmp_path / "cache", 0).returncode == 0
    assert child(source, tmp_path / "whole", 0).returncode == 0
    assert folder_bytes(tmp_path / "cache") == folder_bytes(tmp_path / "whole")


# ---- bad input

@pytest.mark.parametrize("content, fraction, words", [
    ("", 0.1, "is empty"), (" \n\n \t\n", 0.1, "is empty"), (END * 5, 0.1, "is empty"),
    ("x", 0.1, "split of"), ("x", 0, None), ("xy", 0.0001, "val split of"),
    ("words and words", 1.5, "val_fraction is 1.5"), ("words and words", float("nan"), "val_fraction is nan"),
])
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
    raw = raw[:place + 1]
    path.write_bytes(gzip.compress(raw, 1) if packed else raw)
    with pytest.raises(UserError, match=f" at byte {place:,} "):     # half a letter at the end
        open_corpus(str(path), BYTES, tmp_path / "cache", log=quiet)


@pytest.mark.parametrize("source, words", [("nowhere.txt", "{}/nowhere.txt, and the named corpora are py"),
                                           ("tinystorys", "did you mean tinystories[?].; there is no file")])
def test_a_missing_corpus_says_what_was_looked_for(tmp_path, monkeypatch, source, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words.format(re.escape(str(tmp_path)))):
        open_corpus(source, BYTES, tmp_path / "cache", log=quiet)


def test_no_document_hashes_into_validation(tmp_path):
    with pytest.raises(UserError, match="val split .* 0 of"):
        open_corpus(write(tmp_path, stories(120)), BYTES, tmp_path / "cache", 1e-9, log=quiet)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([".txt", ".jsonl", ".txt.gz", ".jsonl.xz", ".bin", ""]), st.binary(max_size=200),
       st.sampled_from([BYTES, load_tokenizer("pydocs:300")]), st.floats(0, 1))
def test_any_bytes_as_a_corpus(suffix, raw, tok, fraction):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, f"fuzz{suffix}").write_bytes(raw)
        try:
            corpus = open_corpus(f"{folder}/fuzz{suffix}", tok, f"{folder}/cache", fraction, log=quiet)
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
    corpus = open_corpus(str(tmp_path), BYTES, tmp_path.parent / f"{tmp_path.name}-cache", 0.2, log=quiet)
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
