"""`interpret.py layers`: its files and table for every kind of model, its errors."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from figure_texts import clashes
from held_text import most_tensors_held
from tiny_layers import KINDS, tiny

from crate_mini import model
from crate_mini.console import terminal
from crate_mini.data.batches import open_corpus
from crate_mini.data.tokenizer import load_tokenizer
from crate_mini.layers import figure
from crate_mini.training import checkpoint

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import interpret  # noqa: E402


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CRATE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text file of 400 lines."""
    path = tmp_path_factory.mktemp("layers") / "text.txt"
    lines = [f"line {i * i} speaks of codes and rates number {i}\n" for i in range(400)]
    path.write_text("".join(lines))
    return path


def quiet(line):
    """A log that shows nothing."""


def save(folder, text, kind="crate", lm=None, **settings):
    """Save a tiny model with the facts that training would add; returns the path."""
    tokenizer = load_tokenizer("bytes")
    corpus = open_corpus(str(text), tokenizer, log=quiet)
    settings = {"data": str(text), "val_fraction": 0.1, "seed": 5, **settings}
    checkpoint.save(
        folder / "best",
        lm or tiny(vocab_size=320, **KINDS[kind]),
        tokenizer={"spec": "bytes", "hash": tokenizer.hash},
        training={"settings": settings, "step": 1, "corpus": corpus.meta},
    )
    return folder / "best"


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs `python interpret.py WORDS`; returns (exit code, stdout, stderr)."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["interpret.py", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            terminal.run(interpret.main)
        output = capsys.readouterr()
        return end.value.code, output.out, output.err

    return call


@pytest.fixture
def no_pictures(monkeypatch):
    """Leaves out the drawing, which takes longer than the measurement."""

    def draw(result, target):
        return target

    monkeypatch.setattr(figure, "draw", draw)
    monkeypatch.setattr(figure, "l0_by_layer", draw)


def read(folder):
    return json.loads((folder / "layers.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_works_for_every_kind_of_model(kind, text, tmp_path, call):
    ckpt = save(tmp_path, text, kind)
    code, out, err = call("layers", ckpt, "--tokens", 600)
    assert not code and not err, err
    result = read(tmp_path / "interpret")
    assert result["tokens"] == 592
    assert result["seed"] == 5
    assert result["machine"]["torch"] == torch.__version__
    assert result["command"].startswith("python interpret.py layers")
    assert len(result["trained"]) == len(result["untrained"]) == 2
    for layer in result["trained"] + result["untrained"]:
        check_layer(layer, result)
    for name in ("layers.png", "l0.png"):
        assert (tmp_path / "interpret" / name).read_bytes().startswith(b"\x89PNG")
    check_table(out, model.Config(**result["checkpoint"]["config"]))
    check_verdict(out, result)


def check_layer(layer, result):
    """A layer has the numbers of its kind, and rates within their bounds."""
    config = model.Config(**result["checkpoint"]["config"])
    is_ista = config.sparsifier == "ista"
    assert (layer["projection"] == "U") == (config.attention == "mssa")
    assert (layer["lasso"] is not None) == is_ista
    assert (layer["reconstruction_error"] is not None) == is_ista
    assert (layer["optimum"] is not None) == is_ista
    assert not is_ista or len(layer["lasso"]) == config.ista_steps + 1
    assert len(layer["density_by_neuron"]) == layer["neurons"] == config.n_code
    for basis in ("U", "orthonormal U", "whole"):
        least, most = result["rate_bounds"]["whole" if basis == "whole" else "U"]
        for rates in layer["rate"].values():
            assert least <= rates[basis]["mean"] <= most


def check_table(out, config):
    """The printed table has the columns of this kind of model, each with a note."""
    heads = " ".join(line for line in out.splitlines() if "  layer  " in line)
    titles = set(re.findall(r"\S+ %|\S+", heads))
    assert ("objective" in titles) == (config.sparsifier == "ista")
    assert "coherence" in titles
    assert ("the value projection stands in" in out) == (config.attention == "mhsa")
    for title in titles - {"layer"}:
        assert f"\n{title:<12}" in out, title


def check_verdict(out, result):
    """The output ends with the verdict of layers.json, and its numbers are those of the layers."""
    judgement = result["verdict"]
    printed = " ".join(out.split())
    assert printed.endswith(judgement["overall"])
    assert judgement["overall"].startswith(("Yes", "No", "Only in part"))
    for layer, numbers in zip(judgement["layers"], result["trained"], strict=True):
        assert layer["layer"] == numbers["layer"]
        before, after = (rates["U"]["mean"] for rates in numbers["rate"].values())
        assert (layer["attention"]["before"], layer["attention"]["after"]) == (before, after)
        for name in judgement["theory"]:
            assert layer[name]["sentence"] in printed
        if numbers["lasso"]:
            assert layer["ISTA steps"]["objectives"] == numbers["lasso"]
            assert layer["optimum"]["best"] == numbers["optimum"]["best"]
            assert layer["step size"]["eta_norm2"] == numbers["dictionary"]["eta_norm2"]


def test_the_figure_shows_the_verdict_and_the_numbers_of_the_file(
    text, tmp_path, call, monkeypatch
):
    drawings = []

    def keep(drawing, target):
        drawings.append(drawing)
        return target

    monkeypatch.setattr(figure, "write", keep)
    code, _, _ = call("layers", save(tmp_path, text), "--tokens", 64, "--lasso-tokens", 20)
    assert not code
    result = read(tmp_path / "interpret")
    shown = " ".join(drawings[0].get_suptitle().split())
    assert result["verdict"]["overall"] in shown
    for layer in result["verdict"]["layers"]:
        assert f"layer {layer['layer']}: {layer['brief']}" in shown
    assert not clashes(drawings[0])
    for start, aspect in (("coding rate", "attention"), ("size of the ISTA", "step size")):
        (panel,) = [axes for axes in drawings[0].axes if axes.get_title().startswith(start)]
        marks = [text.get_text().split("\n")[1] for text in panel.get_xticklabels()]
        holds = [layer[aspect]["holds"] for layer in result["verdict"]["layers"]]
        assert marks == ["✓" if held else "✗" for held in holds]
        assert panel.get_ylim()[0] == 0 and panel.get_ylabel()
    (panel,) = [axes for axes in drawings[0].axes if axes.get_title().startswith("lasso objective")]
    lines = [list(line.get_ydata()) for line in panel.lines]
    for layer in result["trained"] + result["untrained"]:
        assert layer["optimum"]["tokens"] == 20
        assert layer["lasso"] in lines
        assert [layer["optimum"]["best"]["objective"]] in lines


def test_equal_commands_give_equal_numbers_and_the_seed_counts(text, tmp_path, call, no_pictures):
    ckpt = save(tmp_path, text)  # weights of seed 0, but its settings say 5
    for out, seed in (("a", []), ("b", []), ("c", ["--seed", 0])):
        code, _, _ = call("layers", ckpt, "--tokens", 64, "--out", tmp_path / out, *seed)
        assert not code
    a, b, c = [read(tmp_path / out) for out in "abc"]
    assert a["trained"] == b["trained"] == c["trained"] == c["untrained"]
    assert a["untrained"] == b["untrained"] != a["trained"]
    assert (a["seed"], c["seed"]) == (5, 0)


def test_a_text_that_changed_since_training_is_noted(text, tmp_path, call, no_pictures):
    other = tmp_path / "other.txt"
    other.write_text(text.read_text())
    ckpt = save(tmp_path, other)
    other.write_text(text.read_text().replace("codes", "words"))
    code, out, _ = call("layers", ckpt, "--tokens", 64)
    assert not code
    assert "has changed since" in out


# ---- errors --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory, text):
    """A checkpoint that no test writes to."""
    folder = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRATE_CACHE", str(folder / "cache"))
        return save(folder, text)


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--tokens", "0"], "--tokens 0"),
        (["--tokens", "15"], "16"),
        (["--batch", "0"], "--batch 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--lasso-tokens", "0"], "--lasso-tokens 0"),
        (["--tokens", "many"], "many"),
        (["--token", "9"], "mean --token"),
        (["--val-fraction", "7"], "--val-fraction 7"),
        (["--data", "missing.txt"], "missing.txt"),
        (["--device", "abacus"], "abacus"),
        (["--tokenizer", "pydocs"], "Tokenizer pydocs"),
    ],
)
def test_a_wrong_setting_is_one_sentence(words, reason, saved, tmp_path, call):
    code, _, err = call("layers", saved, *words, "--out", tmp_path / "interpret")
    assert code == 2
    assert reason in err and err.count("\n") == 1 and "Traceback" not in err
    assert not (tmp_path / "interpret").exists()


def check_error(call, words, reason):
    code, _, err = call("layers", *words)
    assert code == 2
    assert reason in err and err.count("\n") == 1, err


def test_a_missing_checkpoint_is_one_sentence(tmp_path, call):
    check_error(call, [], "CKPT")
    check_error(call, [tmp_path / "nothing"], "No checkpoint")


def test_a_damaged_checkpoint_is_one_sentence(text, tmp_path, call):
    ckpt = save(tmp_path, text)
    path = next(ckpt.glob("weights-*.pt"))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    check_error(call, [ckpt], "damaged")


def test_weights_that_are_not_finite_are_one_sentence(text, tmp_path, call):
    lm = tiny(vocab_size=320)
    with torch.no_grad():
        lm.blocks[0].attention.out.weight.fill_(float("nan"))
    check_error(call, [save(tmp_path, text, lm=lm)], "not finite")


def test_a_text_too_short_or_unknown_is_one_sentence(text, saved, tmp_path, call):
    short = tmp_path / "short.txt"
    short.write_text("a few words only, and then some more for training on them\n")
    check_error(call, [saved, "--data", short], "one window needs 17")
    check_error(call, [save(tmp_path, text, data=None)], "--data")


def test_a_file_where_the_folder_should_be_is_one_sentence(saved, tmp_path, call):
    (tmp_path / "taken").write_text("a file")
    check_error(call, [saved, "--out", tmp_path / "taken"], "taken")


def test_a_misspelled_command_gets_a_suggestion(saved, call):
    assert "did you mean layers?" in call("layer", saved)[2]


def test_no_more_than_a_few_batches_of_text_are_held(text, tmp_path, call, monkeypatch):
    path = save(tmp_path, text)
    held = most_tensors_held(monkeypatch)
    code, _, err = call("layers", path, "--tokens", "1500", "--batch", "1")
    assert not code, err
    assert held["now"] + held["gone"] > 50 and held["most"] <= 4
