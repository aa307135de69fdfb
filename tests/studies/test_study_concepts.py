"""The study asks for the right commands and gathers every control; they are tested elsewhere."""

import json
import sys
from pathlib import Path

import numpy as np
import planted_reviews
import pytest

from crate_mini import UserError
from crate_mini.console import results, terminal
from crate_mini.studies import concepts as study
from crate_mini.studies import runner
from crate_mini.studies.__main__ import COMMANDS


@pytest.fixture(scope="module")
def concepts(tmp_path_factory):
    """A concepts.json of `interpret.py concepts`."""
    settings, _ = planted_reviews.finished_run(tmp_path_factory.getbasetemp())
    return results.read_json(Path(settings.out) / "concepts.json")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """The checkout in tmp_path."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def commands(checkout, concepts, monkeypatch):
    """Scripts do not run but leave what they would leave; [words of each]."""
    calls = []

    def run_script(words, log):
        calls.append(words)
        folder = checkout / words[words.index("--out") + 1]
        folder.mkdir(parents=True)
        if words[0] == "interpret.py":
            (folder / "concepts.json").write_text(json.dumps(concepts))
        return 1.0

    monkeypatch.setattr(runner, "run_script", run_script)
    return calls


def run_study(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["crate_mini.studies", "concepts", *words])
    terminal.dispatch("-m crate_mini.studies", "", COMMANDS)


def test_it_trains_classifies_and_looks_for_concepts(commands, monkeypatch):
    run_study(monkeypatch, "r.jsonl", "ranks", "t.csv")
    assert [words[:2] for words in commands[:3]] == [
        ["train.py", "--model"],
        ["train.py", "--task"],
        ["interpret.py", "concepts"],
    ]
    assert len(commands) == 2 * (1 + 2 * 2)


def test_it_keeps_every_control_and_counts_what_survives(
    checkout, commands, concepts, monkeypatch, capsys
):
    run_study(monkeypatch, "r.jsonl", "ranks", "t.csv")
    result = results.read_json(checkout / "results" / "concepts.json")
    text = study.tables(result)
    assert len(result["runs"]) == 4 and text in capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith("| reviews, ")]
    row = next(line for line in rows if "| probe, m" in line)
    assert len(row.split("|")) == len(study.CONTROLS) + 5 and "- |" not in row
    seeds = concepts["by_seed"].values()
    own = [seed["methods"]["clvq"]["probe, mean"]["own"] for seed in seeds]
    drop = 100 * np.mean([outcome["relative_drop"] for outcome in own])
    assert f"clvq, probe, mean: accuracy falls by {drop:.1f} %" in text
    assert "language-model judges: not run" in text
    agreement = [seed["clvq"] for seed in concepts["methods"]["kmeans"]["agreement"].values()]
    line = next(
        line for line in text.splitlines() if line.startswith("| reviews, CRATE (paper) | k")
    )
    assert f"| {np.mean(agreement):.3f} | - |" in line


def test_its_tables_can_be_printed_again(checkout, commands, monkeypatch, capsys):
    run_study(monkeypatch, "r.jsonl", "ranks", "t.csv")
    capsys.readouterr()
    run_study(monkeypatch, "--table", "--methods", "clvq")
    printed = capsys.readouterr().out
    result = results.read_json(checkout / "results" / "concepts.json")
    assert printed == study.tables(result, ["clvq"]) + "\n"
    with pytest.raises(UserError, match="did you mean clvq"):
        run_study(monkeypatch, "--table", "--methods", "clv")


def test_it_refuses_what_it_cannot_run(checkout, monkeypatch):
    with pytest.raises(UserError, match="give labelled reviews"):
        run_study(monkeypatch, "one")
