"""`interpret.py sae`: the files it writes, and what it refuses."""

import json
import sys
from pathlib import Path

import pytest
from tiny_saes import small_corpus, tiny_model

import interpret
from crate_mini.console import terminal
from crate_mini.data.tokenizer import load_tokenizer
from crate_mini.sae import autoencoder
from crate_mini.sae.evaluate import FORMULAS
from crate_mini.training import checkpoint

FLAGS = ["--expansion", "2", "--steps", "12", "--batch", "32", "--tokens", "300"]


@pytest.fixture
def ckpt(tmp_path, monkeypatch):
    """A checkpoint as train.py leaves it, and the text it was trained on."""
    monkeypatch.setenv("CRATE_CACHE", str(tmp_path / "cache"))
    corpus = small_corpus(tmp_path)
    settings = {"data": str(tmp_path / "text.txt"), "seed": 1, "val_fraction": 0.1}
    checkpoint.save(
        tmp_path / "run" / "best",
        tiny_model(),
        tokenizer={"spec": "bytes", "hash": load_tokenizer("bytes").hash},
        training={"settings": settings, "corpus": corpus.meta},
    )
    return str(tmp_path / "run" / "best")


@pytest.fixture
def run_sae(ckpt, monkeypatch):
    """A function that runs `interpret.py sae` on the checkpoint, in this process."""

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["interpret.py", "sae", ckpt, *FLAGS, *flags])
        return interpret.main()

    return run


def test_the_command_writes_results_a_figure_and_an_overview(ckpt, run_sae, capsys):
    run_sae()
    folder = Path(ckpt).parent / "interpret"
    first = json.loads((folder / "sae-L1.json").read_text())
    assert len(first["saes"]) == 3
    assert first["formulas"] == FORMULAS
    assert first["seed"] == 1337
    assert "recovered" in capsys.readouterr().out
    assert (folder / "sae-L1.png").read_bytes().startswith(b"\x89PNG")
    weights = {path: path.read_bytes() for path in folder.glob("*.pt")}
    run_sae("--k", "4,8")
    both = json.loads((folder / "sae-L1.json").read_text())
    assert sorted(sae["name"] for sae in both["saes"]) == [
        "x2-k4",
        "x2-k8",
        "x2-l1-0.0001",
        "x2-l1-0.0002",
        "x2-l1-5e-05",
    ]
    l0 = [sae["held_out"]["L0"] for sae in both["saes"]]
    assert l0 == sorted(l0)
    run_sae()  # the same seed: the same bytes
    assert all(path.read_bytes() == content for path, content in weights.items())
    model, _ = checkpoint.load(ckpt)
    _, facts = autoencoder.load(folder / "sae-L1-x2-k4.json", model)
    assert facts["checkpoint"]["sha256"]


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--layer 2", "layer 2 does not exist"),
        ("--layer -1", "--layer -1 must lie in 0 to"),
        ("--l1 nan", "--l1 'nan' is not a list of numbers"),
        ("--l1 1e-4,", "is not a list of numbers"),
        ("--l1 -1", "must not be below 0"),
        ("--k 0", "--k 0 must lie in 1 to 256"),
        ("--k 257", "must lie"),
        ("--k 2.5", "is not a list of numbers"),
        ("--k many", "is not a list of numbers"),
        ("--lr nan", "--lr nan is not a finite number"),
        ("--steps 0", "--steps 0"),
        ("--expansion -3", "--expansion"),
        ("--batch 9999999", "--batch"),
        ("--lyer 1", "did you mean --layer"),
        ("--data nowhere.txt", "No corpus"),
        ("--device cuda:77", "not available"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(flags, words, run_sae, capsys):
    with pytest.raises(SystemExit) as exit:
        terminal.run(lambda: run_sae(*flags.split()))
    message = capsys.readouterr().err
    assert exit.value.code == 2
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert words in message
