"""Token files are the same bytes however often their making was cut, damaged, shared or out of disk."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import storybook
from hypothesis import given, settings
from hypothesis import strategies as st
from storybook import BYTES, folder_bytes, pieces, quiet, stories, write

from crate_mini import UserError
from crate_mini.data import token_files as prepare
from crate_mini.data.batches import load_tokenizer, open_corpus

small_parts = storybook.small_parts  # a fixture
ROOT = Path(__file__).parents[2]


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
    assert (
        sorted(pieces(again, "train") + pieces(again, "val")) == sorted(texts)
        and "has changed" in told[0]
    )
    fewest = min(len(list(folder.glob("*.bin"))) for folder in (tmp_path / "cache").iterdir())
    assert fewest == 2 * len(again._shards["train"])  # nothing of the longer text is left


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "harm",
    [
        flip,
        lambda path: path.write_bytes(path.read_bytes()[:-2]),
        Path.unlink,
        lambda path: path.write_bytes(b""),
    ],
)
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
@given(
    st.binary(max_size=40),
    st.floats(0, 1),
    st.sampled_from([b"", b"[]", b"{}", b"null", b'{"sha256": 1}', None]),
)
def test_any_bytes_as_the_index(corpus_cache, junk, place, whole):
    source, cache, before = corpus_cache
    index = next(cache.rglob("corpus.json"))
    good = before[index.relative_to(cache)]
    at = int(place * len(good))
    index.write_bytes(whole if whole is not None else good[:at] + junk + good[at + len(junk) :])
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
    return subprocess.run(
        [sys.executable, "-c", CHILD, *words], cwd=ROOT, capture_output=True, text=True, **options
    )


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

    first = threading.Thread(
        target=open_corpus, args=(source, BYTES, tmp_path / "cache", 0.1, 1, slow)
    )
    first.start()
    assert inside.wait(20)
    second = open_corpus(source, BYTES, tmp_path / "cache", log=wait)
    first.join()
    assert sum("waiting for another process" in line for line in told) == 1
    assert (
        sum("token files go to" in line for line in told) == 1 and second.meta["documents"] == 150
    )


# ---- a disk that says no


def test_a_cache_that_cannot_be_written(tmp_path):
    source = write(tmp_path, stories(120))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="Cannot write .*CRATE_CACHE=FOLDER"):
        open_corpus(source, BYTES, tmp_path / "file" / "cache", log=quiet)


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    def limit():  # the kernel refuses to let a file grow beyond this, as a full disk would
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
