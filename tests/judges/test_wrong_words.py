"""True minus wrong explanation, and whole runs with a hosted model as they are today."""

import json
import re

import pytest
from planted_excerpts import run
from scripted_server import USAGE, judge, server

from crate_mini.judges import pipeline, probe

LABEL = "llm:m@json"


# ---- the wrong explanation -----------------------------------------------------------------------


def words_of_others(**words):
    """The wrong words of neurons "A1", "A2", "B1", ... of the sites A and B."""
    explained = {f"{name[0]} {name[1]}": {"p": (text, None)} for name, text in words.items()}
    wrong = pipeline.words_of_others(explained)
    return {name.replace(" ", ""): by_protocol["p"] for name, by_protocol in wrong.items()}


def test_a_wrong_explanation_is_that_of_the_next_neuron_of_the_site():
    wrong = words_of_others(A1="a", A2="b", A3="c", B1="d", B2="e")
    assert wrong == {"A1": "b", "A2": "c", "A3": "a", "B1": "e", "B2": "d"}


def test_it_is_never_the_neurons_own_and_comes_from_elsewhere_if_need_be():
    assert words_of_others(A1="a", A2="a", A3="b") == {"A1": "b", "A2": "b", "A3": "a"}
    assert words_of_others(A1="a", B1="b", B2="c") == {"A1": "b", "B1": "c", "B2": "b"}
    assert words_of_others(A1="a", A2=None, A3="c") == {"A1": "c", "A2": "c", "A3": "a"}
    assert words_of_others(A1="a") == {"A1": None}


def test_the_result_is_the_difference():
    def gain(true, false, mode="logprobs"):
        *_, (name, value) = pipeline.with_gain("p[m]", mode, true, false).items()
        assert name == "p[m, true - wrong]"
        return value

    assert gain((0.5, None), (0.2, None)) == (pytest.approx(0.3), None)
    assert gain((0.5, "1 of 9 left out"), (-0.2, None)) == (pytest.approx(0.7), None)
    constant = None, pipeline.CONSTANT  # it predicts nothing, which is worth 0
    assert gain((0.5, None), constant) == (0.5, None)
    assert gain(constant, (0.2, None)) == (-0.2, None)
    assert gain((0.5, None), (None, "failed: x")) == (None, "failed: x")
    assert gain((None, "true activations are constant"), constant)[0] is None
    assert gain((0.75, None), (0.5, None), "detection") == (0.25, None)
    assert gain((0.75, None), (None, "unused"), "intruder") == (0.5, None)  # minus chance
    names = pipeline.with_gain("p[m]", "intruder", (1, None), (None, ""))
    assert list(names) == ["p[m]", "p[m, true - wrong]"]


# ---- hosted models -------------------------------------------------------------------------------


class HostedJudge:
    """A chat model that knows the planted neurons and the explanation "the tokens ...".

    quirk: "fence" puts answers into a code fence with a preamble, "python" writes Python's
    notation, "completion" refuses max_tokens.
    """

    def __init__(self, quirk):
        self.quirk = quirk
        self.words = {}
        for group in probe.groups():
            for explanation, texts in group.items():
                rows = [zip(tokens, levels) for tokens, levels in texts]
                fires = {token.strip() for row in rows for token, level in row if level}
                self.words[explanation] = fires

    def level(self, explanation, token):
        fires = self.words.get(explanation)
        if fires is None:
            fires = {word.strip() for word in re.findall(r'"([^"]*)"', explanation)}
        return 10 * (token.strip() in fires)

    def __call__(self, path, body):
        if not path.endswith("/chat/completions"):
            return 404, {}, {"error": {"message": "This is a chat model"}}
        if self.quirk == "completion" and "max_tokens" in body:
            return 400, {}, {"error": {"message": "use max_completion_tokens"}}
        if body.get("logprobs"):
            return 400, {}, {"error": {"message": "logprobs are not supported"}}
        text = self.answer(body["messages"][-1]["content"])
        return 200, {}, {"choices": [{"message": {"content": text}}], "usage": USAGE}

    def answer(self, question):
        if asked := re.search(r"fires on: (.*)\nTokens: (.*)\nPairs:", question, re.DOTALL):
            pairs = [[token, self.level(asked[1], token)] for token in json.loads(asked[2])]
            if self.quirk == "python":
                return f"Here they are: {[tuple(pair) for pair in pairs]}"
            text = json.dumps(pairs, indent=1)
            return f"Sure!\n```json\n{text}\n```" if self.quirk == "fence" else text
        if asked := re.search(r"fires on: (.*)\nText: (.*)\nDoes it fire\?", question, re.DOTALL):
            fires = any(self.level(asked[1], word) for word in json.loads(asked[2]).split())
            return f"**{int(fires)}**"
        return "I cannot say."


@pytest.mark.parametrize("quirk", ["plain", "fence", "python", "completion"])
def test_a_hosted_model_of_today_passes_the_probe_and_scores(quirk, tmp_path):
    with server(HostedJudge(quirk)) as (url, seen):
        result, log = judge(tmp_path, url, rung="json", despite_probe=False)
    assert result["probe"]["json"]["won"] == 12
    for entry in result["neurons"].values():
        assert entry["failed"] == {"openai_tar": 0}
        assert entry["scores"][f"openai_tar[{LABEL}]"][0] > 0.5
        assert entry["scores"][f"openai_tar[{LABEL}, true - wrong]"][0] > 0.5
    refused = [body for _, _, _, body in seen if "max_tokens" in body]
    assert quirk != "completion" or len(refused) <= 5  # one for each capability, at most


def test_the_cheapest_mode_that_passes_is_used(tmp_path):
    """It has no log-probabilities, and to detect is cheaper than to write JSON."""
    with server(HostedJudge("plain")) as (url, _):
        result, log = judge(tmp_path, url, rung="auto", despite_probe=False)
    assert result["rung"] == "detection"
    assert list(result["probe"]) == ["logprobs", "detection"]
    assert result["probe"]["logprobs"].startswith("no prompt logprobs (status 404: This is a chat")
    gains = [
        e["scores"]["detection(openai_tar)[llm:m@detection, true - wrong]"] for e in entries(result)
    ]
    assert all(value > 0 for value, _ in gains)


def entries(result):
    return result["neurons"].values()


def test_a_model_that_only_refuses_is_not_called_a_bad_judge(tmp_path):
    with server(HostedJudge("plain")) as (url, _), pytest.raises(pipeline.UserError) as error:
        judge(tmp_path, url, rung="fuzzing", despite_probe=False)
    assert "questions unanswered (mostly: not one of 0, 1)" in str(error.value)
    assert "does not tell" not in str(error.value)


@pytest.mark.parametrize("mode", ["fuzzing", "intruder"])
def test_verdict_modes_give_a_score_and_what_is_above_the_control(mode, tmp_path, monkeypatch):
    class Always:
        def ask(self, query):
            can = {"can": ["text"], "why": {}}
            return {**({"text": "1"} if query["ask"] == "text" else can), "tokens": [1, 1]}

    monkeypatch.setattr(pipeline.LanguageModel, "client", Always())
    result, _ = run(tmp_path, rung=mode, despite_probe=True)
    for entry in entries(result):
        name = f"{mode}(openai_tar)[llm:m@{mode}"
        score, reason = entry["scores"][f"{name}]"]
        gain, _ = entry["scores"][f"{name}, true - wrong]"]
        if mode == "fuzzing":
            assert (score, gain) == (0.5, 0)
            assert len(entry["simulated wrong"]["openai_tar"]) == len(
                entry["simulated"]["openai_tar"]
            )
        else:
            assert gain == score - 0.25
            assert entry["simulated wrong"]["openai_tar"] == []
