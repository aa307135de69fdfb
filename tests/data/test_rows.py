"""Rows with a field of text: which field is read, what is skipped, what is refused."""

import csv
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from story_corpora import BYTES, quiet

from crate_mini import UserError
from crate_mini.data import rows
from crate_mini.data.batches import open_corpus
from crate_mini.data.formats import Position
from crate_mini.data.sources import documents, notes

DOCS = ["One, with a comma.", 'Two "quoted"\r\nover two lines.', "Drei: äöü 🙂", "x\ry"]


def write(path, docs=DOCS, field="text", **more):
    """Write documents as rows of the kind that the path's name asks for; returns the path."""
    records = [{"id": i, field: doc, **more} for i, doc in enumerate(docs)]
    if path.suffix == ".json":
        text = json.dumps(records, indent=1)
    elif path.suffix in (".csv", ".tsv"):
        file = io.StringIO()
        delimiter = "\t" if path.suffix == ".tsv" else ","
        writer = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL)
        writer.writerow(records[0])
        writer.writerows(record.values() for record in records)
        text = file.getvalue()
    else:
        text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(text.encode())
    return str(path)


def read(source, text_field=None):
    """(documents, the Position after them, the notes) of a source."""
    lines = []
    position = Position(log=lines.append)
    return list(documents(source, position, text_field)), position, lines


NAMES = ["a.jsonl", "a.ndjson", "a.json", "a.csv", "a.tsv", "rows", "rows.old"]


@pytest.mark.parametrize("name", NAMES)
def test_rows_give_back_their_text_with_its_line_ends(tmp_path, name):
    docs, position, lines = read(write(tmp_path / name))
    assert docs == DOCS
    assert position.done == position.total and position.skipped == 0
    assert len(lines) == name.startswith("rows")  # their kind is guessed, which a note says


@pytest.mark.parametrize("name", NAMES)
def test_the_field_is_content_or_the_only_one_with_text_and_a_note_says_so(tmp_path, name):
    for field in ("content", "story"):
        docs, _, lines = read(write(tmp_path / name, field=field))
        assert docs == DOCS
        assert f'"{field}" is read instead' in lines[-1]
    assert read(write(tmp_path / name, content="t"))[0] == DOCS  # the field "text" comes first
    docs, _, lines = read(write(tmp_path / name, field="story", title="t"), "story")
    assert docs == DOCS and not any("instead" in line for line in lines)


@pytest.mark.parametrize("name", NAMES)
def test_a_choice_between_fields_and_a_missing_one_are_refused(tmp_path, name):
    source = write(tmp_path / name, field="story", title="t")
    with pytest.raises(UserError, match="story, title; choose one with train.py's --text-field"):
        read(source)
    with pytest.raises(UserError, match='no field "content" .* --text-field content .*id, story'):
        read(source, "content")


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json"])
def test_null_rows_are_skipped_and_counted(tmp_path, name):
    records = [None, {"text": None}, {"text": "one"}, None, {"text": None}, {"text": "two"}]
    lines = [json.dumps(record) for record in records]
    text = f"[{', '.join(lines)}]" if name == "a.json" else "\n".join(lines)
    (tmp_path / name).write_text(text)
    docs, position, _ = read(str(tmp_path / name))
    assert (docs, position.skipped) == (["one", "two"], 4)


def test_a_line_end_at_the_end_of_a_row_is_dropped_whole(tmp_path):
    assert read(write(tmp_path / "a.jsonl", ["\r\none\r\ntwo\r\n"]))[0] == ["one\r\ntwo"]


BAD = {
    "half.json": ('[{"text": "a"}, {"text": ', "row 2 is not JSON"),
    "open.json": ('[{"text": "a"}', "ends within its array, after row 1"),
    "words.json": ("not JSON", "row 1 is not JSON"),
    "deep.json": ("[" * 100_000, "row 1 is not JSON"),
    "number.json": ("[1, 2]", 'row 1 has no field "text"'),
    "strings.json": ('["a", "b"]', 'row 1 has no field "text"'),
    "later.json": ('[{"text": "a"}, {"body": "b"}]', 'row 2 has no field "text"'),
    "wide.csv": ("id,text\n1,one, two\n", "line 2 has 3 cells for the 2 columns"),
    "open.csv": ('id,text\n1,"one\n', "cannot be read"),
    "no-header.csv": ("1,one\n2,two\n", "does not name its columns"),
    "page.html": ("<p>text</p>", "is markup"),
    "page.HTM.gz": ("<p>text</p>", "is markup"),
    "page": ("<!DOCTYPE html><p>text</p>", "is markup"),
    "feed": ("\n<?xml version='1.0'?><p>text</p>", "is markup"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_rows_of_text_is_one_sentence(tmp_path, name):
    text, words = BAD[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        read(str(tmp_path / name))
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_text_that_only_looks_a_little_like_json_or_markup_is_text(tmp_path):
    for text in ("[1] A footnote.", "{curly} words", "< 5 is small", "<html2 is a name", "{"):
        (tmp_path / "text").write_text(text)
        assert read(str(tmp_path / "text"))[0] == [text]


@pytest.mark.parametrize("source", ["a.txt", "pydocs", "pile:3"])
def test_a_field_of_running_text_is_refused(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(UserError, match="--text-field body has no effect: .* leave it out"):
        open_corpus(source, BYTES, tmp_path / "cache", log=quiet, text_field="body")


def test_names_of_fields_reach_the_terminal_in_printable_form(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"\x1b[31mred": "some text"}))
    lines = []
    open_corpus(str(tmp_path / "a.jsonl"), BYTES, tmp_path / "cache", log=lines.append)
    assert any("is read instead" in line for line in lines)
    assert not any("\x1b" in line for line in lines)


def test_an_endless_row_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "LONGEST_ROW", 1000)
    for name in ("a.jsonl", "a.json", "a.csv"):
        source = write(tmp_path / name, ["x" * 3_000_000])
        with pytest.raises(UserError, match="a row of more than 1,000 characters|field larger"):
            read(source)


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=20)), st.integers(1, 30))
def test_json_does_not_depend_on_where_chunks_end(texts, size):
    text = json.dumps([{"text": text} for text in texts])
    chunks = [text[i : i + size] for i in range(0, len(text), size)]
    assert [row["text"] for _, row in rows.from_json(chunks, "a.json")] == texts


# ---- folders -------------------------------------------------------------------------------------


def test_a_readme_next_to_rows_and_a_card_of_the_hub_are_not_text(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "a.jsonl")
    (tmp_path / "README.md").write_text("# notes")
    (tmp_path / "page.html").write_text("<p>text</p>")
    assert read(str(tmp_path))[0] == DOCS
    assert notes(str(tmp_path)) == [f"note      {tmp_path}: left out README.md, page.html"]
    (tmp_path / "data" / "a.jsonl").unlink()
    assert read(str(tmp_path))[0] == ["# notes"]  # next to text, a readme is text
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# card")
    (tmp_path / "b.txt").write_text("some text")
    assert read(str(tmp_path))[0] == ["some text"]


def test_tables_of_facts_in_a_folder_are_skipped_with_a_note(tmp_path):
    write(tmp_path / "b.jsonl")
    (tmp_path / "a.json").write_text('{"features": {"dtype": "string"}}')
    (tmp_path / "c.csv").write_text("id,label\n1,2\n")
    (tmp_path / "d.json").write_text("// not JSON")
    docs, position, lines = read(str(tmp_path))
    assert docs == DOCS and position.done == position.total
    assert [line.split(":")[0] for line in lines] == ["note      skipped"] * 3
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(UserError, match='a.json.* has no field "text"'):
        read(str(tmp_path))
    with pytest.raises(UserError, match='a.json.* has no field "story".* --text-field story'):
        read(str(tmp_path), "story")
