"""What a language model is asked about a neuron, and how strictly its answers are read."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted_excerpts import decode, selected

from crate_mini import UserError
from crate_mini.judges import explanation, pipeline, prompt_files, simulation
from crate_mini.judges.queries import NoAnswer
from crate_mini.judges.simulation import MODES, detection_accuracy
from crate_mini.neurons import metrics

AWKWARD = [
    "\n",
    "\t",
    "\t?",
    '"',
    "{tokens}",
    "{explanation}",
    "\n== user\n",
    "\u2028",
    "\\",
    "?",
]
TOKEN = st.text(min_size=1, max_size=6) | st.sampled_from(AWKWARD)
TOKENS = st.lists(TOKEN, min_size=1, max_size=6)


def one_line(text):
    return " ".join(text.split())


# ---- what is asked -------------------------------------------------------------------------------


@given(TOKENS, st.text(max_size=20).map(one_line))
def test_tokens_cannot_change_the_slots_of_a_prompt(tokens, words):
    query = MODES["logprobs"].ask("text", words, tokens)
    prompt = query["prompt"]
    assert len(query["at"]) == len(tokens)
    assert all(prompt[slot] == "?" for slot in query["at"])
    length = sum(len(prompt_files.json_string(token)) + 3 for token in tokens)
    lines = prompt[-length + 1 :].split("\n")
    assert [json.loads(line[:-2]) for line in lines] == tokens


@given(TOKENS, st.text(max_size=20).map(one_line))
def test_tokens_cannot_change_the_roles_of_a_chat(tokens, words):
    plain = MODES["json"].ask("chat", "w", ["a"])["chat"]
    chat = MODES["json"].ask("chat", words, tokens)["chat"]
    assert [role for role, _ in chat] == [role for role, _ in plain]
    assert chat[:-1] == plain[:-1]
    listed = chat[-1][1].split("\nTokens: ")[-1].split("\nPairs:")[0]
    assert json.loads(listed) == tokens


@given(TOKENS, st.text(max_size=20).map(one_line))
def test_a_text_to_detect_in_is_one_json_string(tokens, words):
    chat = MODES["detection"].ask("chat", words, tokens)["chat"]
    shown = chat[-1][1].split("\nText: ")[-1].split("\nDoes it fire?")[0]
    assert json.loads(shown) == "".join(tokens)


@pytest.mark.parametrize("name", pipeline.PROMPTS)
def test_prompts_have_versions_and_known_fields(name):
    version, sections = prompt_files.load(name)
    assert version >= 1
    fields = {field for _, body in sections for field in re.findall(r"\{(\w+)\}", body)}
    assert fields <= {"texts", "explanation", "tokens", "text"}


@given(
    st.lists(st.lists(st.floats(-5, 100, width=32), min_size=4, max_size=4), min_size=1, max_size=4)
)
def test_the_explainer_is_shown_quantised_activations(rows):
    tokens = np.tile(np.arange(-1, 4), (len(rows), 1))
    shown = explanation.shown_levels(SimpleNamespace(tokens=tokens, acts=rows))
    levels = [level for _, level in shown]
    assert levels == metrics.quantise(np.asarray(rows)).tolist()
    assert max(map(max, levels)) == (10 if np.max(rows) > 0 else 0)
    assert min(map(min, levels)) >= 0


def test_explaining_shows_text_and_pairs_and_no_padding():
    to_explain = selected()[0]["openai_tar"][0]
    prompt = explanation.query(to_explain, decode, "text")["prompt"]
    assert '" the red boat left the green harbour" [[" red", 10], [" green", 7]]' in prompt
    many = SimpleNamespace(
        tokens=np.repeat(to_explain.tokens, 60, 0), acts=np.repeat(to_explain.acts, 60, 0)
    )
    assert sum(len(ids) for ids, _ in explanation.shown_levels(many)) <= explanation.SHOWN_TOKENS


def test_an_explanation_without_a_model_names_the_top_tokens():
    to_explain = selected()[0]["openai_tar"][0]
    words = explanation.from_tokens(to_explain, decode)
    assert words == 'the tokens " red", " blue", " green", " grey", " yellow"'
    silent = SimpleNamespace(tokens=to_explain.tokens, acts=0 * to_explain.acts)
    assert explanation.from_tokens(silent, decode) == "nothing"


# ---- how answers are read ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
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
def test_json_is_read_strictly(text):
    with pytest.raises(NoAnswer):
        MODES["json"].read({"text": text}, [" a", " b"])


def test_correct_json_is_read():
    answer = {"text": ' [[" a", 1], [" b", 10]]\n'}
    assert MODES["json"].read(answer, [" a", " b"]) == [1, 10]


@pytest.mark.parametrize("text", ["yes", "2", "1.0", "true", "[1]"])
def test_detection_is_read_strictly(text):
    with pytest.raises(NoAnswer):
        MODES["detection"].read({"text": text}, [" a"])


def test_a_token_without_a_number_makes_the_excerpt_missing():
    read = MODES["logprobs"].read
    sure = {"3": -0.1}
    assert read({"slots": [sure, sure]}, [" a", " b"]) == [3, 3]
    for slots in ([sure, {}], [sure], [sure] * 3):
        with pytest.raises(NoAnswer):
            read({"slots": slots}, [" a", " b"])


def test_detection_is_scored_by_balanced_accuracy():
    truth = [[0, 9], [1, 0], [0, 0], [5, 0]]  # the first and the last fire strongly
    assert detection_accuracy(truth, [[1], [0], [0], [1]])[0] == 1
    assert detection_accuracy(truth, [[1], [1], [1], [1]])[0] == 0.5
    assert detection_accuracy(truth, [[1], [0], [1], [0]])[0] == 0.5
    assert detection_accuracy([[3], [2]], [[1], [1]])[0] is None
    assert detection_accuracy([[0], [0]], [[0], [0]])[0] is None


def test_padding_does_not_count_as_firing():
    nan = float("nan")
    truth = [[1, 2, 3], [9, nan, nan], [0, 1, 0]]  # the second fires strongly
    for rows in (truth, truth[1:] + truth[:1]):
        answers = [[int(acts[0] == 9)] for acts in rows]
        assert detection_accuracy(rows, answers)[0] == 1


# ---- names ---------------------------------------------------------------------------------------


def test_modes_are_still_called_by_their_old_letters():
    assert simulation.chosen_modes("auto") == ["logprobs", "json", "detection"]
    assert simulation.chosen_modes("A") == simulation.chosen_modes("logprobs") == ["logprobs"]
    assert simulation.chosen_modes("C") == ["json"]
    assert simulation.chosen_modes("D") == ["detection"]
    for name in ("B", "E", ""):
        with pytest.raises(UserError, match="choose auto, logprobs, json or detection"):
            simulation.chosen_modes(name)


def test_old_letters_in_results_become_names():
    current = simulation.current_names
    assert current("A") == "logprobs"
    assert current("openai_tar[llm:m@A]") == "openai_tar[llm:m@logprobs]"
    assert current("detection(openai_tar)[llm:m@D]") == "detection(openai_tar)[llm:m@detection]"
    for name in ("openai_tar[ngram]", "label_r@10", "logprobs", "llm:B@json", "Animals"):
        assert current(name) == name
