"""`interpret.py llm` from a checkpoint to its table, with a simulator that matches strings for a model."""

import json
import random
import re
import sys

import numpy as np
import pytest
import torch

import interpret
from crate_mini import cli, model
from crate_mini.data import batches as data
from crate_mini.judges import http_client as clients
from crate_mini.judges import run as llm
from crate_mini.neurons import protocols as score
from crate_mini.training import checkpoint

T, N = 128, 6


class Matching:
    """10 where the token is named in the explanation, else 0. It knows no words and solves no puzzle."""

    def __init__(self, fails=()):
        self.asked, self.fails = 0, fails

    def ask(self, query):
        if query["ask"] == "can":
            return {"can": ["prompt logprobs"], "why": {}, "tokens": [0, 0]}
        self.asked += 1
        if self.asked in self.fails:
            raise clients.Failed("status 500")
        last = query["prompt"].split("\n\n")[-1]
        words, lines = re.fullmatch(
            r".*fires on: ([^\n]*)\nTokens:\n(.*)", last, re.DOTALL
        ).groups()
        slots = [{"10": -0.1} if line[:-2] in words else {"0": -0.1} for line in lines.split("\n")]
        return {"slots": slots, "tokens": [100, 0]}


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A checkpoint with random weights whose neurons are recorded and scored; neuron 3 of layer 0 is dead."""
    place, draw = tmp_path_factory.mktemp("words"), random.Random(0)
    text = place / "text.txt"
    words = ["code", "rate", "step", "sparse", "token", "head"]
    text.write_text("".join(" ".join(draw.choices(words, k=9)) + ".\n" for _ in range(2500)))
    torch.manual_seed(0)
    lm = model.LM(model.preset("2L", "crate", vocab_size=257, block_size=T, n_embd=32, n_head=2))
    with torch.no_grad():
        lm.tokens.weight *= 8
        lm.blocks[0].sparsifier.D[:, 3].zero_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRATE_CACHE", str(place / "cache"))
        tokenizer = data.load_tokenizer("bytes")
        corpus = data.open_corpus(str(text), tokenizer, val_fraction=0.5, log=lambda *_: None)
        settings = {"data": str(text), "val_fraction": 0.5}
        checkpoint.save(
            place / "best",
            lm,
            tokenizer={"spec": "bytes", "hash": tokenizer.hash},
            training={"step": 0, "settings": settings, "corpus": corpus.meta},
        )
        patch.setattr(
            sys, "argv", ["interpret.py", "neurons", str(place / "best"), "--controls", "none"]
        )
        interpret.main()
    return place / "best"


@pytest.fixture
def run(ckpt, monkeypatch, capsys):
    """Run `interpret.py llm` on the checkpoint; returns (what it prints, the back end)."""

    def go(*words, fails=(), code=None):
        back_end = Matching(fails)
        monkeypatch.setattr(llm.Model, "back_end", back_end)
        given = ["llm", str(ckpt), "--simulator", "hf:m", "--n", str(N), *words]
        monkeypatch.setattr(sys, "argv", ["interpret.py", *given])
        if code is None:
            interpret.main()
            return capsys.readouterr().out, back_end
        with pytest.raises(SystemExit) as e:
            cli.run(interpret.main)
        told = capsys.readouterr().err
        assert e.value.code == code and told.startswith("error: ") and told.count("\n") == 1, told
        return told, back_end

    return go


def results(ckpt):
    folder = ckpt.parent / "interpret"
    return json.loads((folder / "llm.json").read_text()), score.read_rows(folder / "llm.jsonl")


def test_scores_stand_beside_their_ceiling(run, ckpt):
    told, _ = run("--despite-probe")
    found, rows = results(ckpt)
    name = "llm:m@A"
    assert (
        "IT FAILED THE PROBE" in told
        and name in told
        and "[five excerpts]" in told
        and "[ngram]" in told
    )
    assert "saw the explanation and the excerpt up to the token" in told
    assert len(rows) == 2 * N and found["llm"]["despite_probe"] and found["seed"] == 0
    for site in ("L0", "L1"):
        for metric in ("openai_tar", "openai_random"):
            n, most = (
                found["sites"][site]["n"][f"{metric}[{sim}]"] for sim in (name, "five excerpts")
            )
            assert (
                n["total"]
                == N
                == n["live"] + n["dead"] + n["undefined"] + n["failed"]
                == most["total"]
            )
    plain = score.read_rows(ckpt.parent / "interpret" / "scores.jsonl")
    plain = {(row["site"], row["neuron"]): row for row in plain}
    live = [row for row in rows if row["status"] == "live"]
    assert live
    for row in live:
        old = plain[row["site"], row["neuron"]]["scores"]
        assert row["scores"]["openai_tar[five excerpts]"] == old["openai_tar[five excerpts]"]
        assert row["scores"]["openai_tar[ngram]"] == old["openai_tar[ngram]"]
        r = row["scores"][f"openai_tar[{name}]"]
        assert r is None or -1 <= r <= 1
        sims = np.concatenate(row["llm"]["simulated"]["openai_tar"])
        assert set(sims) <= {0, 10} and row["llm"]["explanations"]["openai_tar"].startswith(
            "the tokens "
        )
    assert max(row["scores"][f"openai_tar[{name}]"] or -1 for row in live) > 0.2  # tokens do tell


def test_a_model_that_fails_the_probe_is_refused(run):
    told, back_end = run(code=2)
    assert "of 3 puzzles" in told and "--despite-probe" in told and back_end.asked <= 27


def test_dry_run_and_budget(run, ckpt, tmp_path):
    told, back_end = run("--dry-run", "--price", "1,1")
    assert back_end.asked == 0 and "rung D" in told and "$" in told and "nothing was asked" in told
    cache = ckpt.parent / "interpret" / "llm-cache.jsonl"
    cache.unlink(missing_ok=True)
    run("--despite-probe")
    whole, rows = results(ckpt)
    total = sum(whole["llm"]["total"]["tokens"])
    cache.unlink()
    told, _ = run("--despite-probe", "--budget", str(total // 2))
    assert (
        "goes on from here" in told
        and f"of {2 * N} neurons" in told
        and len(results(ckpt)[1]) < 2 * N
    )
    rounds = 0
    while "goes on from here" in told:
        told, back_end = run("--despite-probe", "--budget", str(total // 2))
        rounds += 1
        assert 0 < back_end.asked and rounds < 5
    again = results(ckpt)
    assert (
        again[1] == rows and again[0]["llm"] == whole["llm"] and again[0]["sites"] == whole["sites"]
    )


def test_neurons_are_drawn_by_the_seed(run, ckpt):
    def drawn(seed):
        run("--despite-probe", "--seed", seed)
        return [(row["site"], row["neuron"]) for row in results(ckpt)[1]]

    first = drawn("1")
    assert first == drawn("1") != drawn("2") and all(
        drawn("2").count(neuron) == 1 for neuron in drawn("2")
    )


@pytest.mark.parametrize(
    "words, said",
    [
        (("--protocols", "uniform"), "openai_tar"),
        (("--n", "-1"), "0 (all)"),
        (("--seed", "-1"), "a seed of 0"),
        (("--simulator", ""), "--simulator"),
        (("--budget", "x"), "budget"),
    ],
)
def test_bad_settings(run, words, said):
    assert said in run(*words, code=2)[0]


def test_neurons_must_have_run(run, tmp_path):
    assert "record" in run("--out", str(tmp_path), code=2)[0]


def test_scores_of_another_record_are_refused(run, ckpt, tmp_path):
    """The tables' numbers would be of other excerpts than the language model's beside them."""
    for path in (ckpt.parent / "interpret").glob("*.json*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    found = json.loads((tmp_path / "summary.json").read_text())
    found["record"]["stamp"] = "0"
    (tmp_path / "summary.json").write_text(json.dumps(found))
    assert "of another record than is there now" in run("--out", str(tmp_path), code=2)[0]


def test_too_many_failures(run, ckpt):
    (ckpt.parent / "interpret" / "llm-cache.jsonl").unlink(missing_ok=True)
    told, _ = run("--despite-probe", fails=range(28, 60), code=2)
    assert "simulations have no usable answer (mostly: status 500)" in told


def test_the_help_lists_every_setting(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["interpret.py", "llm", "--help"])
    with pytest.raises(SystemExit):
        interpret.main()
    text = capsys.readouterr().out
    for name, field in llm.Settings.__dataclass_fields__.items():
        assert f"--{name.replace('_', '-')}" in text and cli.comments(llm.Settings)[field.name]
