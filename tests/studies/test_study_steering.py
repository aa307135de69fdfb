"""The study of steering and its figure, on made-up results; with --slow the whole study, tiny."""

import json
import math
import re
import sys
from dataclasses import asdict
from unittest import mock

import pytest
from figure_texts import clashes
from tiny_checkpoints import save_checkpoint

from crate_mini import UserError, model
from crate_mini.console import results, terminal
from crate_mini.steering import dose_response
from crate_mini.steering.figure import figure
from crate_mini.steering.tables import readme
from crate_mini.studies import runner, tables
from crate_mini.studies import steering as study
from crate_mini.studies.__main__ import COMMANDS

ROOT = results.ROOT


def made_up(kind, seed, cost=0.01):
    """steering.json of a model whose effect is dose + seed, and its KL the dose^2 / 100."""
    floors = {"neuron": 0.0, "random": 0.0}
    if kind == "gpt2":
        floors |= {"feature+error": 0.0, "feature": cost}
    rows = []
    inserted, attribution = [], []
    for name, floor in floors.items():
        for dose in (0.5, 1.0, 4.0, 8.0):
            for neuron in (3, 5):
                row = {"layer": 0, "neuron": neuron, "kind": name, "dose": dose, "unit": 1.0}
                row |= {"kl": dose * dose / 100 + floor, "loss": 0.1, "own": dose, "seen": -dose}
                rows.append({**row, "effect": dose + seed + neuron})
        if name != "random":
            inserted.append({"layer": 0, "kind": name, "kl": floor, "loss": floor})
    for layer in (0, 1):
        for dose in (0.5, 8.0):
            row = {"layer": layer, "dose": dose, "correlation": (layer + dose / 10 + seed) / 9}
            null = None if layer else seed / 10
            attribution.append({**row, "top10": 0.5, "null": null, "n": 2})
    return {
        "command": f"python steer.py measure <{kind}>",
        "seed": seed,
        "rows": rows,
        "live": [],
        "machine": {"commit": "c0ffee"},
        "summary": dose_response.summary(rows, seed),
        "inserted": inserted,
        "attribution": attribution,
        "checkpoint": {
            "sha256": "ab",
            "training": {"val_loss": 4.0 + seed},
            "config": asdict(model.preset("3L", kind)),
        },
    }


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The checkout in tmp_path."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    return tmp_path


def run_study(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["crate_mini.studies", "steering", *words])
    terminal.dispatch("-m crate_mini.studies", "", COMMANDS)


@pytest.fixture
def parts(place, monkeypatch):
    """Scripts do not run but leave what they would leave; [words of each]."""
    calls = []

    def run_script(words, log):
        calls.append(words)
        out = place / words[words.index("--out") + 1]
        out.mkdir(parents=True, exist_ok=True)
        seed = int(words[words.index("--seed") + 1])
        if words[0] == "steer.py":
            kind = re.search(r"([^/]+)-\d+/last", words[2])[1]
            (out / "steering.json").write_text(json.dumps(made_up(kind, seed)))
        else:
            layer = int(words[words.index("--layer") + 1])
            facts = {"name": "x4-k32", "model": "its hash", "layer": layer}
            (out / f"sae-L{layer}.json").write_text(json.dumps({"saes": [facts]}))
        return 1.0

    monkeypatch.setattr(runner, "run_script", run_script)
    for kind in tables.NAMES:
        for seed in (1, 2):
            folder = place / "out" / "study" / f"{kind}-{seed}" / "last"
            folder.mkdir(parents=True)
            meta = {"config": {"n_layer": 3}, "training": {"val_loss": 4.0}}
            (folder / "config.json").write_text(json.dumps(meta))
    return calls


def test_the_result_holds_all_seeds(place, parts, monkeypatch, capsys):
    run_study(monkeypatch, "1", "2")
    assert len(parts) == 3 + 3 + 3  # three models, autoencoders of the first twin's three layers
    twin = parts[5]
    autoencoders = twin[twin.index("--sae") + 1].split(",")
    assert twin[:3] == ["steer.py", "measure", "out/study/gpt2-1/last"]
    assert len(autoencoders) == 3
    assert autoencoders[1] == "out/steering/gpt2-1-sae-1/sae-L1-x4-k32.pt"
    found = json.loads((place / "results" / "steering.json").read_text())
    assert found["seeds"] == [1, 2]
    assert found["command"] == "python -m crate_mini.studies steering 1 2"
    assert found["machine"]["device"] and {sae["model"] for sae in found["sae"]} == {"gpt2"}
    assert [(sae["seed"], sae["layer"]) for sae in found["sae"]] == [(1, 0), (1, 1), (1, 2)]
    twin = found["models"]["gpt2"]
    effect = twin["summary"]["neuron"]["doses"]["4"]["effect"]
    assert effect["n"] == 4  # two neurons of each of two seeds
    assert effect["mean"] == pytest.approx(4 + 1.5 + 4)
    attribution = {(row["layer"], row["dose"]): row for row in twin["attribution"]}
    row = attribution[1, 8.0]
    assert row["correlation"] == pytest.approx((1 + 0.8 + 1.5) / 9)
    by_seed = [(1.8 + seed) / 9 for seed in (1, 2)]
    assert row["seeds"]["correlation"] == pytest.approx(by_seed)
    assert (place / "results" / "steering.png").read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    for line in (
        "crate 3L, neuron | 5.500 | 0 exactly |",
        "crate 3L, random | 5.500 | |",
        "gpt2 3L, feature | 5.500 | 0.01 |",
        "| gpt2 3L | 0.17 (0.150) | 0.28 (none) |",
    ):
        assert line in output


def test_finished_parts_are_kept(place, parts, monkeypatch):
    monkeypatch.setattr(study, "figure", mock.Mock())
    run_study(monkeypatch, "1", "2")
    run_study(monkeypatch, "1", "2")
    assert len(parts) == 9
    (place / "out" / "steering" / "crate-1.json").write_text('{"command": []}')
    run_study(monkeypatch, "1", "2")
    assert len(parts) == 10  # another command runs again


def test_a_tiny_cost_is_not_called_none():
    pooled = study.pooled([made_up("gpt2", 1, cost=1e-7)])
    text = readme({"models": {"gpt2": pooled}})
    assert "| gpt2 3L, feature | 5.000 | 1e-07 |" in text
    assert "neuron | 5.000 | 0 exactly |" in text


def test_what_is_missing_is_one_sentence(place, monkeypatch):
    with pytest.raises(
        UserError, match=r"^out/study/crate-1/last is missing; .*--checkpoints` trains"
    ):
        run_study(monkeypatch, "1")
    with pytest.raises(UserError, match="invalid int value: 'all'"):
        run_study(monkeypatch, "all")


def test_the_figure_and_tables_can_be_drawn_again_from_the_file_alone(place, monkeypatch, capsys):
    (place / "results").mkdir(exist_ok=True)
    content = {"seeds": [1], "models": {"crate": made_up("crate", 1)}, "sae": []}
    results.write_json(place / "results" / "steering.json", content)
    drawn = mock.Mock()
    monkeypatch.setattr(study, "figure", drawn)
    monkeypatch.setattr(study, "readme", lambda content: f"tables of {list(content['models'])}")
    study.run(study.Settings(report=True))
    (models, target), _ = drawn.call_args
    assert target == place / "results" / "steering.png" and len(models) == 1
    assert "tables of ['crate']" in capsys.readouterr().out


def test_a_part_that_fails_is_one_sentence_and_not_kept(place, parts, monkeypatch):
    def fail(words, log):
        raise UserError("ended with code 3")

    monkeypatch.setattr(runner, "run_script", fail)
    with pytest.raises(UserError, match="ended with code 3"):
        run_study(monkeypatch, "1")
    assert not list((place / "out").rglob("steering/*.json"))


@pytest.mark.parametrize("kind", ["crate", "gpt2"])
def test_lines_of_the_figure_lie_where_their_values_do(kind, tmp_path, monkeypatch):
    """KL = dose^2 / 100 is a straight line between logarithmic axes; a single dose is a figure."""
    write = mock.Mock()
    monkeypatch.setattr("crate_mini.steering.figure.write", write)
    result = made_up(kind, 1)
    figure([result], tmp_path / "steering.png")
    axes = write.call_args.args[0].axes
    assert [panel.get_xscale() for panel in axes[:4]] == ["log"] * 4
    assert axes[1].get_yscale() == "log"
    doses, costs = axes[1].containers[0][0].get_data()
    slopes = []
    for i in range(len(doses) - 1):
        rise = math.log(costs[i + 1]) - math.log(costs[i])
        slopes.append(rise / (math.log(doses[i + 1]) - math.log(doses[i])))
    assert len(doses) == 4 and slopes == pytest.approx([2, 2, 2])
    for panel in axes[:4]:
        labels = {container.get_label() for container in panel.containers}
        assert len(labels) == len(result["summary"])
        assert len({line.get_linestyle() for line, *_ in panel.containers}) >= 2
    assert all(panel.get_title() and panel.get_ylabel() for panel in axes)
    (legend,) = write.call_args.args[0].legends
    named = [text.get_text() for text in legend.get_texts()]
    assert len(set(named)) == len(named) == len(result["summary"]) + 2  # the model, the control
    one = [row for row in result["rows"] if row["dose"] == 1.0]
    figure([{**result, "summary": dose_response.summary(one, 1)}], tmp_path / "steering.png")
    assert write.call_count == 2


@pytest.mark.parametrize("kind", ["crate", "gpt2"])
def test_no_text_of_the_figure_lies_on_another_or_is_cut(kind, tmp_path, monkeypatch):
    write = mock.Mock()
    monkeypatch.setattr("crate_mini.steering.figure.write", write)
    figure([made_up(kind, 1)], tmp_path / "steering.png")
    assert not clashes(write.call_args.args[0])


@pytest.mark.slow
def test_the_whole_study_at_tiny_size(place, monkeypatch, capsys):
    text = place / "text.txt"
    text.write_text("the code of a token is sparse.\nthe rate of the code falls.\n" * 600)
    for script in ("steer.py", "interpret.py"):
        (place / script).symlink_to(ROOT / script)
    monkeypatch.setenv("CRATE_CACHE", str(place / "cache"))
    sae = ("--k", 8, "--steps", 5, "--batch", 64, "--tokens", 512)
    monkeypatch.setattr(study, "SAE", sae)
    monkeypatch.setattr(study, "MEASURE", ("--neurons", 2, "--tokens", 64))
    for kind in tables.NAMES:
        save_checkpoint(place / "out" / "study" / f"{kind}-1" / "last", text, kind)
    run_study(monkeypatch, "1")
    found = json.loads((place / "results" / "steering.json").read_text())
    for kind, result in found["models"].items():
        for row in result["inserted"]:
            assert row["kind"] == "feature" or row["kl"] == 0 == row["loss"]
        assert math.isfinite(result["summary"]["neuron"]["doses"]["4"]["effect"]["mean"])
        assert any(row["kl"] > 0 for row in result["inserted"]) == (kind == "gpt2")
        for row in result["attribution"]:
            assert row["layer"] != 1 or row["null"] < row["correlation"]
    assert "gpt2 2L, feature+error" in capsys.readouterr().out
