"""human.html asks questions with one right answer each, and people's answers are counted."""

import json
import math

import pytest
from html_pages import ParsedPage
from hypothesis import given
from hypothesis import strategies as st
from neuron_results import PLAIN, write_results

from crate_mini import UserError
from crate_mini.data.tokenizer import visible
from crate_mini.neurons import score_files, survey
from crate_mini.neurons.labels import label_text
from crate_mini.stats import wilson

NORMAL_95 = 1.959963984540054


def test_wilson_closed_values():
    z2 = NORMAL_95**2
    for n in (1, 7, 30):
        assert wilson(0, n) == pytest.approx((0, z2 / (n + z2)), abs=1e-12)
        assert wilson(n, n) == pytest.approx((n / (n + z2), 1), abs=1e-12)
    assert wilson(5, 10) == pytest.approx((0.236593, 0.763407), abs=1e-6)
    newcombe_1998_table_1 = (0.2553, 0.3662)
    assert wilson(81, 263) == pytest.approx(newcombe_1998_table_1, abs=1e-4)
    assert wilson(0, 0) == (0, 1)


@given(st.integers(1, 500), st.floats(0, 1))
def test_wilson_ends_are_z_deviations_away(n, share):
    """Its ends are the p for which the observed share is z standard deviations of p away."""
    right = round(share * n)
    for p in wilson(right, n):
        deviation = math.sqrt(p * (1 - p) / n)
        assert abs(right / n - p) == pytest.approx(NORMAL_95 * deviation, abs=1e-9)


def test_questions_have_one_right_answer(tmp_path):
    scores, excerpts = write_results(tmp_path, n=12)
    held_out = {}
    for line in excerpts:
        texts = []
        for excerpt in line["top"]:
            if excerpt["part"] == "score":
                texts.append([visible(PLAIN[id]) for id in excerpt["tokens"]])
        held_out[line["site"], line["neuron"]] = texts
    labels = {}
    for line in scores:
        label = label_text(line["label"], lambda id: PLAIN[id].decode(), 10)
        labels[line["site"], line["neuron"]] = label
    content = survey.page(score_files.read(tmp_path), PLAIN.__getitem__, seed=0, n=9)
    questions = ParsedPage(content).data["questions"]
    assert [question["task"] for question in questions] == ["intruder"] * 9 + ["label"] * 9
    asked = {"intruder": set(), "label": set()}
    for question in questions:
        neuron = (question["site"], question["neuron"])
        asked[question["task"]].add(neuron)
        options, answer = question["options"], question["options"][question["answer"]]
        if question["task"] == "intruder":
            assert len(options) == 5
            own = [option["tokens"] in held_out[neuron] for option in options]
            assert own.count(False) == 1
            assert answer["tokens"] not in held_out[neuron]
            assert "values" not in answer
        else:
            assert len(options) == 4
            assert answer == labels[neuron]
            assert options.count(answer) == 1
            for excerpt in question["given"]:
                assert excerpt["tokens"] in held_out[neuron]
    assert asked["intruder"] == asked["label"]
    assert len(asked["label"]) == 9
    assert len({question["answer"] for question in questions}) > 2  # not always in one place


def test_answers_are_counted(tmp_path):
    answers = [{"task": "intruder", "answer": 1, "choice": choice} for choice in (1, 1, 0, None)]
    answers.append({"task": "label", "answer": 0, "choice": None})
    path = tmp_path / "answers.json"
    path.write_text(json.dumps({"answers": answers}))
    counts = survey.score(path)
    assert counts["intruder"] == {
        "n": 3,
        "right": 2,
        "accuracy": 2 / 3,
        "ci95": wilson(2, 3),
        "chance": 0.2,
        "unanswered": 1,
    }
    assert counts["label"]["accuracy"] is None
    assert counts["label"]["chance"] == 0.25
    assert "2 of 3     0.667  0.208 to 0.939" in survey.table(counts)


@pytest.mark.parametrize("text", ["", "[]", '{"answers": [1]}', '{"answers": [{"task": "label"}]}'])
def test_what_is_not_answers_gets_one_sentence(text, tmp_path):
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(UserError, match="cannot be read as answers"):
        survey.score(tmp_path / "b.json")
