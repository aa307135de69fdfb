"""What a language model is asked about a neuron, and what its answers are worth: prompts, rungs, the probe.

    explain   excerpts with activations -> a few words
    simulate  words, tokens -> expected activations 0..10, on one of four rungs

Rungs, a ladder of what a back end can give; scores carry the letter, and no table mixes two:
    A  one prompt for an excerpt, a slot at each token: expectation over their log-probabilities of 0..10
    B  one prompt for each token: expectation over the log-probabilities of the next token
    C  the model repeats the tokens with whole numbers, as JSON, parsed strictly
    D  does the neuron fire strongly in the excerpt, 1 or 0: balanced accuracy, a different statistic
Prompts are plain text files in prompts/, each with a version.
Source: Bills et al. 2023 (A, B, the ideas of C and of puzzles); EleutherAI's delphi (D).
"""

import json
import re
from functools import cache, partial
from pathlib import Path

import numpy as np

from crate_mini import UserError
from crate_mini import stats as metrics
from crate_mini.judges.http_client import Failed

RUNGS = {  # letter: (prompt file, capability that it needs, kind of query)
    "A": ("simulate_lines", "prompt logprobs", "slots"),
    "B": ("simulate_token", "{style} logprobs", "next"),
    "C": ("simulate_json", "{style}", "text"),
    "D": ("detect", "{style}", "text"),
}
SAW = {  # one sentence for under a table
    "A": "saw the explanation and the excerpt up to the token that it rated, one prompt for each excerpt",
    "B": "saw the explanation and the excerpt up to the token that it rated, one prompt for each token",
    "C": "saw the explanation and the whole excerpt, and wrote whole numbers",
    "D": "saw the explanation and the whole excerpt, and said only whether the neuron fires strongly in it",
}
FAILING = 0.05  # share of simulations without an answer above which nothing is reported
SHOWN = 640  # tokens of excerpts that the explainer is shown, at most


# ---- prompts ---------------------------------------------------------------------------------------------


@cache
def prompt_file(name):
    """(version, [(heading, text), ...]) of prompts/NAME.txt: comments, then sections, "== HEADING"."""
    text = Path(__file__).with_name("prompts").joinpath(f"{name}.txt").read_text(encoding="utf-8")
    head, *parts = re.split(r"^== ", text, flags=re.MULTILINE)
    sections = [(part.split("\n", 1)[0], part.split("\n", 1)[1].strip("\n")) for part in parts]
    return int(re.search(r"Version (\d+)", head)[1]), sections


def messages(name, style, **filled):
    """{"chat": [[role, content], ...]} or {"prompt": str} of a prompt file, with {fields} filled in.

    Fields are filled in one pass, after the file is cut up: nothing in a corpus can become a field or a role.
    """
    parts = [
        [role, re.sub(r"\{(\w+)\}", lambda m: filled[m[1]] if m[1] in filled else m[0], text)]
        for role, text in prompt_file(name)[1]
    ]
    if style == "chat":
        return {"chat": [part for part in parts if part[1]]}
    gaps = {"system": "\n\n", "user": "\n", "assistant": "\n\n"}
    return {"prompt": "".join(text + gaps[role] for role, text in parts[:-1]) + parts[-1][1]}


def quoted(text):
    """A JSON string; its line breaks and tabs are escapes, so a prompt's own are unmistakable."""
    return json.dumps(text, ensure_ascii=False)


# ---- explain ---------------------------------------------------------------------------------------------


def shown(excerpts):
    """[(ids, levels 0..10)] of excerpts, up to SHOWN tokens; 10 is the largest activation among them."""
    rows, count = [], 0
    for tokens, acts in zip(excerpts.tokens, excerpts.acts):
        real = np.asarray(tokens[1:]) >= 0  # the rest is padding
        count += real.sum()
        if rows and count > SHOWN:
            break
        rows.append((np.asarray(tokens[1:])[real], np.asarray(acts, np.float64)[real]))
    top = max((acts.max(initial=0) for _, acts in rows), default=0)
    return [(ids.tolist(), metrics.quantise(acts, top).tolist()) for ids, acts in rows]


def template(excerpts, decode, most=5):
    """Words without a model: the tokens of highest mean level in the excerpts."""
    levels = {}
    for ids, row in shown(excerpts):
        for id, level in zip(ids, row):
            levels.setdefault(id, []).append(level)
    best = sorted(levels, key=lambda id: (-np.mean(levels[id]), id))[:most]
    named = [quoted(decode([id])) for id in best if sum(levels[id])]
    return f"the tokens {', '.join(named)}" if named else "nothing"


def explain_query(excerpts, decode, style):
    """The question that asks for an explanation of excerpts."""
    lines = []
    for ids, levels in shown(excerpts):
        pairs = [[decode([id]), level] for id, level in zip(ids, levels) if level]
        lines.append(f"{quoted(decode(ids))} {json.dumps(pairs, ensure_ascii=False)}")
    return {"ask": "text", "most": 40, **messages("explain", style, texts="\n".join(lines))}


# ---- simulate --------------------------------------------------------------------------------------------


def queries(rung, style, explanation, tokens):
    """The questions by which a rung simulates one excerpt; tokens: its tokens as strings."""
    file, _, ask = RUNGS[rung]
    build = partial(messages, file, style, explanation=explanation)
    if rung == "A":
        found = messages(
            file,
            "text",
            explanation=explanation,
            tokens="\n".join(f"{quoted(token)}\t?" for token in tokens),
        )
        at = [m.start() + 1 for m in re.finditer(r"\t\?", found["prompt"])][-len(tokens) :]
        return [{"ask": ask, "at": at, **found}]
    if rung == "B":
        return [
            {"ask": ask, **build(text=quoted("".join(tokens[: i + 1])), token=quoted(token))}
            for i, token in enumerate(tokens)
        ]
    if rung == "C":
        listed = json.dumps(tokens, ensure_ascii=False)
        return [
            {"ask": ask, "most": len(listed) // 2 + 8 * len(tokens) + 20, **build(tokens=listed)}
        ]
    return [{"ask": ask, "most": 2, **build(text=quoted("".join(tokens)))}]


def read_out(rung, answers, tokens):
    """Activations, one for each token (D: one for the excerpt), from the answers to `queries`.

    Raises Failed for anything short of that.
    """
    if rung in "AB":
        found = answers[0]["slots"] if rung == "A" else [answer["next"] for answer in answers]
        values = [metrics.expected(slot) for slot in found]
        if None in values or len(values) != len(tokens):
            raise Failed("a token without any number among its log-probabilities")
        return [round(float(value), 3) for value in values]
    try:
        found = json.loads(answers[0]["text"])
    except ValueError:
        raise Failed("no JSON") from None
    if rung == "D":
        if type(found) is not int or found not in (0, 1):
            raise Failed("neither 0 nor 1")
        return [found]
    if not isinstance(found, list) or len(found) != len(tokens):
        raise Failed("another number of tokens")
    for pair, token in zip(found, tokens):
        if not (
            isinstance(pair, list)
            and len(pair) == 2
            and pair[0] == token
            and type(pair[1]) is int
            and 0 <= pair[1] <= 10
        ):
            raise Failed("a pair that is not the token and a whole number from 0 to 10")
    return [pair[1] for pair in found]


# ---- probe -----------------------------------------------------------------------------------------------


def puzzles():
    """[(explanation, [(tokens, levels), ...]), ...]: planted neurons, from prompts/puzzles.txt."""

    def text(line):
        found = re.findall(r"(\s?[^\s\[]+)(?:\[(\d+)\])?", line)
        return [word for word, _ in found], [int(level or 0) for _, level in found]

    return [
        (name, [text(line) for line in body.splitlines()])
        for name, body in prompt_file("puzzles")[1]
    ]


def agreement(rung, truth, guess):
    """Pearson r over all tokens, or balanced accuracy of "fires strongly" on rung D; None where undefined."""
    if rung == "D":
        return detection(truth, guess)[0]
    value, why = metrics.pearson(np.concatenate(truth), np.concatenate(guess))
    return None if why[0] else round(float(value[0]), 4)


def detection(truth, guess):
    """(balanced accuracy or None, reason): truth by excerpt, its activations; guess by excerpt, [0 or 1].

    An excerpt fires strongly if it reaches half of the largest activation among them.
    """
    peaks = [np.nanmax(acts) for acts in truth]  # NaN: what pads a short excerpt
    strong = [peak >= max(peaks) / 2 > 0 for peak in peaks]
    value, why = metrics.balanced_accuracy(strong, [said for (said,) in guess])
    return None if value is None else round(value, 4), why


def probe(simulate, rung, threads):
    """{"won", "of", "asked", "failed", "scores"}: does each planted neuron's own explanation win?

    simulate(words, tokens) -> (row or None, reason). scores: by puzzle, the agreement of its texts with the
    true explanation, then with the false ones. Won: the first is above all others, and above chance.
    """
    planted = puzzles()
    jobs = [
        (true, name, tokens, levels)
        for true, texts in planted
        for name, _ in planted
        for tokens, levels in texts
    ]
    rows = [row for row, _ in threads.map(lambda job: simulate(job[1], job[2]), jobs)]
    scores, chance = {}, 0.5 if rung == "D" else 0
    for true, _ in planted:
        names = [true] + [name for name, _ in planted if name != true]
        pairs = {
            name: [
                (job[3], row)
                for job, row in zip(jobs, rows)
                if job[:2] == (true, name) and row is not None
            ]
            for name in names
        }
        scores[true] = [
            agreement(rung, *zip(*pairs[name])) if pairs[name] else None for name in names
        ]
    won = sum(
        true is not None and true > max([chance, *(x for x in false if x is not None)])
        for true, *false in scores.values()
    )
    return {
        "won": won,
        "of": len(planted),
        "asked": len(rows),
        "failed": sum(row is None for row in rows),
        "scores": scores,
    }


def choose_rung(model, s, threads, log):
    """(letter, {letter: probe, or why not}): the first rung that the model can climb and solves puzzles on.

    Raises UserError if there is none; with --despite-probe the first that gives enough answers will do.
    """
    tried, told = {}, []
    for rung in RUNGS if s.rung == "auto" else [s.rung]:
        found = tried[rung] = model.lacks(rung) or probe(
            partial(model.simulate, rung), rung, threads
        )
        text = (
            found
            if isinstance(found, str)
            else (
                "the true explanation wins {won} of {of} "
                "puzzles, {failed} of {asked} simulations failed".format(**found)
            )
        )
        told.append(f"rung {rung}: {text}")
        log(told[-1])
        if isinstance(found, dict) and solved(found):
            return rung, tried
    able = [rung for rung, found in tried.items() if isinstance(found, dict) and readable(found)]
    if s.despite_probe and able:
        return able[0], tried
    raise UserError(
        f"{model.name} does not tell true from false explanations of planted neurons "
        f"({'; '.join(told)}), so its scores would mean nothing: choose another --simulator"
        + (" or another --rung." if s.despite_probe else ", or insist with --despite-probe.")
    )


def solved(found):
    """Did the true explanation win every puzzle, with few enough questions failed?"""
    return found["won"] == found["of"] and readable(found)


def readable(found):
    """Did few enough questions fail?"""
    return found["failed"] <= FAILING * found["asked"]
