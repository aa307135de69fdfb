"""Token files end as the same bytes, however often a build was interrupted, damaged or shared."""

import os
import signal
import threading
from pathlib import Path

import pytest
import story_corpora
from forked import run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from story_corpora import BYTES, decoded, folder_bytes, quiet, stories, write

from crate_mini import UserError
from crate_mini.data import formats, token_files
from crate_mini.data.batches import open_corpus
from crate_mini.data.tokenizer import load_tokenizer

small_parts = story_corpora.small_parts  # a fixture
BUILD = Path(__file__).with_name("build_token_files.py")


# ---- reuse, resume, repair -----------------------------------------------------------------------


def test_finished_files_are_reused_without_reading_the_text(tmp_path, monkeypatch):
    source = write(tmp_path, stories(120))
    first = open_corpus(source, BYTES, tmp_path / "cache", log=quiet)
    monkeypatch.setattr(token_files, "documents", None)
    lines = []
    second = open_corpus(source, BYTES, tmp_path / "cache", log=lines.append)
    assert lines == []
    assert second.meta == first.meta
    monkeypatch.setenv("CRATE_CACHE", str(tmp_path / "cache"))
    assert open_corpus(source, BYTES, log=quiet).meta == first.meta


def test_a_changed_source_is_noticed_and_others_are_left_alone(tmp_path, small_parts):
    cache = tmp_path / "cache"
    source = write(tmp_path, stories(200))
    open_corpus(source, BYTES, cache, log=quiet)
    open_corpus(source, load_tokenizer("pydocs:300"), cache, log=quiet)
    open_corpus(source, BYTES, cache, 0.2, log=quiet)
    assert len(list(cache.iterdir())) == 3
    shorter = stories(130, 5)
    write(tmp_path, shorter)
    lines = []
    corpus = open_corpus(source, BYTES, cache, log=lines.append)
    assert sorted(decoded(corpus, "train") + decoded(corpus, "val")) == sorted(shorter)
    assert "has changed" in lines[0]
    fewest = min(len(list(folder.glob("*.bin"))) for folder in cache.iterdir())
    assert fewest == 2 * len(corpus.streams["train"].paths)  # nothing of the longer text is left


def test_token_files_of_a_version_that_read_otherwise_are_built_again(tmp_path, monkeypatch):
    """An earlier version read an .ndjson as running text, its braces included."""
    source = str(tmp_path / "a.ndjson")
    Path(source).write_text("".join(f'{{"text": "Story {i}."}}\n' for i in range(200)))
    with monkeypatch.context() as patch:
        patch.setattr(token_files, "READING", 1)
        patch.setitem(formats.KINDS, ".ndjson", "text")
        corpus = open_corpus(source, BYTES, tmp_path / "cache", log=quiet)
        assert '{"text"' in decoded(corpus, "train")[0]
    lines = []
    corpus = open_corpus(source, BYTES, tmp_path / "cache", log=lines.append)
    assert "made by an earlier version" in lines[0]
    assert len(decoded(corpus, "train") + decoded(corpus, "val")) == 200
    assert "reading" not in corpus.meta  # a resumed run must not take it for another text


def flip_a_bit(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


def cut_the_end(path):
    path.write_bytes(path.read_bytes()[:-2])


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip_a_bit, cut_the_end, Path.unlink, empty])
@pytest.mark.parametrize("name", ["00000.train.bin", "00002.val.bin", "corpus.json"])
def test_damage_is_noticed_and_repaired(tmp_path, small_parts, damage, name):
    cache = tmp_path / "cache"
    source = write(tmp_path, stories(250))
    open_corpus(source, BYTES, cache, log=quiet)
    before = folder_bytes(cache)
    damage(next(cache.rglob(name)))
    lines = []
    open_corpus(source, BYTES, cache, log=lines.append)
    assert folder_bytes(cache) == before
    if (name, damage) != ("corpus.json", Path.unlink):
        assert "damaged" in lines[0]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(source, its cache, the content of the cache)."""
    folder = tmp_path_factory.mktemp("built")
    source = write(folder, stories(105, 4))
    open_corpus(source, BYTES, folder / "cache", log=quiet)
    return source, folder / "cache", folder_bytes(folder / "cache")


def test_a_count_changed_by_hand_is_not_believed(built):
    source, cache, before = built
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
def test_any_bytes_as_the_index(built, junk, place, whole):
    source, cache, before = built
    index = next(cache.rglob("corpus.json"))
    intact = before[index.relative_to(cache)]
    start = int(place * len(intact))
    patched = intact[:start] + junk + intact[start + len(junk) :]
    index.write_bytes(patched if whole is None else whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)  # 60 builds would wait for the disk
        open_corpus(source, BYTES, cache, log=quiet)
    assert folder_bytes(cache) == before


# ---- killed, interrupted, shared -----------------------------------------------------------------


def build(source, folder, operation=0, number=signal.SIGKILL, *largest_file):
    """Run build_token_files.py; returns the finished process."""
    words = [BUILD, source, folder, operation, int(number), *largest_file]
    return run_script(words)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(source, the token files of an undisturbed build)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    source = write(folder, stories(150))
    done = build(source, folder / "whole")
    assert done.returncode == 0, done.stderr
    files = folder_bytes(folder / "whole")
    assert len(files) == 2 * 9 + 1
    return source, files


@pytest.mark.parametrize("operation", [1, 2, 6, 7, 12, 23, 24, 35, 55])
def test_killed_at_any_file_operation_it_ends_with_the_same_bytes(tmp_path, undisturbed, operation):
    source, expected = undisturbed
    assert build(source, tmp_path, operation).returncode == -signal.SIGKILL
    assert folder_bytes(tmp_path) != expected
    done = build(source, tmp_path)
    assert done.returncode == 0
    assert folder_bytes(tmp_path) == expected
    assert "continuing after document" in done.stdout or operation < 7


@pytest.mark.parametrize("operation", [1, 7, 24, 55])
def test_ctrl_c_is_one_sentence_and_the_same_command_continues(tmp_path, undisturbed, operation):
    source, expected = undisturbed
    stopped = build(source, tmp_path, operation, signal.SIGINT)
    assert stopped.returncode == 130
    assert stopped.stderr == "\ninterrupted; run the same command to start again.\n"
    assert not list(tmp_path.glob("*.tmp"))
    done = build(source, tmp_path)
    assert done.returncode == 0
    assert folder_bytes(tmp_path) == expected
    assert "continuing after document" in done.stdout or operation < 7


def test_of_two_processes_at_once_one_waits_for_the_other(tmp_path):
    source = write(tmp_path, stories(150))
    lines = []
    building = threading.Event()
    waiting = threading.Event()

    def log_of_first(line):
        lines.append(line)
        if "token files go to" in line:
            building.set()
            assert waiting.wait(20)

    def log_of_second(line):
        lines.append(line)
        waiting.set()

    arguments = (source, BYTES, tmp_path / "cache", 0.1, 1, log_of_first)
    first = threading.Thread(target=open_corpus, args=arguments)
    first.start()
    assert building.wait(20)
    second = open_corpus(source, BYTES, tmp_path / "cache", log=log_of_second)
    first.join()
    assert sum("waiting for another process" in line for line in lines) == 1
    assert sum("token files go to" in line for line in lines) == 1
    assert second.meta["documents"] == 150


# ---- a disk that refuses -------------------------------------------------------------------------


def test_a_cache_that_cannot_be_written_is_reported(tmp_path):
    source = write(tmp_path, stories(120))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="Cannot write .*CRATE_CACHE=FOLDER"):
        open_corpus(source, BYTES, tmp_path / "file" / "cache", log=quiet)


def test_a_full_disk_leaves_nothing_half_written(tmp_path, undisturbed):
    source, expected = undisturbed
    full = build(source, tmp_path, 0, signal.SIGKILL, 4000)
    assert full.returncode == 2
    assert full.stderr.startswith("error: Cannot write")
    assert "MB; CRATE_CACHE" in full.stderr and "File too large" in full.stderr
    assert not list(tmp_path.glob("*.tmp"))
    assert build(source, tmp_path).returncode == 0
    assert folder_bytes(tmp_path) == expected
