"""What a language model is asked about a neuron, and how strictly its answers are read."""

import json
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from planted_excerpts import decode, selected

from crate_mini import UserError
from crate_mini.judges import explanation, pipeline, prompt_files, simulation
from crate_mini.judges.queries import NoAnswer
from crate_mini.judges.simulation import MODES
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


def read(mode, text, shown=(" a", " b")):
    return MODES[mode].read({"text": text}, list(shown))


@pytest.mark.parametrize(
    "text",
    [
        "nope",
        "[]",
        "[]" * 1000,
        '[[" a", 1]]',
        '[[" a", 1], [" b", 2], [" c", 3]]',
        "7",
        "null",
        '[[" a", 1], [" b", 2.5]]',
        '[[" a", 1], [" b", 11]]',
        '[[" a", 1], [" b", -1]]',
        '[[" a", 1], [" b", true]]',
        '[[" a", 1], [" b", null]]',
        '[[" a", 1], [" b", []]]',
        '[[" a", 1], [" b", "eleven"]]',
        '[[" a", 1], [" b"]]',
        '[[" b", 1], [" a", 2]]',
        '[[1, 1], [" b", 2]]',
        '[[" a", 1], [" b", 2',
        '[[" a", 1], [" b", 2}',
        '[[" a", NaN], [" b", Infinity]]',
        '[[" a", 1e999], [" b", 2]]',
        '[[" a", ' + "9" * 5000 + '], [" b", 2]]',
        '{"a": {"b": [1]}, "c": 2}',
        "[" * 100_000,
        '{"a":' * 100_000,
        "[" * 100_000 + "]" * 100_000,
        '["' + r"\"" * 90_000,
        "[" + "x" * 300_000,
        "'",
        "",
    ],
    ids=lambda text: text[:20],
)
def test_what_is_not_one_level_for_each_token_is_no_answer(text):
    start = time.perf_counter()
    with pytest.raises(NoAnswer):
        read("json", text)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "text",
    [
        ' [[" a", 1], [" b", 10]]\n',
        '```json\n[[" a", 1], [" b", 10]]\n```',
        '```\n[[" a", 1],\n [" b", 10]]\n```\nI hope this helps!',
        'Sure! Here are the pairs [as asked]: [[" a", 1], [" b", 10]] ok',
        "[[' a', 1], [' b', 10]]",
        "It's this: [(' a', 1), (' b', 10),]",
        '[[" a", 1,], [" b", 10,],]',
        '[[" a", "1"], [" b", 10.0]]',
        '[[" a", One], [" b", "ten"]]',
        '[["a", 1], ["b", 10]]',
        '{"pairs": [[" a", 1], [" b", 10]]}',
        '[{"token": " a", "level": 1}, {"token": " b", "level": 10}]',
        '<think>first [[" a", 0], [" b", 0]]</think>[[" a", 1], [" b", 10]]',
        '[[" a", 1]] was wrong: [[" a", 1], [" b", 10]]',
    ],
)
def test_a_right_answer_is_read_whatever_its_notation(text):
    assert read("json", text) == [1, 10]


@given(TOKENS, st.data(), st.sampled_from([json.dumps, repr]))
def test_any_tokens_come_back_in_json_and_in_python(tokens, data, notation):
    levels = [data.draw(st.integers(0, 10)) for _ in tokens]
    pairs = [[token, level] for token, level in zip(tokens, levels)]
    if notation is repr:  # Python's own escapes, like \\x85, are not read
        printable = all(char.isprintable() or char in "\n\t" for token in tokens for char in token)
        assume(printable)
    text = f"Here:\n```\n{notation(pairs)}\n```"
    assert read("json", text, tokens) == levels


@pytest.mark.parametrize(
    "text", ["2", "[2]", "1 or 0", "maybe", "-1", "10", "1.5", "", "x" * 300_000]
)
def test_a_verdict_that_is_neither_0_nor_1_is_no_answer(text):
    for mode in ("detection", "fuzzing"):
        with pytest.raises(NoAnswer):
            read(mode, text)


@pytest.mark.parametrize(
    "text", ["1", " 1\n", "**1**", "Answer: 1", "```\n1\n```", "1.0", "yes", "[1]"]
)
def test_a_verdict_is_read_whatever_is_around_it(text):
    assert read("detection", text) == read("fuzzing", text) == 1
    assert read("detection", "No, it does not.") == 0


def test_an_intruder_is_a_number_from_1_to_4():
    assert read("intruder", "Text 3.") == 3
    for text in ("5", "0", "three"):
        with pytest.raises(NoAnswer, match="not one of 1, 2, 3, 4"):
            read("intruder", text)


def test_a_token_without_a_number_makes_the_excerpt_missing():
    read = MODES["logprobs"].read
    sure = {"3": -0.1}
    assert read({"slots": [sure, sure]}, [" a", " b"]) == [3, 3]
    for slots in ([sure, {}], [sure], [sure] * 3):
        with pytest.raises(NoAnswer):
            read({"slots": slots}, [" a", " b"])


# ---- what is shown, and the truth ----------------------------------------------------------------


def excerpts(*rows):
    """Excerpts of one token each per number; the token's text is its number."""
    width = max(map(len, rows))
    tokens = np.full((len(rows), width + 1), -1)
    acts = np.full((len(rows), width), np.nan, np.float32)
    for i, row in enumerate(rows):
        tokens[i, 1 : len(row) + 1] = row
        acts[i, : len(row)] = row
    return SimpleNamespace(tokens=tokens, acts=acts)


def cases(mode, *rows, name="L0 1"):
    return simulation.cases(mode, excerpts(*rows), lambda ids: f" {ids[0]}", name)


def test_an_excerpt_fires_strongly_from_half_of_the_largest_activation():
    rows = [1, 2, 3], [9], [0, 5, 0], [4, 4]  # padding does not count
    assert [truth for _, truth in cases("detection", *rows)] == [0, 1, 1, 0]
    assert [truth for _, truth in cases("detection", [0, 0], [0])] == [0, 0]
    assert MODES["detection"].agreement([1, 0, 0, 1], [1, 0, 1, 1]) == (0.75, None)
    assert MODES["detection"].agreement([1, 1], [1, 1])[0] is None


def test_fuzzing_marks_the_strong_tokens_once_and_as_many_weak_ones_once():
    rows = [0, 9, 8, 0, 0, 0], [1, 2, 3], [0, 7, 3], [9, 9, 9]
    shown = cases("fuzzing", *rows)
    assert [truth for _, truth in shown] == [1, 0, 1, 0]
    (tokens, right), (_, wrong), (_, other), (_, weak) = [item for item, _ in shown]
    assert right == [1, 2]
    assert len(wrong) == 2
    assert set(wrong) <= {0, 3, 4, 5}
    assert other == [1]
    assert weak == [0]  # 3 is neither strong nor weak
    assert simulation.marked_text(tokens, right) == '" 0<< 9>><< 8>> 0 0 0"'
    prompt = MODES["fuzzing"].ask("text", "w", shown[0][0])["prompt"]
    assert 'Text: " 0<< 9>><< 8>> 0 0 0"' in prompt


def test_the_intruder_is_the_excerpt_in_which_it_does_not_fire():
    firing = [[0, 9, i, 0] for i in (0, 1, 2)]
    shown = cases("intruder", *firing, [3, 0, 0, 0], [0, 0, 4, 0])
    assert len(shown) == 2
    for (four, truth), own in zip(shown, (3, 4)):
        assert len(four) == 4
        tokens, marks = four[truth - 1]
        assert f" {own}" in tokens
        assert 1 not in marks or " 9" not in tokens
        for i, (tokens, marks) in enumerate(four, 1):
            if i != truth:
                assert [tokens[mark] for mark in marks] == [" 9"]
    assert shown == cases("intruder", *firing, [3, 0, 0, 0], [0, 0, 4, 0])
    places = {cases("intruder", *firing, [0, 1], name=str(i))[0][1] for i in range(40)}
    assert places == {1, 2, 3, 4}
    assert cases("intruder", *firing[:2], [0, 0]) == []


@given(TOKENS)
def test_marked_texts_are_json_strings(tokens):
    text = json.loads(simulation.marked_text(tokens, [0]))
    assert text == f"<<{tokens[0]}>>" + "".join(tokens[1:])


# ---- names ---------------------------------------------------------------------------------------


def test_modes_are_still_called_by_their_old_letters():
    assert simulation.chosen_modes("auto") == ["logprobs", "json", "detection", "fuzzing"]
    assert simulation.chosen_modes("A") == simulation.chosen_modes("logprobs") == ["logprobs"]
    assert simulation.chosen_modes("C") == ["json"]
    assert simulation.chosen_modes("D") == ["detection"]
    for name in ("B", "E", ""):
        with pytest.raises(
            UserError, match="choose auto, logprobs, json, detection, fuzzing or intruder"
        ):
            simulation.chosen_modes(name)


def test_old_letters_in_results_become_names():
    current = simulation.current_names
    assert current("A") == "logprobs"
    assert current("openai_tar[llm:m@A]") == "openai_tar[llm:m@logprobs]"
    assert current("detection(openai_tar)[llm:m@D]") == "detection(openai_tar)[llm:m@detection]"
    for name in ("openai_tar[ngram]", "label_r@10", "logprobs", "llm:B@json", "Animals"):
        assert current(name) == name
