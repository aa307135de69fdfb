"""The probe before anything is spent: is the true explanation of a planted neuron the best one?

Planted neurons and the texts on which they fire are in prompts/puzzles.txt, in groups that share
their texts. A neuron is won if its own explanation predicts it better than each of the others in
its group, by MARGIN, and better than chance. For the mode intruder, which sees no explanation, it
is won if the model finds most of its intruders.

Chance. To a model that does not understand explanations they are interchangeable: which one belongs
to which neuron might as well have been drawn. Then the neurons won in a group number at most as the
fixed points of a random permutation, whatever the model answers, even if it prefers one explanation
everywhere. `chance` is the exact probability that such a model passes in one mode.
"""

import math
import re
import zlib
from collections import Counter
from functools import partial

import numpy as np

from crate_mini import UserError
from crate_mini.judges import prompt_files
from crate_mini.judges.simulation import AMONG, MODES

FAILING = 0.05  # share of questions without an answer above which nothing is reported
MARGIN = 0.05  # by which the true explanation must win
NEEDED = 0.75  # share of the planted neurons that must be won
FUZZED = 2  # texts of each neuron that are shown in the mode fuzzing


# ---- planted neurons -----------------------------------------------------------------------------


def groups():
    """[{explanation: [(tokens, levels), ...]}, ...] of the planted neurons, group by group."""
    planted, texts = [], []
    for heading, body in prompt_files.load("puzzles")[1]:
        if heading == "texts":
            texts = [re.findall(r"\s?\S+", line) for line in body.splitlines()]
            planted.append({})
        else:
            planted[-1][heading] = [(tokens, levels(tokens, body.split())) for tokens in texts]
    return planted


def levels(tokens, words):
    """Level 10 at each of these words, else 0."""
    return [10 * (token.strip() in words) for token in tokens]


def neuron_count():
    """The number of planted neurons."""
    return sum(map(len, groups()))


def needed():
    """The number of planted neurons that must be won."""
    return math.ceil(NEEDED * neuron_count())


# ---- asking --------------------------------------------------------------------------------------


def questions(mode):
    """[(explanation, shown), ...]: what the probe of a mode asks, in order."""
    asked = []
    for group in groups():
        shown, _ = shown_and_truths(mode, group)
        for claimed in group if MODES[mode].needs_words else [None]:
            asked += [(claimed, item) for item in shown]
    return asked


def shown_and_truths(mode, group):
    """(what is shown, {explanation: the truth about each}) of a group; the same for every neuron.

    In the mode intruder a neuron has questions of its own: None is the truth of the others.
    """
    by_neuron = {}
    for true, texts in group.items():
        rng = np.random.default_rng(zlib.crc32(true.encode()))
        by_neuron[true] = MODES[mode].cases(texts, rng)
    if mode not in ("fuzzing", "intruder"):
        shown = [item for item, _ in next(iter(by_neuron.values()))]
        return shown, {true: [truth for _, truth in cases] for true, cases in by_neuron.items()}
    if mode == "fuzzing":
        for true, cases in by_neuron.items():
            by_neuron[true] = [case for case in cases if case[1]][:FUZZED]
    shown, truths = [], {true: [] for true in group}
    for owner, cases in by_neuron.items():
        for item, truth in cases:
            shown.append(item)
            for true in group:
                elsewhere = 0 if mode == "fuzzing" else None
                truths[true].append(truth if true == owner else elsewhere)
    return shown, truths


def probe(simulate, mode, threads):
    """{"won", "of", "needed", "chance", "asked", "failed", "reasons", "scores"} of a mode.

    simulate(explanation, shown) -> (answer or None, reason). scores: for each planted neuron the
    agreement with the true explanation, then with the false ones.
    """
    answers = list(threads.map(partial(star, simulate), questions(mode)))
    reasons = Counter(reason for answer, reason in answers if answer is None)
    remaining = iter([answer for answer, _ in answers])
    scores = {}
    for group in groups():
        shown, truths = shown_and_truths(mode, group)
        if MODES[mode].needs_words:
            given = {claimed: [next(remaining) for _ in shown] for claimed in group}
            for true in group:
                order = [true, *(claimed for claimed in group if claimed != true)]
                row = [agreement(mode, truths[true], given[claimed]) for claimed in order]
                scores[true] = row
        else:
            given = [next(remaining) for _ in shown]
            for true in group:
                scores[true] = [agreement(mode, truths[true], given)]
    return {
        "won": sum(wins(mode, row) for row in scores.values()),
        "of": len(scores),
        "needed": needed(),
        "chance": chance(mode),
        "asked": len(answers),
        "failed": sum(reasons.values()),
        "reasons": dict(reasons.most_common(3)),
        "scores": scores,
    }


def star(function, arguments):
    return function(*arguments)


def agreement(mode, truths, answers):
    """The score of the answers to questions that have a truth; None where it is undefined."""
    pairs = []
    for truth, answer in zip(truths, answers, strict=True):
        if truth is not None and answer is not None:
            pairs.append((truth, answer))
    if not pairs:
        return None
    value, _ = MODES[mode].agreement(*map(list, zip(*pairs)))
    return None if value is None else round(value, 4)


# ---- the verdict ---------------------------------------------------------------------------------


def wins(mode, scores):
    """Is the first of these scores, of the true explanation, above chance and all others?"""
    true, *false = scores
    if true is None:
        return False
    if not MODES[mode].needs_words:
        return true > 0.5
    best = max([MODES[mode].chance, *(score for score in false if score is not None)])
    return true >= best + MARGIN


def passed(result):
    """Were enough planted neurons won, with few enough questions unanswered?"""
    return result["won"] >= result["needed"] and answered(result)


def answered(result):
    """Were few enough questions left without an answer?"""
    return few_failures(result["failed"], result["asked"])


def few_failures(failed, asked):
    return failed <= FAILING * asked


# ---- chance --------------------------------------------------------------------------------------


def chance(mode):
    """The probability that a model without any understanding passes the probe of a mode."""
    total = np.ones(1)
    for group in groups():
        if MODES[mode].needs_words:
            counts = fixed_points(len(group))
        else:
            counts = binomial(len(group), chance_of_intruders(mode, group))
        total = np.convolve(total, counts)
    return float(total[needed() :].sum())


def fixed_points(n):
    """(n + 1,) probabilities that a random permutation of n has 0, 1, ..., n fixed points."""
    derangements = [1, 0]  # permutations of 0, 1, 2, ... without a fixed point
    while len(derangements) <= n:
        k = len(derangements)
        derangements.append((k - 1) * (derangements[-1] + derangements[-2]))
    counts = [math.comb(n, k) * derangements[n - k] for k in range(n + 1)]
    return np.array(counts) / math.factorial(n)


def binomial(n, p):
    """(n + 1,) probabilities of 0, 1, ..., n successes."""
    return np.array([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)])


def chance_of_intruders(mode, group):
    """The largest probability of guessing most intruders of a neuron of this group."""
    _, truths = shown_and_truths(mode, group)
    fewest = min(sum(truth is not None for truth in row) for row in truths.values())
    return float(binomial(fewest, 1 / AMONG)[fewest // 2 + 1 :].sum())


# ---- choosing a mode -----------------------------------------------------------------------------


def choose_mode(model, modes, despite_probe, threads, log):
    """(mode, {mode: result of its probe, or why the model lacks it}): the first that passes.

    Raises UserError if none does. With despite_probe the first with few enough failures will do.
    """
    log(
        f"the probe passes with {needed()} of {neuron_count()} planted neurons won; chance: "
        f"{sum(map(chance, modes)):.2g} over {len(modes)} modes"
    )
    tried = {}
    for mode in modes:
        result = model.lacks(mode)
        if result is None:
            result = probe(partial(model.simulate, mode), mode, threads)
        tried[mode] = result
        log(f"{mode}: {summary(result)}")
        if isinstance(result, dict) and passed(result):
            return mode, tried
    with_answers = [mode for mode in tried if isinstance(tried[mode], dict)]
    with_answers = [mode for mode in with_answers if answered(tried[mode])]
    if despite_probe and with_answers:
        return with_answers[0], tried
    raise refusal(model.name, tried, with_answers, despite_probe)


def refusal(name, tried, with_answers, despite_probe):
    """The UserError for a model without a usable mode: it answered wrongly, or not at all."""
    reasons = "; ".join(f"{mode}: {summary(result)}" for mode, result in tried.items())
    if not with_answers:
        return UserError(
            f"{name} gives no usable answers ({reasons}); choose another --simulator, --style or "
            "--rung."
        )
    advice = "or another --rung" if despite_probe else "or insist with --despite-probe"
    return UserError(
        f"{name} does not tell true from false explanations of planted neurons ({reasons}), so its "
        f"scores would mean nothing: choose another --simulator, {advice}."
    )


def summary(result):
    """The result of a probe, or why there is none, in a few words."""
    if isinstance(result, str):
        return result
    if not answered(result):
        reason = next(iter(result["reasons"]))
        return f"{result['failed']} of {result['asked']} questions unanswered (mostly: {reason})"
    return (
        f"{result['won']} of {result['of']} planted neurons won, {result['needed']} needed, "
        f"{result['failed']} of {result['asked']} questions unanswered"
    )
