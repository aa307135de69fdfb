"""The stage `beyond` on a small model: what it writes, its controls, its table and figure."""

import json

import numpy as np
import pytest
import torch

from crate_mini import model
from crate_mini.console import results
from crate_mini.data.batches import open_corpus
from crate_mini.data.tokenizer import load_tokenizer
from crate_mini.neurons import beyond, beyond_report, pipeline, planted_states, text_states
from crate_mini.neurons.record import sites
from crate_mini.neurons.score_files import read_rows
from crate_mini.neurons.workspace import Workspace
from crate_mini.sae import autoencoder


@pytest.fixture(scope="module", autouse=True)
def few():
    """Few rotations and groups of documents, for tests that take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beyond, "ROTATIONS", 2)
        patch.setattr(beyond, "GROUPS", 6)
        yield


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Make a Workspace of a model of 64 codes with random weights, its record in place."""
    folder = tmp_path_factory.mktemp("beyond")
    planted_states.write_texts(folder / "texts.jsonl", 40, lines=6)
    tokenizer = load_tokenizer("bytes")
    path = str(folder / "texts.jsonl")
    corpus = open_corpus(path, tokenizer, folder / "cache", 1.0, log=lambda line: None)
    torch.manual_seed(0)
    config = model.preset("1L", "crate", vocab_size=257, block_size=128, n_embd=16, n_head=2)
    lm = model.LM(config).eval()
    with torch.no_grad():
        lm.tokens.weight *= 8
    meta = {"tokenizer": {"spec": "bytes"}, "training": {}, "sha256": "of a test"}

    def workspace(name, **changes):
        log = changes.pop("log", lambda line: None)
        settings = {"tokens": 24_000, "log": log, **changes}
        work = Workspace(lm, meta, tokenizer, corpus, folder / name, sites(lm), **settings)
        pipeline.run(work, until="record")
        return work

    return workspace


@pytest.fixture(scope="module")
def done(make):
    """(content of beyond.json, Workspace), with an autoencoder in the folder."""
    lines = []
    work = make("plain", log=lines.append)
    for k in (None, 4):
        sae = autoencoder.SAE(64, 96, 0, k, seed=1)
        with torch.no_grad():
            sae.c.fill_(0.01)
        autoencoder.save(work.folder, sae, work.model, {})
    pipeline.run(work, "beyond", "beyond")
    assert any("about 0:" in line and "properties" in line for line in lines)
    return results.read_json(work.folder / "beyond.json"), work


def test_every_set_has_its_scores_and_intervals(done):
    content, _ = done
    scores = content["sites"]["L0"]
    names = {"sae x1.5-l1-0", "sae x1.5-k4"}
    assert set(scores["sets"]) == set(beyond.SETS) | names
    assert len(content["properties"]) >= 20
    assert set(content["properties"]) | set(content["properties_too_rare"]) == set(
        text_states.NAMES
    )
    for name, of_set in scores["sets"].items():
        low, high = of_set["ci95"]
        assert low <= of_set["coverage"] <= high, name
        assert np.mean(of_set["each"]) == pytest.approx(of_set["coverage"])
        difference = scores["sets"]["neurons"]["coverage"] - of_set["coverage"]
        assert of_set["neurons_minus"]["difference"] == pytest.approx(difference)
        best = [r or 0 for _, _, r in of_set["best"]]
        assert np.mean(best) == pytest.approx(of_set["each"][0], abs=1e-3)
    assert scores["sets"]["rotation"]["n"] == beyond.ROTATIONS
    assert scores["sets"]["token table"]["coverage"] == 0
    assert abs(scores["sets"]["shuffled"]["coverage"]) < 0.03
    neurons, rotation = scores["sets"]["neurons"], scores["sets"]["rotation"]
    assert rotation["density"] == pytest.approx(neurons["density"], abs=0.02)
    assert scores["sets"]["sae x1.5-k4"]["density"] == pytest.approx(4 / 96, abs=0.01)
    assert {"checkpoint", "corpus", "record", "seed", "command", "machine"} <= set(content)


def test_probes_lie_between_chance_and_one(done):
    scores = done[0]["sites"]["L0"]
    assert scores["probing"]["properties"]
    for name in beyond.PROBED:
        for k, probe in scores["sets"][name]["probing"].items():
            assert scores["probing"]["chance"] - 0.1 < probe["auprc"] < 1, (name, k)
            low, high = probe["ci95"]
            assert low <= probe["auprc"] <= high


def test_rows_table_and_figure(done):
    content, work = done
    rows = read_rows(work.folder / "beyond-neurons.jsonl")
    assert [row["neuron"] for row in rows] == list(range(64))
    assert {row["property"] for row in rows if row["r"] is not None} <= set(content["properties"])
    printed = beyond_report.table(content)
    for name in ("neurons", "rotation", "sae x1.5-k4", "chance"):
        assert f"\n{name}" in printed
    assert (work.folder / "beyond.png").read_bytes()[:4] == b"\x89PNG"


def test_the_same_again_is_the_same(done):
    content, work = done
    pipeline.run(work, "beyond", "beyond")
    assert json.loads((work.folder / "beyond.json").read_text())["sites"] == content["sites"]


def test_a_density_cuts_every_set(make):
    work = make("sparse", density=0.05, controls=("shuffle",))
    pipeline.run(work, "beyond", "beyond")
    sets = results.read_json(work.folder / "beyond.json")["sites"]["L0"]["sets"]
    assert "untrained" not in sets
    assert sets["neurons"]["density"] <= 0.051
    assert sets["rotation"]["density"] <= 0.06


@pytest.mark.parametrize("tokens", [1, 400])
def test_too_little_text_is_said(make, monkeypatch, tokens):
    lines = []
    work = make("short", log=lines.append)
    monkeypatch.setattr(beyond, "TOKENS", tokens)
    pipeline.run(work, "beyond", "beyond")
    content = results.read_json(work.folder / "beyond.json")
    assert content["sites"] == {} and "give more text" in lines[-2]
    assert "no property" in beyond_report.table(content)
