"""Simulating a neuron from its explanation: what a language model is asked, how its answer is read.

    logprobs     one prompt with a slot at each token: the expected level, over the
                 log-probabilities of 0..10 that the model gives to the slot
    json         the model repeats the tokens with levels 0..10, as JSON that is parsed strictly
    detection    does the neuron fire strongly in the excerpt, 1 or 0?

Each mode asks one question about an excerpt. Scores carry the mode's name, and no table mixes two:
logprobs and json give an activation for each token, detection only one answer, whose score is
balanced accuracy, a different statistic. Sources: Bills et al. 2023 for the first two,
EleutherAI's delphi for the third.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from crate_mini import UserError, cli
from crate_mini.judges import prompt_files
from crate_mini.judges.queries import NoAnswer
from crate_mini.neurons import metrics

OLD_NAMES = {  # of modes in results and recordings from before they had names
    "A": "logprobs",
    "B": "logprobs of the next token",  # no longer a mode: it asked about each token by itself
    "C": "json",
    "D": "detection",
}


@dataclass(frozen=True)
class Mode:
    """One way to simulate a neuron on an excerpt.

    prompt: its file. capability: what the model must have; {style} is "text" or "chat". saw: what
    stands under a table of scores. ask(style, explanation, tokens) -> query. read(answer, tokens)
    -> activations, one for each token, or a single 0 or 1; raises NoAnswer.
    """

    prompt: str
    capability: str
    saw: str
    ask: Callable
    read: Callable


# ---- logprobs ------------------------------------------------------------------------------------


def ask_logprobs(style, explanation, tokens):
    """A plain prompt, whatever the style, with one slot for each token, whatever it holds."""
    lines = [f"{prompt_files.json_string(token)}\t?" for token in tokens]
    filled = prompt_files.fill(
        "simulate_lines", "text", explanation=explanation, tokens="\n".join(lines)
    )
    slots = [match.start() + 1 for match in re.finditer(r"\t\?", filled["prompt"])]
    return {"ask": "slots", "at": slots[-len(tokens) :], **filled}


def read_logprobs(answer, tokens):
    values = [metrics.expected(slot) for slot in answer["slots"]]
    if None in values or len(values) != len(tokens):
        raise NoAnswer("a token without any number among its log-probabilities")
    return [round(float(value), 3) for value in values]


# ---- json ----------------------------------------------------------------------------------------


def ask_json(style, explanation, tokens):
    listed = json.dumps(tokens, ensure_ascii=False)
    longest = len(listed) // 2 + 8 * len(tokens) + 20  # tokens of an answer
    filled = prompt_files.fill("simulate_json", style, explanation=explanation, tokens=listed)
    return {"ask": "text", "most": longest, **filled}


def read_json(answer, tokens):
    pairs = parse_json(answer)
    if not isinstance(pairs, list) or len(pairs) != len(tokens):
        raise NoAnswer("another number of tokens")
    for pair, token in zip(pairs, tokens):
        if not is_rating(pair, token):
            raise NoAnswer("a pair that is not the token and a whole number from 0 to 10")
    return [level for _, level in pairs]


def parse_json(answer):
    try:
        return json.loads(answer["text"])
    except ValueError:
        raise NoAnswer("no JSON") from None


def is_rating(pair, token):
    """Is this [token, level]?"""
    if not isinstance(pair, list) or len(pair) != 2:
        return False
    name, level = pair
    return name == token and type(level) is int and 0 <= level <= 10


# ---- detection -----------------------------------------------------------------------------------


def ask_detection(style, explanation, tokens):
    text = prompt_files.json_string("".join(tokens))
    filled = prompt_files.fill("detect", style, explanation=explanation, text=text)
    return {"ask": "text", "most": 2, **filled}


def read_detection(answer, tokens):
    fires = parse_json(answer)
    if type(fires) is not int or fires not in (0, 1):
        raise NoAnswer("neither 0 nor 1")
    return [fires]


def detection_accuracy(truth, answers):
    """(balanced accuracy or None, reason or None).

    truth: for each excerpt its activations; answers: for each excerpt [0 or 1]. An excerpt fires
    strongly if it reaches half of the largest activation among them.
    """
    peaks = [np.nanmax(acts) for acts in truth]  # NaN pads a short excerpt
    strong = [peak >= max(peaks) / 2 > 0 for peak in peaks]
    value, why = metrics.balanced_accuracy(strong, [answer for (answer,) in answers])
    return None if value is None else round(value, 4), why


# ---- all modes -----------------------------------------------------------------------------------

MODES = {
    "logprobs": Mode(
        "simulate_lines",
        "prompt logprobs",
        "saw the explanation and the excerpt up to the token that it rated, one prompt for each "
        "excerpt",
        ask_logprobs,
        read_logprobs,
    ),
    "json": Mode(
        "simulate_json",
        "{style}",
        "saw the explanation and the whole excerpt, and wrote whole numbers",
        ask_json,
        read_json,
    ),
    "detection": Mode(
        "detect",
        "{style}",
        "saw the explanation and the whole excerpt, and said only whether the neuron fires "
        "strongly in it",
        ask_detection,
        read_detection,
    ),
}


def chosen_modes(name):
    """The modes that --rung NAME stands for: one, or for "auto" all of them, in this order.

    The old names A, C and D still work. Raises UserError for any other name.
    """
    if name == "auto":
        return list(MODES)
    current = OLD_NAMES.get(name, name)
    if current not in MODES:
        raise UserError(f"--rung {name!r} is unknown; choose auto, {cli.one_of(MODES)}.")
    return [current]


def current_names(text):
    """A metric or a mode with the mode's name for its old letter: openai_tar[llm:m@A], A."""

    def name(match):
        return OLD_NAMES[match[0]]

    return re.sub(r"^[ABCD]$|(?<=@)[ABCD](?=\]|$)", name, text)
