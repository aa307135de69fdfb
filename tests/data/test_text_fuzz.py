"""Odd texts through --data, in every container: the documents come out, or one sentence does.

`python -m pytest tests/data/test_text_fuzz.py --fuzz-minutes 60` tries new ones for an hour.
"""

import csv
import gzip
import io
import json
import lzma
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from story_corpora import BYTES, quiet

from crate_mini import UserError
from crate_mini.data import formats
from crate_mini.data.batches import open_corpus
from crate_mini.data.formats import END
from crate_mini.data.sources import documents, notes

ODD = [
    "\ufeff",
    "\r\n",
    "\r",
    "\n\n\n",
    "\u2028",
    "\x85",
    "\x0c",
    "\x1b[31m",
    END,
    "<|endoftext",
    '"',
    '""',
    ",",
    "\t",
    "{",
    '{"text": "x"}',
    "[1]",
    "<html>",
    "---\n",
    "e\u0301" * 9,
    "\u202eright to left",
    "🏳️‍🌈",
    "a" * 300,
    " " * 300,
    "\ud800",
    "0",
    "nan",
    "\\u0000",
    "\x01",
]
TEXTS = st.lists(
    st.lists(st.one_of(st.sampled_from(ODD), st.text(max_size=20)), max_size=6).map("".join),
    min_size=1,
    max_size=8,
)
PACKERS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}
if find_spec("zstandard"):
    PACKERS[".zst"] = lambda data: import_module("zstandard").ZstdCompressor().compress(data)
CONTAINERS = [".txt", ".md", "", ".jsonl", ".ndjson", ".json", ".csv", ".tsv"]
ROWS = CONTAINERS[3:]


def contained(texts, suffix):
    """The texts as the content of a file with this suffix."""
    if suffix in (".jsonl", ".ndjson"):
        return "".join(json.dumps({"text": text}) + "\n" for text in texts)
    if suffix == ".json":
        return json.dumps([{"id": i, "text": text} for i, text in enumerate(texts)])
    if suffix in (".csv", ".tsv"):
        file = io.StringIO()
        delimiter = "\t" if suffix == ".tsv" else ","
        writer = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL)
        writer.writerows([["id", "text"], *enumerate(texts)])
        return file.getvalue()
    return END.join(texts)


def expected(texts, suffix):
    """The documents that this file holds."""
    if suffix not in ROWS:
        text = END.join(texts).removeprefix("\ufeff")
        texts = text.replace("\r\n", "\n").replace("\r", "\n").split(END)
    texts = [text.strip("\ufeff\r\n") for text in texts]
    return [text for text in texts if text and not text.isspace()]


def in_utf8(texts, suffix):
    """Texts that this container can hold: only JSON can spell half of a surrogate pair."""
    if "json" in suffix:
        return texts
    return [text.encode("utf-8", "replace").decode().replace("\0", "") for text in texts]


@pytest.mark.fuzz
@pytest.mark.parametrize("suffix", CONTAINERS)
@given(texts=TEXTS, packing=st.sampled_from(sorted(PACKERS)), chunk=st.integers(3, 99))
def test_what_was_written_is_read(suffix, texts, packing, chunk):
    texts = in_utf8(texts, suffix)
    content = contained(texts, suffix)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "CHUNK", chunk)
        path = Path(folder, f"odd{suffix}{packing}")
        path.write_bytes(PACKERS[packing](content.encode()))
        try:
            read = list(documents(str(path)))
        except UserError as error:
            assert "\n" not in str(error)
            assert suffix == "", error  # text without a name may look like something else
            return
    wanted = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
    assert read == expected(wanted, suffix)


@pytest.mark.fuzz
@pytest.mark.parametrize("suffix", CONTAINERS)
@given(texts=TEXTS, packing=st.sampled_from(sorted(PACKERS)), fraction=st.floats(0, 1))
def test_what_was_read_is_in_the_token_files(suffix, texts, packing, fraction):
    content = contained(in_utf8(texts, suffix), suffix)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"odd{suffix}{packing}")
        path.write_bytes(PACKERS[packing](content.encode()))
        try:
            corpus = open_corpus(str(path), BYTES, f"{folder}/cache", fraction, log=quiet)
        except UserError as error:
            assert "\n" not in str(error)
            return
        ids = []
        for split, stream in corpus.streams.items():  # few documents: the text is cut, in order
            if corpus.n_tokens[split]:
                ids += stream.read(0, corpus.n_tokens[split]).tolist()
        written = BYTES.decode(id for id in ids if id != BYTES.eot)
        assert written == "".join(documents(str(path)))
        assert sum(corpus.n_bytes.values()) == len(written.encode())


@pytest.mark.fuzz
@given(
    names=st.lists(st.sampled_from(["README.md", "a.json", "b.csv", "c.txt", "d.html", "e.bin"])),
    raw=st.lists(st.binary(max_size=60), min_size=6, max_size=6),
    texts=TEXTS,
)
def test_any_folder_is_read_or_refused(names, raw, texts):
    with tempfile.TemporaryDirectory() as folder:
        for name, data in zip(sorted(set(names)), raw):
            Path(folder, name).write_bytes(data)
        Path(folder, "rows.jsonl").write_text(contained(texts, ".jsonl"))
        try:
            notes(folder)
            list(documents(folder))
        except UserError as error:
            assert "\n" not in str(error)
