"""Histories over the checkpoints of a run: of layers, of scores, and of single neurons."""

import json
import re
import sys
from unittest import mock

import pytest
import torch
from tiny_checkpoints import save_checkpoint, write_text

import interpret
from crate_mini import UserError
from crate_mini.console import terminal
from crate_mini.data.tokenizer import visible
from crate_mini.layers import history, measure
from crate_mini.neurons.quick_score import quick_scores
from crate_mini.neurons.record import sites
from crate_mini.training import checkpoint, histories


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with three checkpoints, the second one with other weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRATE_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("run")
        text = write_text(folder / "text.txt")
        for step in (0, 20, 100):
            name = f"step-{step:06d}"
            path = save_checkpoint(folder / name, text, context=64)
            lm, meta = checkpoint.load(path)
            lm.blocks[0].sparsifier.D.data *= 1 + step / 50
            training = {**meta["training"], "step": step}
            checkpoint.save(path, lm, tokenizer=meta["tokenizer"], training=training)
        yield folder


def paths(run, *steps):
    return [str(run / f"step-{step:06d}") for step in steps]


def interpreted(*words):
    with mock.patch.object(sys, "argv", ["interpret.py", *words]):
        interpret.main()


def written(folder, name):
    return json.loads((folder / f"{name}-history.json").read_text())


# ---- layers --------------------------------------------------------------------------------------


def test_layers_of_several_checkpoints_are_those_of_each(run, tmp_path, capsys):
    words = ["layers", *paths(run, 100, 0, 20), "--tokens", "128", "--lasso-tokens", "8"]
    interpreted(*words, "--out", str(tmp_path))
    result = written(tmp_path, "layers")
    assert [row["step"] for row in result["rows"]] == [0, 20, 100]  # not as they were given
    lm, meta, tokenizer = checkpoint.open_model(run / "step-000020")
    corpus = checkpoint.held_out(run, meta, tokenizer)
    windows = [x for x, _ in corpus.blocks("val", 8, 64, 128)]
    expected = measure.measure_layers(lm, windows, "x", 8)
    for row, layer in zip(result["rows"][1]["layers"], expected, strict=True):
        assert row["density"] == layer["density"] and row["layer"] == layer["layer"]
        assert row["rate"][measure.AFTER] == layer["rate"][measure.AFTER]["U"]["mean"]
        assert row["objective_ratio"] == layer["lasso"][-1] / layer["lasso"][0]
    output = capsys.readouterr().out
    table = [line.split() for line in output.splitlines() if re.match(r" *(step|\d+)  ", line)]
    assert [line[0] for line in table][-4:] == ["step", "0", "20", "100"]
    first = result["rows"][0]["layers"][0]
    assert f"{first['rate'][measure.BEFORE]:.1f}" in table[-3]
    assert result["command"].startswith("python interpret.py layers") and result["machine"]
    assert (tmp_path / "layers-history.png").read_bytes().startswith(b"\x89PNG")


def test_the_twin_has_a_history_without_an_objective(run, tmp_path):
    for step in (1, 2):
        path = save_checkpoint(tmp_path / f"s{step}", run / "text.txt", "gpt2")
        lm, meta = checkpoint.load(path)
        facts = {**meta["training"], "step": step}
        checkpoint.save(path, lm, tokenizer=meta["tokenizer"], training=facts)
    words = [str(tmp_path / "s1"), str(tmp_path / "s2"), "--tokens", "64"]
    with mock.patch.object(history, "draw", lambda rows, target: target):
        interpreted("layers", *words)
    row = written(tmp_path / "interpret", "layers")["rows"][0]["layers"][0]
    assert row["objective_ratio"] is None and row["projection"] == "value"


# ---- neurons -------------------------------------------------------------------------------------


def test_neurons_of_several_checkpoints_are_those_of_each(run, tmp_path, capsys):
    words = ["neurons", *paths(run, 0, 100), "--tokens", "3000", "--layers", "0"]
    interpreted(*words, "--follow", "0:5,0:3", "--out", str(tmp_path))
    result = written(tmp_path, "neurons")
    assert [row["step"] for row in result["rows"]] == [0, 100]
    lm, meta, tokenizer = checkpoint.open_model(run / "step-000100")
    corpus = checkpoint.held_out(run, meta, tokenizer)
    scores = quick_scores(lm, meta, tokenizer, corpus, sites(lm, "0"), 3000)["L0"]
    row = result["rows"][1]
    assert row["layers"]["0"]["density"] == pytest.approx(scores["density"].mean())
    assert row["layers"]["0"]["dead"] == int((scores["density"] == 0).sum()) >= 1
    assert row["neurons"]["0:5"]["ngram_r"] == pytest.approx(scores["ngram_r"][5])
    best = [visible(tokenizer.token_bytes(id)) for id in scores["top"][5].tolist()]
    assert row["neurons"]["0:5"]["tokens"] == best and len(best) == 3
    assert best[0] == highest_token(lm, tokenizer, corpus, 5)
    dead = {"ngram_r": None, "null_r": None, "density": 0, "tokens": []}
    assert row["neurons"]["0:3"] == dead
    output = capsys.readouterr().out
    assert re.search(r"0:5 +ngram_r +density +highest on", output) and "none" in output
    assert (tmp_path / "neurons-history.png").read_bytes().startswith(b"\x89PNG")


def highest_token(lm, tokenizer, corpus, neuron):
    """The token on which a neuron of layer 0 has the largest mean, over all held-out text."""
    sums, counts = torch.zeros(tokenizer.vocab_size), torch.zeros(tokenizer.vocab_size)
    for x, _ in corpus.blocks("val", 8, 64):
        with torch.no_grad():
            codes = lm.trunk(x)[1][0][..., neuron].flatten()
        sums.index_add_(0, x.flatten(), codes)
        counts.index_add_(0, x.flatten(), torch.ones_like(codes))
    means = torch.where(counts > 9, sums / counts, 0)
    return visible(tokenizer.token_bytes(means.argmax().item()))


def test_a_pattern_that_the_shell_left_is_expanded(run, tmp_path):
    assert terminal.expanded([str(run / "step-*")]) == paths(run, 0, 20, 100)
    assert terminal.expanded([str(run / "none-*"), "a"]) == [str(run / "none-*"), "a"]
    strange = tmp_path / "step-[1]"
    strange.mkdir()
    assert terminal.expanded([str(strange)]) == [str(strange)]


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        (("--follow", "5"), "--follow '5' names no neurons; give layer:neuron"),
        (("--follow", "0:128"), "--follow 0:128 does not exist; layers are 0, 1 here"),
        (("--follow", "2:1"), "--follow 2:1 does not exist"),
        (("--trie", "3"), "--trie goes with a single checkpoint"),
        (("--until", "score"), "--until goes with a single checkpoint"),
        (("--no-dedup",), "--dedup goes with a single checkpoint"),
    ],
)
def test_bad_settings_of_a_history_are_refused(run, tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        interpreted("neurons", *paths(run, 0, 20), *words, "--out", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_a_single_checkpoint_follows_nobody(run):
    with pytest.raises(UserError, match="--follow needs several checkpoints"):
        interpreted("neurons", *paths(run, 0), "--follow", "0:5")


def test_checkpoints_of_two_runs_have_no_history(run, tmp_path):
    def opened(*checkpoints):
        return list(histories.each(checkpoints, "cpu"))

    with pytest.raises(UserError, match="has step 0, as .* has; give checkpoints of different"):
        opened(*paths(run, 0, 0))
    with mock.patch.object(checkpoint, "read_meta") as read_meta:
        for step in (None, "7", {}, [7]):
            read_meta.return_value = {"training": {"step": step}}
            with pytest.raises(UserError, match="has step .*; give checkpoints of different"):
                opened("a", "b")
    other = save_checkpoint(tmp_path / "other", run / "text.txt", "gpt2")
    with pytest.raises(UserError, match="are models of different shapes"):
        opened(str(other), *paths(run, 20))
    with pytest.raises(UserError, match="No checkpoint in"):
        opened(*paths(run, 0, 7))
