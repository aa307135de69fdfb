"""Classifiers learn what is planted, and their files are classifiers and checkpoints."""

import signal
from dataclasses import replace

import numpy as np
import planted_reviews
import pytest
import torch
from forked import run_script
from planted_reviews import FILLER, SPEC, reviews, silent, write

from crate_mini import UserError
from crate_mini.concepts import classifier, finetune, labelled_texts
from crate_mini.concepts.types import SPLITS
from crate_mini.data.tokenizer import load_tokenizer
from crate_mini.training import checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return planted_reviews.base(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return planted_reviews.trained(tmp_path_factory.getbasetemp())


def test_it_learns_what_is_planted_and_reports_how_well(trained):
    _, facts = trained
    test = facts["test"]
    assert test["n"] == 52 and test["accuracy"] > 0.9 and test["chance"] == 0.5
    assert test["ci95"][0] < test["accuracy"] < test["ci95"][1] or test["accuracy"] == 1
    assert facts["labelled"]["classes"] == ["bad<b>", "good"]


def test_the_best_epoch_on_the_stop_split_stays(base, monkeypatch):
    lm, _ = checkpoint.load(base)
    model = classifier.Classifier(lm, 2, torch.Generator().manual_seed(0))
    texts = [row["text"] for row in reviews(20)]
    ids, lengths = classifier.encode(load_tokenizer(SPEC), texts, 40, "start")
    label, split = torch.arange(20) % 2, torch.arange(20) // 8
    scores = iter([0.5, 0.9, 0.1])
    judged, heads = [], []

    def accuracy(logits, label):
        judged.append(label)
        return {"accuracy": next(scores)}

    def keep_head(line):
        heads.append(model.head.weight.detach().clone())

    monkeypatch.setattr(finetune, "accuracy", accuracy)
    settings = finetune.Settings(epochs=3, device="cpu")
    finetune.fit(model, ids, lengths, label, split, settings, log=keep_head)
    assert torch.equal(model.head.weight, heads[1]) and not torch.equal(heads[1], heads[2])
    assert all(torch.equal(labels, label[split == SPLITS["stop"]]) for labels in judged)


def test_its_folder_is_the_classifier_and_a_checkpoint(trained):
    settings, facts = trained
    folder = f"{settings.out}/last"
    model, meta = classifier.load(folder)
    lm, _ = checkpoint.load(folder)
    for a, b in zip(lm.state_dict().values(), model.lm.state_dict().values()):
        assert torch.equal(a, b)
    labelled = finetune.texts_of(meta["training"]["classifier"])
    rows = np.flatnonzero(labelled.split == SPLITS["test"])
    tokenizer = load_tokenizer(SPEC)
    ids, lengths = classifier.encode(tokenizer, labelled.texts, settings.length, settings.cut)
    logits = classifier.logits(model, ids, lengths, rows)
    again = classifier.accuracy(logits, torch.from_numpy(labelled.label[rows]))
    assert again["right"] == facts["test"]["right"]


def test_padding_and_the_layer_to_start_from_do_not_matter(trained):
    model, _ = classifier.load(f"{trained[0].out}/last")
    texts = ["a film", "a fine plot of it all"]
    ids, lengths = classifier.encode(load_tokenizer(SPEC), texts, 40, "start")
    with torch.no_grad():
        logits = model(ids, lengths)
        for i, n in enumerate(lengths):
            alone = model(ids[i : i + 1, :n], lengths[i : i + 1])
            torch.testing.assert_close(alone[0], logits[i])
        for layer in range(3):
            z = model.states(ids, layer)
            torch.testing.assert_close(model.run_from(z, layer, lengths)[0], logits)
        torch.testing.assert_close(model.states(ids)[1], model.states(ids, 1))


def test_a_longer_text_keeps_its_start_or_its_end():
    tokenizer = load_tokenizer("bytes")
    mark = tokenizer.eot
    for cut, kept in (("start", b"abc"), ("end", b"def")):
        ids, _ = classifier.encode(tokenizer, ["abcdef"], 5, cut)
        assert ids[0].tolist() == [mark, *kept, mark]


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
    ],
)
def test_bad_settings_are_one_sentence(trained, tmp_path, change, message):
    settings = replace(trained[0], out=str(tmp_path), **change)
    with pytest.raises(UserError, match=message):
        finetune.finetune(settings, log=silent)


def test_a_stop_keeps_the_best_finished_epoch(trained, tmp_path, monkeypatch, capsys):
    """One within the first epoch has nothing to keep, which is said."""
    step, ends = finetune.step, []
    epoch_line = finetune.epoch_line

    def interrupted(*arguments):
        if len(ends) == stop_in - 1:
            signal.raise_signal(signal.SIGTERM)
        step(*arguments)

    def counted(history, *others):
        ends.append(len(history))
        return epoch_line(history, *others)

    monkeypatch.setattr(finetune, "step", interrupted)
    monkeypatch.setattr(finetune, "epoch_line", counted)
    settings = replace(trained[0], out=str(tmp_path / "a"))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    stop_in = 1
    with pytest.raises(UserError, match="stopped within the first epoch.*start again"):
        finetune.run(settings)
    assert not (tmp_path / "a").exists()
    stop_in = 3
    assert finetune.run(settings) == 128 + signal.SIGINT
    assert "stopped in epoch 3/6" in capsys.readouterr().out
    facts = classifier.load(tmp_path / "a" / "last")[1]["training"]["classifier"]
    assert facts["epochs"] == trained[1]["epochs"][:2] and facts["test"]["n"] == 52
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_a_finished_run_is_not_replaced_by_accident(trained):
    with pytest.raises(UserError, match="already holds a run"):
        finetune.finetune(trained[0], log=silent)


def test_a_wild_learning_rate_ends_in_numbers_or_in_a_sentence(trained, tmp_path):
    settings = replace(trained[0], out=str(tmp_path), lr=9.0, epochs=1)
    try:
        finetune.finetune(settings, log=silent)
    except UserError as error:
        assert "lower --lr" in str(error)


def test_test_texts_that_read_like_training_texts_do_not_count(trained, tmp_path):
    """Ten texts end differently where nobody reads: as cut, they are training texts."""
    rows = reviews(240, filler=FILLER[:-1])  # long markup would make more texts equal
    path = write(tmp_path / "a.jsonl", rows)
    settings = replace(trained[0], epochs=1, length=12, out=str(tmp_path / "run"), data=str(path))
    labelled = labelled_texts.load(settings.data, settings.texts, settings.seed)
    by_split = {name: [] for name in SPLITS}
    for text, value in zip(labelled.texts, labelled.split):
        by_split[list(SPLITS)[value]].append(text)
    changed = {}
    for i, text in enumerate(by_split["test"][:10]):
        changed[text] = f"{by_split['train'][0]} and so on, {i}"
    write(path, [{**row, "text": changed.get(row["text"], row["text"])} for row in rows])
    facts = finetune.finetune(settings, log=silent)
    assert facts["test"]["n"] == len(by_split["test"]) - 10
    with pytest.raises(UserError, match="raise --length"):
        finetune.unseen(torch.ones(6, 4), torch.tensor([0, 0, 1, 1, 2, 2]))


def test_a_folder_that_cannot_be_written_fails_before_the_work(trained, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")

    def work(settings):
        pytest.fail("it worked before it looked")

    monkeypatch.setattr(finetune, "finetune", work)
    settings, _ = trained
    words = ["--init", settings.init, "--data", settings.data, "--out", str(tmp_path / "file")]
    with pytest.raises(UserError, match="Nothing can be written"):
        finetune.main(words)


def test_a_checkpoint_without_a_head_is_not_a_classifier(base):
    with pytest.raises(UserError, match="is not a classifier"):
        classifier.load(base)


def test_changed_texts_are_noticed(trained):
    _, facts = trained
    with pytest.raises(UserError, match="holds other texts"):
        finetune.texts_of({**facts, "settings": {**facts["settings"], "seed": 5}})


def test_train_py_with_the_task_alone_ends_with_one_sentence_and_code_2(tmp_path):
    process = run_script(["train.py", "--task", "classify"], cwd=tmp_path)
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert "starts from a checkpoint" in process.stderr
