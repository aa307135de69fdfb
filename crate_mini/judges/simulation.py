"""Simulating a neuron from its explanation: what a language model is asked, how its answer is read.

Two modes give an activation for each token:

    logprobs     one prompt with a slot at each token: the expected level, over the
                 log-probabilities of 0..10 that the model gives to the slot
    json         the model repeats the tokens with levels 0..10, as JSON

Three give one verdict for each question:

    detection    does the neuron fire strongly in the excerpt, 1 or 0?
    fuzzing      are the marked tokens those on which it fires, 1 or 0? One question with the right
                 tokens of a firing excerpt marked, one with as many others
    intruder     which of four excerpts with marked tokens does not belong? Without an explanation

Scores carry the mode's name, and no table mixes two: the first two are correlations, detection and
fuzzing are balanced accuracies (chance 1/2), intruder is a share of right answers (chance 1/4).
Sources: Bills et al. 2023 for the first two, EleutherAI's delphi for detection and fuzzing, Paulo &
Belrose 2025 for intruder detection, where models agree with people.
"""

import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from crate_mini import UserError, cli, stats
from crate_mini.judges import prompt_files, written
from crate_mini.judges.queries import NoAnswer
from crate_mini.neurons import metrics

OLD_NAMES = {  # of modes in results and recordings from before they had names
    "A": "logprobs",
    "B": "logprobs of the next token",  # no longer a mode: it asked about each token by itself
    "C": "json",
    "D": "detection",
}
STRONG = 0.5  # share of a neuron's largest activation from which it fires strongly
WEAK = 0.1  # share below which a token may be marked as a wrong one
AMONG = 4  # excerpts from which the intruder is chosen
VERDICTS = {"0": 0, "0.0": 0, "no": 0, "false": 0, "1": 1, "1.0": 1, "yes": 1, "true": 1}
PLACES = {str(i): i for i in range(1, AMONG + 1)}
VERDICT_TOKENS = 8  # of a verdict, with some words around it


@dataclass(frozen=True)
class Mode:
    """One way to judge a neuron by excerpts.

    prompt: its file. capability: what the model must have; {style} is "text" or "chat". saw: what
    stands under a table of scores. cases(texts, rng) -> [(shown, truth)], one for each question;
    texts are [(tokens, activations)] of the excerpts. ask(style, explanation, shown) -> query.
    read(answer, shown) -> activations, one for each token, or a verdict; raises NoAnswer.
    agreement(truths, answers) -> (score or None, reason or None). chance: its value for a useless
    model.
    """

    prompt: str
    capability: str
    saw: str
    cases: Callable
    ask: Callable
    read: Callable
    agreement: Callable
    chance: float = 0

    @property
    def gives_activations(self):
        """Whether an answer is an activation for each token, not a verdict."""
        return self.agreement is correlation

    @property
    def needs_words(self):
        """Whether the model is shown an explanation."""
        return self.cases is not cases_for_intruder


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
    """The levels of the first list in the answer that has one for each token."""
    reason = "no JSON"
    for value in written.lists(answer["text"]):
        try:
            return levels(value, tokens)
        except NoAnswer as error:
            reason = str(error)
    raise NoAnswer(reason)


def levels(value, tokens):
    """The levels in a list of [token, level]; the list may be the only entry of an object."""
    if isinstance(value, dict) and len(value) == 1:
        (value,) = value.values()
    if not isinstance(value, list) or len(value) != len(tokens):
        raise NoAnswer("another number of tokens")
    return [level(pair, token) for pair, token in zip(value, tokens)]


def level(pair, token):
    """The level in [token, level], whose token may lack spaces, or in such an object."""
    if isinstance(pair, dict):
        pair = list(pair.values())
    if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str):
        number = written.whole_number(pair[1])
        if pair[0].strip() == token.strip() and number in range(11):
            return number
    raise NoAnswer("a pair that is not the token and a whole number from 0 to 10")


# ---- verdicts ------------------------------------------------------------------------------------


def ask_detection(style, explanation, tokens):
    text = prompt_files.json_string("".join(tokens))
    filled = prompt_files.fill("detect", style, explanation=explanation, text=text)
    return {"ask": "text", "most": VERDICT_TOKENS, **filled}


def ask_fuzzing(style, explanation, shown):
    filled = prompt_files.fill("fuzz", style, explanation=explanation, text=marked_text(*shown))
    return {"ask": "text", "most": VERDICT_TOKENS, **filled}


def ask_intruder(style, explanation, shown):
    lines = [f"{i}: {marked_text(*excerpt)}" for i, excerpt in enumerate(shown, 1)]
    filled = prompt_files.fill("intruder", style, texts="\n".join(lines))
    return {"ask": "text", "most": VERDICT_TOKENS, **filled}


def marked_text(tokens, marks):
    """A text as a JSON string, its tokens at the positions `marks` marked <<like>> this."""
    parts = [f"<<{token}>>" if i in marks else token for i, token in enumerate(tokens)]
    return prompt_files.json_string("".join(parts))


def read_verdict(answer, shown):
    return written.choice(answer["text"], VERDICTS)


def read_place(answer, shown):
    return written.choice(answer["text"], PLACES)


# ---- what is shown, and the truth ----------------------------------------------------------------


def cases(mode, excerpts, decode, name):
    """[(shown, truth)] of a neuron's Excerpts in a mode; what is drawn depends on its name."""
    texts = []
    for tokens, acts in zip(excerpts.tokens, excerpts.acts):
        ids = np.asarray(tokens[1:])
        real = ids >= 0  # the rest is padding
        strings = [decode([int(id)]) for id in ids[real]]
        texts.append((strings, np.asarray(acts, np.float64)[real]))
    return MODES[mode].cases(texts, np.random.default_rng(zlib.crc32(name.encode())))


def cases_with_activations(texts, rng):
    return list(texts)


def cases_for_detection(texts, rng):
    return [(tokens, int(len(strong) > 0)) for tokens, _, strong in with_strong_tokens(texts)]


def cases_for_fuzzing(texts, rng):
    """Each excerpt that fires strongly twice: its strong tokens marked, as many weak ones."""
    cases = []
    for tokens, weak, strong in with_strong_tokens(texts):
        if not len(strong) or not len(weak):
            continue
        wrong = rng.choice(weak, min(len(strong), len(weak)), replace=False)
        cases += [((tokens, positions(strong)), 1), ((tokens, positions(wrong)), 0)]
    return cases


def cases_for_intruder(texts, rng):
    """One question for each excerpt that does not fire strongly, next to three that do."""
    excerpts = with_strong_tokens(texts)
    firing = [(tokens, strong) for tokens, _, strong in excerpts if len(strong)]
    others = [(tokens, weak) for tokens, weak, strong in excerpts if len(weak) and not len(strong)]
    if len(firing) < AMONG - 1:
        return []
    cases = []
    for tokens, weak in others:
        chosen = [firing[i] for i in rng.choice(len(firing), AMONG - 1, replace=False)]
        marks = round(np.mean([len(strong) for _, strong in chosen]))
        wrong = rng.choice(weak, min(marks, len(weak)), replace=False)
        place = int(rng.integers(AMONG))
        chosen.insert(place, (tokens, wrong))
        shown = [(excerpt, positions(marked)) for excerpt, marked in chosen]
        cases.append((shown, place + 1))
    return cases


def with_strong_tokens(texts):
    """[(tokens, positions of weak ones, positions of strong ones)] of [(tokens, activations)].

    Strong is half of the neuron's largest activation in these texts.
    """
    top = max((max(acts) for _, acts in texts), default=0)
    found = []
    for tokens, acts in texts:
        acts = np.asarray(acts)
        strong = np.flatnonzero((acts >= STRONG * top) & (acts > 0))
        found.append((tokens, np.flatnonzero(acts <= WEAK * top), strong))
    return found


def positions(array):
    return sorted(int(i) for i in array)


# ---- how well answers agree with the truth -------------------------------------------------------


def correlation(truths, answers):
    """Pearson r over all tokens."""
    values, reasons = stats.pearson(np.concatenate(truths), np.concatenate(answers))
    return (None, reasons[0]) if reasons[0] else (float(values[0]), None)


def balanced_accuracy(truths, answers):
    return metrics.balanced_accuracy(truths, answers)


def share_right(truths, answers):
    return float(np.mean(np.equal(truths, answers))), None


# ---- all modes -----------------------------------------------------------------------------------

MODES = {
    "logprobs": Mode(
        "simulate_lines",
        "prompt logprobs",
        "saw the explanation and the excerpt up to the token that it rated, one prompt for each "
        "excerpt",
        cases_with_activations,
        ask_logprobs,
        read_logprobs,
        correlation,
    ),
    "json": Mode(
        "simulate_json",
        "{style}",
        "saw the explanation and the whole excerpt, and wrote whole numbers",
        cases_with_activations,
        ask_json,
        read_json,
        correlation,
    ),
    "detection": Mode(
        "detect",
        "{style}",
        "saw the explanation and the whole excerpt, and said only whether the neuron fires "
        "strongly in it",
        cases_for_detection,
        ask_detection,
        read_verdict,
        balanced_accuracy,
        chance=0.5,
    ),
    "fuzzing": Mode(
        "fuzz",
        "{style}",
        "saw the explanation and an excerpt with marked tokens, and said whether they are those on "
        "which the neuron fires",
        cases_for_fuzzing,
        ask_fuzzing,
        read_verdict,
        balanced_accuracy,
        chance=0.5,
    ),
    "intruder": Mode(
        "intruder",
        "{style}",
        "saw no explanation but four excerpts with marked tokens, and said which one does not "
        "belong",
        cases_for_intruder,
        ask_intruder,
        read_place,
        share_right,
        chance=1 / AMONG,
    ),
}


def chosen_modes(name):
    """The modes that --rung NAME stands for: one, or for "auto" all that see an explanation.

    The old names A, C and D still work. Raises UserError for any other name.
    """
    if name == "auto":
        return [mode for mode in MODES if MODES[mode].needs_words]
    current = OLD_NAMES.get(name, name)
    if current not in MODES:
        raise UserError(f"--rung {name!r} is unknown; choose auto, {cli.one_of(MODES)}.")
    return [current]


def current_names(text):
    """A metric or a mode with the mode's name for its old letter: openai_tar[llm:m@A], A."""

    def name(match):
        return OLD_NAMES[match[0]]

    return re.sub(r"^[ABCD]$|(?<=@)[ABCD](?=\]|$)", name, text)
