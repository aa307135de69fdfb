"""The part of `interpret.py selftest` that is about scores beyond the token.

Every property has a planted neuron, which must be the one that is chosen for it. Neurons that
mislead scores by token must score what they deserve: a random number for each token nothing, a
neuron of one word in quotes much.
"""

import numpy as np

from crate_mini.data.batches import open_corpus
from crate_mini.data.tokenizer import load_tokenizer
from crate_mini.neurons import beyond_token, planted_states, text_states
from crate_mini.neurons.documents import FitScoreSplit
from crate_mini.neurons.feature_sets import Features
from crate_mini.neurons.record import Site

DOCUMENTS = 120
FOUND = 0.7  # r that the planted neuron of a property must reach: it has noise of its own
HIGH = 0.4  # r that a neuron which follows the text must reach
CHANCE = 0.1  # |r| that a neuron which does not must stay below


def solve(folder, seed=0, log=print):
    """{"properties": {name: {...}}, "neurons": {name: {...}}} of planted neurons, JSON-able.

    Raises UserError if the folder cannot be written.
    """
    source = folder / "states.jsonl"
    planted_states.write_texts(source, DOCUMENTS, seed)
    tokenizer = load_tokenizer("pydocs")
    corpus = open_corpus(str(source), tokenizer, folder / "cache", 1.0, log=log)
    model = planted_states.PlantedStates(tokenizer)
    T, limit = model.config.block_size, corpus.n_tokens["val"]
    documents = FitScoreSplit(corpus, "val", tokenizer.eot, T, seed, limit)
    states = text_states.TextStates(tokenizer.token_bytes)
    texts = beyond_token.read_texts(documents, states)
    properties = beyond_token.Properties(texts)
    codes = beyond_token.read_codes(model, texts, [Site("L0", 0, model.config.n_code)])["L0"]
    correlations = beyond_token.correlate(texts, properties, Features(codes))
    return {
        "list": text_states.VERSION,
        "properties": _properties(properties, correlations),
        "neurons": _misleading(properties, correlations),
    }


def _properties(properties, correlations):
    """{property: {"r", "passes"}}: is its planted neuron as good as the one that is chosen?"""
    fit, score = correlations.r["fit"], correlations.r["score"]
    chosen = beyond_token.best_features(fit)
    judged = {}
    for name in text_states.NAMES:
        judged[name] = {"r": None, "passes": False}  # unless the texts hold it
    for column, number in enumerate(properties.numbers.tolist()):
        r, best = score[number, column], score[chosen[column], column]
        passes = bool(r > FOUND and best > r - 0.02)
        judged[text_states.NAMES[number]] = {"r": round(float(r), 4), "passes": passes}
    return judged


def _misleading(properties, correlations):
    """{neuron: {"property", "r", "expected", "passes"}} of the misleading neurons."""
    best, own = beyond_token.neuron_scores(correlations)
    judged = {}
    for i, (name, expected) in enumerate(planted_states.MISLEADING.items()):
        j = len(text_states.NAMES) + i
        r = own[j] if np.isfinite(own[j]) else None
        property = text_states.NAMES[properties.numbers[best[j]]] if r is not None else None
        if expected:
            passes = r is not None and r > HIGH and property in expected
        else:
            passes = r is None or abs(r) < CHANCE
        judged[name] = {
            "property": property,
            "r": None if r is None else round(float(r), 4),
            "expected": list(expected),
            "passes": bool(passes),
        }
    return judged


def table(outcome):
    """The result of `solve` as text."""
    judged = outcome["properties"]
    passed = [name for name, result in judged.items() if result["passes"]]
    least = min((result["r"] or 0.0) for result in judged.values())
    lines = [
        f"beyond the token: {len(passed)} of {len(judged)} planted neurons of a property of the "
        f"text are found; least r {least:.2f}",
    ]
    lines += [f"  missed: {name}" for name in judged if name not in passed]
    for name, result in outcome["neurons"].items():
        r = "none" if result["r"] is None else f"{result['r']:.2f}"
        verdict = "ok" if result["passes"] else "--"
        found = f"  {result['property']}" if result["expected"] and result["property"] else ""
        lines.append(f"  {name:32}{r:>5}  {verdict}{found}")
    return "\n".join(lines)
