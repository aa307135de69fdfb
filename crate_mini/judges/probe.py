"""The probe before anything is spent: is the true explanation of a planted neuron the best one?

Planted neurons and texts on which they fire are in prompts/puzzles.txt. A model that does not
prefer each neuron's own explanation to those of the others cannot simulate.
"""

import re
from functools import partial

import numpy as np

from crate_mini import UserError, stats
from crate_mini.judges import prompt_files
from crate_mini.judges.simulation import chosen_modes, detection_accuracy

FAILING = 0.05  # share of simulations without an answer above which nothing is reported


def planted_neurons():
    """{explanation: [(tokens, levels), ...]} of the planted neurons."""
    neurons = {}
    for explanation, body in prompt_files.load("puzzles")[1]:
        neurons[explanation] = [planted_text(line) for line in body.splitlines()]
    return neurons


def planted_text(line):
    """(tokens, levels) of a line, where " red[10]" is a token of level 10, " red" of level 0."""
    words = re.findall(r"(\s?[^\s\[]+)(?:\[(\d+)\])?", line)
    return [word for word, _ in words], [int(level or 0) for _, level in words]


def probe(simulate, mode, threads):
    """{"won", "of", "asked", "failed", "scores"}: does each planted neuron's explanation win?

    simulate(explanation, tokens) -> (activations or None, reason). scores: for each planted
    neuron the agreement of its texts with the true explanation, then with the false ones. It is
    won if the first is above all others and above chance.
    """
    neurons = planted_neurons()
    jobs = []
    for true, texts in neurons.items():
        for claimed in neurons:
            jobs += [(true, claimed, tokens, levels) for tokens, levels in texts]

    def simulated(job):
        _, claimed, tokens, _ = job
        return simulate(claimed, tokens)[0]

    rows = list(threads.map(simulated, jobs))
    pairs = {}  # (true, claimed): (levels, simulated) of each text that has an answer
    for (true, claimed, _, levels), row in zip(jobs, rows):
        answered = pairs.setdefault((true, claimed), [])
        if row is not None:
            answered.append((levels, row))
    scores = {}
    for true in neurons:
        order = [true, *(claimed for claimed in neurons if claimed != true)]
        scores[true] = [agreement(mode, pairs[true, claimed]) for claimed in order]
    chance = 0.5 if mode == "detection" else 0
    return {
        "won": sum(wins(row, chance) for row in scores.values()),
        "of": len(neurons),
        "asked": len(rows),
        "failed": sum(row is None for row in rows),
        "scores": scores,
    }


def agreement(mode, pairs):
    """Pearson r over all tokens of (levels, simulated) pairs; None where it is undefined.

    For detection it is the balanced accuracy.
    """
    if not pairs:
        return None
    truth, simulated = zip(*pairs)
    if mode == "detection":
        return detection_accuracy(truth, simulated)[0]
    value, why = stats.pearson(np.concatenate(truth), np.concatenate(simulated))
    return None if why[0] else round(float(value[0]), 4)


def wins(scores, chance):
    """Is the first of these scores, of the true explanation, above chance and all others?"""
    true, *false = scores
    defined = [score for score in false if score is not None]
    return true is not None and true > max([chance, *defined])


def passed(result):
    """Did the true explanation win for every planted neuron, with few enough failures?"""
    return result["won"] == result["of"] and few_failures(result["failed"], result["asked"])


def few_failures(failed, asked):
    return failed <= FAILING * asked


def choose_mode(model, settings, threads, log):
    """(mode, {mode: result of its probe, or why the model lacks it}): the first that passes.

    Raises UserError if none does. With --despite-probe the first with few enough failures will do.
    """
    tried, messages = {}, []
    for mode in chosen_modes(settings.rung):
        result = model.lacks(mode)
        if result is None:
            result = probe(partial(model.simulate, mode), mode, threads)
        tried[mode] = result
        messages.append(f"{mode}: {summary(result)}")
        log(messages[-1])
        if isinstance(result, dict) and passed(result):
            return mode, tried
    if settings.despite_probe:
        for mode, result in tried.items():
            if isinstance(result, dict) and few_failures(result["failed"], result["asked"]):
                return mode, tried
        advice = "or another --rung"
    else:
        advice = "or insist with --despite-probe"
    raise UserError(
        f"{model.name} does not tell true from false explanations of planted neurons "
        f"({'; '.join(messages)}), so its scores would mean nothing: choose another --simulator, "
        f"{advice}."
    )


def summary(result):
    """The result of a probe, or why there is none, in a few words."""
    if isinstance(result, str):
        return result
    return (
        f"the true explanation wins for {result['won']} of {result['of']} planted neurons, "
        f"{result['failed']} of {result['asked']} simulations failed"
    )
