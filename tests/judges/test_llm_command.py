"""`interpret.py llm` from a scored checkpoint to its table; the model only matches strings."""

import json
import sys

import numpy as np
import pytest
from matching_judge import run_interpret, scored_checkpoint

import interpret
from crate_mini.console import results, terminal
from crate_mini.judges.command import Settings
from crate_mini.judges.language_model import LanguageModel
from crate_mini.neurons.score_files import read_rows

N = 6  # neurons of each layer
NAME = "llm:m@logprobs"


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return scored_checkpoint(tmp_path_factory)


@pytest.fixture
def folder(ckpt):
    """The folder of the results, without answers that an earlier test has left."""
    folder = ckpt.parent / "interpret"
    (folder / "llm-cache.jsonl").unlink(missing_ok=True)
    return folder


@pytest.fixture
def run(ckpt, folder, monkeypatch, capsys):
    """A function that runs `interpret.py llm`; it returns (printed text, client)."""

    def run_llm(*words, failures=()):
        flags = ["--simulator", "hf:m", "--n", N, *words]
        client = run_interpret(monkeypatch, "llm", ckpt, *flags, failures=failures)
        return capsys.readouterr().out, client

    return run_llm


@pytest.fixture
def fail(run, capsys):
    """A function that runs `interpret.py llm` in vain; it returns the error sentence."""

    def run_in_vain(*words, **options):
        with pytest.raises(SystemExit) as exit:
            terminal.run(lambda: run(*words, **options))
        message = capsys.readouterr().err
        assert exit.value.code == 2
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        return message

    return run_in_vain


def read_results(folder):
    """(llm.json, rows of llm.jsonl)."""
    return json.loads((folder / "llm.json").read_text()), read_rows(folder / "llm.jsonl")


def test_scores_stand_next_to_those_of_the_tables(run, folder):
    printed, _ = run("--despite-probe")
    for words in (
        "IT FAILED THE PROBE",
        NAME,
        "[five excerpts]",
        "[ngram]",
        "saw the explanation and the excerpt up to the token",
    ):
        assert words in printed
    result, rows = read_results(folder)
    assert len(rows) == 2 * N
    assert result["llm"]["despite_probe"]
    assert result["seed"] == 0
    for site in ("L0", "L1"):
        gain = result["sites"][site][f"openai_tar[{NAME}, true - wrong]"]
        assert gain["n"] >= 2
        assert len(gain["ci95"]) == 2  # over neurons
        for protocol in ("openai_tar", "openai_random"):
            counts = result["sites"][site]["n"]
            n = counts[f"{protocol}[{NAME}]"]
            assert n["total"] == N
            assert n["live"] + n["dead"] + n["undefined"] + n["failed"] == N
            assert counts[f"{protocol}[five excerpts]"]["total"] == N


def test_the_judges_rows_are_those_of_neurons_with_its_scores_added(run, folder):
    run("--despite-probe")
    _, rows = read_results(folder)
    scored = {(row["site"], row["neuron"]): row for row in read_rows(folder / "scores.jsonl")}
    live = [row for row in rows if row["status"] == "live"]
    assert 0 < len(live) < len(rows)
    for row in live:
        tables = scored[row["site"], row["neuron"]]["scores"]
        for metric in ("openai_tar[five excerpts]", "openai_tar[ngram]"):
            assert row["scores"][metric] == tables[metric]
        r = row["scores"][f"openai_tar[{NAME}]"]
        assert r is None or -1 <= r <= 1
        assert set(np.concatenate(row["llm"]["simulated"]["openai_tar"])) <= {0, 10}
        words = row["llm"]["explanations"]["openai_tar"]
        assert words.startswith("the tokens ")
        assert row["llm"]["wrong explanations"]["openai_tar"] != words
    scores = [row["scores"][f"openai_tar[{NAME}]"] for row in live]
    assert max(r for r in scores if r is not None) > 0.2  # tokens tell something
    dead = [row for row in rows if row["status"] == "dead"]
    assert not any("llm" in row for row in dead)


def test_a_model_that_fails_the_probe_is_refused_before_it_is_asked_about_neurons(fail):
    message = fail()
    assert "of 12 planted neurons won, 9 needed" in message
    assert "--despite-probe" in message
    assert LanguageModel.client.asked <= 72


def test_a_dry_run_asks_nothing(run):
    printed, client = run("--dry-run", "--price", "1,1")
    assert client.asked == 0
    for words in ("logprobs:", "detection:", "$", "nothing was asked"):
        assert words in printed
    assert printed.count("<- the cheapest: chosen if it passes the probe") == 1


def test_a_budget_stops_the_run_and_the_same_command_continues(run, folder):
    run("--despite-probe")
    whole, rows = read_results(folder)
    half = str(sum(whole["llm"]["total"]["tokens"]) // 2)
    (folder / "llm-cache.jsonl").unlink()
    printed, _ = run("--despite-probe", "--budget", half)
    assert "continues from here" in printed
    assert f"of {2 * N} neurons" in printed
    assert len(read_results(folder)[1]) < 2 * N
    rounds = 0
    while "continues from here" in printed:
        printed, client = run("--despite-probe", "--budget", half)
        rounds += 1
        assert 0 < client.asked
        assert rounds < 5
    result, rows_in_parts = read_results(folder)
    assert rows_in_parts == rows
    assert result["llm"] == whole["llm"]
    assert result["sites"] == whole["sites"]


def test_neurons_are_drawn_by_the_seed(run, folder):
    def draw(seed):
        run("--despite-probe", "--seed", seed)
        return [(row["site"], row["neuron"]) for row in read_results(folder)[1]]

    first, again, other = draw("1"), draw("1"), draw("2")
    assert first == again != other
    assert len(set(other)) == len(other)


@pytest.mark.parametrize(
    "words, expected",
    [
        (("--protocols", "uniform"), "openai_tar"),
        (("--n", "-1"), "--n -1 must lie in 0 to"),
        (("--seed", "-1"), "--seed -1 must lie in 0 to"),
        (("--simulator", ""), "--simulator"),
        (("--budget", "x"), "budget"),
        (("--budget", "-1"), "--budget -1 must lie in 0 to"),
        (("--workers", "0"), "--workers 0 must lie in 1 to"),
        (("--style", "x"), "auto, chat or text"),
        (("--rung", "E"), "auto, logprobs, json, detection, fuzzing or intruder"),
        (("--price", "3"), "two numbers"),
    ],
)
def test_bad_settings_are_refused(words, expected, fail):
    assert expected in fail(*words)


def test_neurons_must_have_run(fail, tmp_path):
    assert "record" in fail("--out", tmp_path)


def test_scores_of_another_record_are_refused(fail, folder, tmp_path):
    """The tables' numbers would be of other excerpts than the language model's."""
    for path in folder.glob("*.json*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    summary = json.loads((tmp_path / "summary.json").read_text())
    summary["record"]["stamp"] = "0"
    results.write_json(tmp_path / "summary.json", summary)
    assert "of another record than the one there now" in fail("--out", tmp_path)


def test_too_many_failures_end_the_run(fail):
    message = fail("--despite-probe", failures=range(73, 105))
    assert "simulations have no usable answer (mostly: status 500)" in message


def test_the_help_lists_every_setting(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["interpret.py", "llm", "--help"])
    with pytest.raises(SystemExit):
        interpret.main()
    printed = capsys.readouterr().out
    for name, field in Settings.__dataclass_fields__.items():
        assert f"--{name.replace('_', '-')}" in printed
        assert field.metadata["help"]
