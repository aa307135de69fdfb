"""A run over planted neurons with recorded answers of real models: replay, cache, budget."""

import json

import numpy as np
import pytest
from planted_excerpts import decode, run, selected, text
from recorded_judges import BAD, GOOD, RecordedClient

from crate_mini import UserError
from crate_mini.judges import answer_cache, command, price, probe, simulation
from crate_mini.judges.http_client import HttpClient
from crate_mini.judges.language_model import LanguageModel
from crate_mini.judges.simulation import MODES

NAME = f"llm:{BAD.name}@{BAD.mode}"


@pytest.fixture
def client(monkeypatch):
    """The recorded model as a client that counts what it is asked."""
    recorded = RecordedClient()
    monkeypatch.setattr(LanguageModel, "client", recorded)
    return recorded


def correlation(true_rows, simulated_rows, tokens):
    """Pearson r over the real tokens of some excerpts, by NumPy."""
    true = [row[: (ids[1:] >= 0).sum()] for row, ids in zip(true_rows, tokens)]
    return np.corrcoef(np.concatenate(true), np.concatenate(simulated_rows))[0, 1]


# ---- replay --------------------------------------------------------------------------------------


@pytest.mark.parametrize("judge", [GOOD, BAD], ids=["good", "bad"])
def test_replay_gives_the_same_bytes(judge, tmp_path):
    for folder in ("a", "b"):
        result, _ = judge.replay(tmp_path / folder)
        assert text(result) == judge.expected.read_text(encoding="utf-8")
        assert not (tmp_path / folder / "llm-cache.jsonl").exists()


def test_a_good_judge_passes_the_probe_and_is_scored_against_wrong_words(tmp_path):
    """The whole path: probe, explanations, simulations, scores, all by a real model."""
    result, log = GOOD.replay(tmp_path)
    label = f"llm:{GOOD.name}@logprobs"
    assert not result["despite_probe"]
    assert result["probe"]["logprobs"]["won"] >= probe.needed()
    assert "chance" in log[1]
    words = {n: entry["explanations"]["openai_tar"] for n, entry in result["neurons"].items()}
    for neuron in (0, 1):
        entry, (_, to_score) = result["neurons"][neuron], selected()[neuron]["openai_tar"]
        assert entry["wrong explanations"]["openai_tar"] == words[1 - neuron]
        scores = {}
        for name, key in (("", "simulated"), (", wrong words", "simulated wrong")):
            simulated = entry[key]["openai_tar"]
            scores[name] = entry["scores"][f"openai_tar[{label}{name}]"][0]
            r = correlation(to_score.acts, simulated, to_score.tokens)
            assert np.isclose(scores[name], r)
        gain = entry["scores"][f"openai_tar[{label}, true - wrong]"][0]
        assert np.isclose(gain, scores[""] - scores[", wrong words"])
        assert (gain > 0.2) == (neuron == 0)  # "colors and leaves" is right


def test_a_bad_judge_fails_the_probe_and_is_scored_only_on_demand(tmp_path):
    with pytest.raises(
        UserError, match="not tell true .*detection: . of 12 planted neurons won.*--despite-probe"
    ):
        BAD.replay(tmp_path, despite_probe=False)
    result, _ = BAD.replay(tmp_path)
    assert result["despite_probe"] is True


def test_a_question_that_was_not_recorded_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no answer to a question of this run"):
        BAD.replay(tmp_path, simulator="hf:other")
    with pytest.raises(UserError, match="cannot be read"):
        run(tmp_path, replay=str(tmp_path / "absent"))
    (tmp_path / "broken").write_text("{\n")
    with pytest.raises(UserError, match="cannot be read"):
        run(tmp_path, replay=str(tmp_path / "broken"))


def test_what_is_recorded_can_be_replayed(tmp_path, client):
    file = tmp_path / "recording"
    recorded, _ = BAD.run(tmp_path / "a", record=str(file))
    asked = len(client.asked)
    replayed, _ = BAD.run(tmp_path / "b", replay=str(file))
    assert text(replayed) == text(recorded)
    assert len(client.asked) == asked
    about = json.loads(file.read_text().splitlines()[0])["about"]
    assert about["prompts"]["explain"] == 1
    assert about["machine"]["python"]
    assert answer_cache.read_answers(file) == answer_cache.read_answers(BAD.answers)


# ---- cache and budget ----------------------------------------------------------------------------


def test_a_budget_stops_the_run_and_the_same_command_continues(tmp_path, client):
    whole, _ = BAD.run(tmp_path / "whole")
    questions = len(client.asked)
    budget = sum(whole["total"]["tokens"]) // 4
    last, rounds = None, 0
    while last is None or last["stopped"]:
        client.asked.clear()
        last, _ = BAD.run(tmp_path / "parts", budget=budget)
        rounds += 1
        spent = sum(sum(client.answers[key]["tokens"]) for key in client.asked)
        assert client.asked
        assert spent <= budget
        assert rounds < 20
        if last["stopped"]:
            assert "the same command continues from here" in last["stopped"]
            assert len(last["neurons"]) < 2
    assert rounds > 2
    assert text(last) == text(whole)
    client.asked.clear()
    assert text(BAD.run(tmp_path / "parts")[0]) == text(whole)
    assert len(client.asked) <= 1 < questions  # all is known but what the client can do


def test_a_kill_while_writing_loses_one_answer(tmp_path, client):
    whole, _ = BAD.run(tmp_path)
    cache = tmp_path / "llm-cache.jsonl"
    cache.write_bytes(cache.read_bytes()[:-40])
    client.asked.clear()
    again, _ = BAD.run(tmp_path)
    assert text(again) == text(whole)
    assert len(client.asked) == 2
    assert len(answer_cache.read_answers(cache)) == len(cache.read_text().splitlines())


def test_two_models_with_the_same_name_do_not_share_answers(tmp_path, client):
    BAD.run(tmp_path)
    asked = len(client.asked)
    other = f"hf:elsewhere/{BAD.name}"
    BAD.run(tmp_path, simulator=other, explainer=other)
    assert len(client.asked) == 2 * asked
    assert len(set(client.asked)) == asked


# ---- failures ------------------------------------------------------------------------------------


def simulation_keys(neuron):
    """Keys of a neuron's simulations in the recording, with its own words."""
    expected = json.loads(BAD.expected.read_text(encoding="utf-8"))
    words = expected["neurons"][str(neuron)]["explanations"]["openai_tar"]
    to_score = selected()[neuron]["openai_tar"][1]
    keys = []
    for tokens, _ in simulation.cases(BAD.mode, to_score, decode, ""):
        query = MODES[BAD.mode].ask("text", words, tokens)
        keys.append(answer_cache.answer_key(BAD.identity, query))
    return keys


def test_failures_are_missing_and_counted(tmp_path, client, monkeypatch):
    client.failures = {simulation_keys(0)[2]: "status 500"}
    monkeypatch.setattr(probe, "FAILING", 0.2)
    recording = str(tmp_path / "recording")
    result, log = BAD.run(tmp_path, record=recording)
    entry = result["neurons"][0]
    assert entry["failed"] == {"openai_tar": 1}
    assert entry["simulated"]["openai_tar"][2] is None
    assert entry["reasons"] == {"openai_tar 2": "status 500"}
    assert result["total"]["failed"] == 1
    value, reason = entry["scores"][f"detection(openai_tar)[{NAME}]"]
    assert reason == "1 of 8 questions without a readable answer, left out"
    assert value == 0.5
    assert "2 of 32 simulations failed" in log[-1]  # neuron 1 is asked the same, as a control
    client.failures = {}
    again, _ = BAD.run(tmp_path)  # failures are not cached but asked again
    assert again["total"]["failed"] == 0
    assert again["neurons"][0]["failed"] == {"openai_tar": 0}
    replayed, _ = BAD.run(tmp_path / "b", replay=recording)
    assert text(replayed) == text(result)  # but a recording holds them


def test_too_many_failures_give_no_score(tmp_path, client):
    client.failures = dict.fromkeys(simulation_keys(0)[:2], "status 500")
    with pytest.raises(
        UserError, match="2 of 32 simulations have no usable answer .mostly: status 500"
    ):
        BAD.run(tmp_path)


# ---- settings ------------------------------------------------------------------------------------


def test_a_dry_run_asks_nothing(tmp_path, monkeypatch):
    def never(*args):
        raise AssertionError("asked")

    monkeypatch.setattr(LanguageModel, "ask", never)
    monkeypatch.setattr(HttpClient, "__init__", never)
    monkeypatch.setattr(answer_cache.AnswerCache, "__init__", never)
    totals, log = run(
        tmp_path / "new",
        dry_run=True,
        rung="auto",
        price="1,10",
        simulator="http:m",
        explainer="http:m",
    )
    assert not (tmp_path / "new").exists()
    assert set(totals) == {"logprobs", "json", "detection", "fuzzing"}
    questions, tokens_in, tokens_out = totals["logprobs"]
    assert questions == 2 + 2 * 16  # explanations; each text with true and with wrong words
    printed = log[-1]
    assert f"logprobs: 34 questions, about {tokens_in:,} tokens in" in printed
    assert f"about ${(tokens_in + 10 * tokens_out) / 1e6:.2f}" in printed
    assert "Texts:" in log[0]


@pytest.mark.parametrize("price_text", ["", "1,10", "1,0"])
def test_a_dry_run_marks_the_mode_that_is_tried_first(price_text, tmp_path):
    changes = {"rung": "auto", "price": price_text}
    _, log = run(tmp_path, dry_run=True, **changes)
    lines = log[-1].split("\n")
    assert len(lines) == 4
    assert lines[0].endswith("<- the cheapest: chosen if it passes the probe")
    assert not any("<-" in line for line in lines[1:])
    modes = price.cheapest_first(selected(), decode, command.Settings(simulator="hf:m", **changes))
    assert [line.split(":")[0] for line in lines] == modes
    assert all("probe: 72 questions" in line or "fuzzing" in line for line in lines)


def test_the_cheapest_mode_follows_the_price():
    def order(price_text):
        settings = command.Settings(simulator="hf:m", price=price_text)
        return price.cheapest_first(selected(), decode, settings)

    assert order("0,1")[0] == "logprobs"  # one token out
    assert order("0,1")[-1] == "json"  # all tokens again
    assert order("1,0")[-1] == "fuzzing"  # two questions for each excerpt


def test_a_dry_run_without_live_neurons_asks_about_nothing(tmp_path):
    totals, _ = run(tmp_path, work={}, dry_run=True)
    assert totals == {"logprobs": [0, 0, 0]}


@pytest.mark.parametrize(
    "changes", [{"simulator": "gpt-4"}, {"explainer": "hf:"}, {"explainer": "gguf:model"}]
)
def test_a_name_that_is_not_a_model_is_refused(tmp_path, changes):
    with pytest.raises(UserError, match="names no language model"):
        BAD.replay(tmp_path, **changes)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"simulator": ""}, "^give a --simulator, hf:NAME"),
        ({"rung": "E"}, "auto, logprobs, json, detection, fuzzing or intruder"),
        ({"price": "3"}, "two numbers"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, words):
    values = {"simulator": "hf:m", **changes}
    with pytest.raises(UserError, match=words):
        command.check(command.Settings(**values))
