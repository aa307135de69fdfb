"""Explain a neuron in a few words: from its excerpts, with or without a language model."""

import json

import numpy as np

from crate_mini.judges import prompt_files
from crate_mini.neurons import metrics

SHOWN_TOKENS = 640  # largest number of tokens that the explainer sees
ANSWER_TOKENS = 40  # largest number of tokens of an explanation
CHARACTERS = 300  # of an explanation that are kept
NAMED = 5  # tokens in an explanation without a model


def shown_levels(excerpts):
    """[(ids, levels 0..10), ...] of the excerpts that fit into SHOWN_TOKENS, but at least one.

    Level 10 is the largest activation among them.
    """
    shown, count = [], 0
    for tokens, acts in zip(excerpts.tokens, excerpts.acts):
        ids = np.asarray(tokens[1:])
        real = ids >= 0  # the rest is padding
        count += real.sum()
        if shown and count > SHOWN_TOKENS:
            break
        shown.append((ids[real], np.asarray(acts, np.float64)[real]))
    top = max((acts.max(initial=0) for _, acts in shown), default=0)
    return [(ids.tolist(), metrics.quantise(acts, top).tolist()) for ids, acts in shown]


def from_tokens(excerpts, decode):
    """An explanation without a model: the tokens with the highest mean level in the excerpts."""
    levels = {}
    for ids, row in shown_levels(excerpts):
        for id, level in zip(ids, row):
            levels.setdefault(id, []).append(level)

    def by_mean(id):
        return -np.mean(levels[id]), id

    best = sorted(levels, key=by_mean)[:NAMED]
    named = [prompt_files.json_string(decode([id])) for id in best if sum(levels[id])]
    return f"the tokens {', '.join(named)}" if named else "nothing"


def query(excerpts, decode, style):
    """The question that asks for an explanation of excerpts."""
    lines = []
    for ids, levels in shown_levels(excerpts):
        pairs = [[decode([id]), level] for id, level in zip(ids, levels) if level]
        text = prompt_files.json_string(decode(ids))
        lines.append(f"{text} {json.dumps(pairs, ensure_ascii=False)}")
    prompt = prompt_files.fill("explain", style, texts="\n".join(lines))
    return {"ask": "text", "most": ANSWER_TOKENS, **prompt}


def explain(model, excerpts, decode):
    """An explanation of excerpts by a LanguageModel, or without one if model is None.

    Raises NoAnswer.
    """
    if model is None:
        return from_tokens(excerpts, decode)
    text = model.ask(query(excerpts, decode, model.style))["text"]
    return " ".join(text.split())[:CHARACTERS]
