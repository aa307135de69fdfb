"""The data of index.html: neurons as compact JSON, which page.js draws."""

import math
from collections import Counter

from crate_mini.neurons.labels import label_text

GROUPS = ("top", "intervals", "random")  # of a neuron's excerpts
DIRECTIONS = ("raised", "lowered")  # of an effect on the next token
COPIED = ("status", "density", "max", "mean", "ci95", "hist", "atoms", "together")


def pack(neurons, token_text, metrics):
    """JSON-able data of a page: each token's text once, activations as integers.

    neurons: as from score_files.read; token_text: from an id to its text. An excerpt becomes
    [place of the peak, document, 1 if held out else 0, tokens, activations, simulated or 0], tokens
    as places in "tokens", where frequent ones come first, and activations times 10**digits, exact
    to 1/10,000 of the neuron's largest. Scores are in the order of `metrics`, null where missing.
    """
    places = _token_places(neurons)
    sites = list(dict.fromkeys(neuron["site"] for neuron in neurons))
    packed = []
    for neuron in neurons:
        packed.append(_pack_neuron(neuron, places, sites, metrics, token_text))
    return {
        "sites": sites,
        "metrics": metrics,
        "tokens": [token_text(id) if id >= 0 else "" for id in places],
        "neurons": packed,
    }


def _token_places(neurons):
    """{token id: its place in the page's list}, the most frequent first; -1 stands for no token."""
    count = Counter()
    for neuron in neurons:
        for _, excerpt in _excerpts(neuron):
            count.update(excerpt["tokens"])
        label, effect = neuron.get("label") or {}, neuron.get("effect") or {}
        count.update(id for id, *_ in label.get("tokens", []))
        count.update(label.get("left", []))
        count.update(label.get("raised", []))
        for level in (effect, effect.get("far", {})):
            for direction in DIRECTIONS:
                count.update(id for id, *_ in level.get(direction, []))
    by_frequency = sorted(count, key=lambda id: (-count[id], id))
    return {id: place for place, id in enumerate(by_frequency)}


def _excerpts(neuron):
    """(group, excerpt) for all excerpts of a neuron."""
    return [(group, excerpt) for group in GROUPS for excerpt in neuron.get(group) or []]


def _pack_neuron(neuron, places, sites, metrics, token_text):
    """One neuron of `pack`; what is empty or missing is left out."""
    label = neuron.get("label") or {}
    values = []
    for _, excerpt in _excerpts(neuron):
        values += [*excerpt["acts"], *(excerpt.get("sim") or [])]
    decimals = digits(values)
    packed = {
        "site": sites.index(neuron["site"]),
        "id": neuron["neuron"],
        "digits": decimals,
        **{group: [] for group in GROUPS},
        "text": label_text(label, token_text),
        "label": {
            "tokens": _replace_ids(label.get("tokens", []), places),
            "class": label.get("class", ""),
            "left": [places[id] for id in label.get("left", [])],
            "raised": [places[id] for id in label.get("raised", [])],
        },
        "scores": [neuron["scores"].get(metric) for metric in metrics],
        **{name: neuron.get(name) for name in COPIED},
        "why": neuron.get("why") if neuron["status"] != "dead" else None,
    }
    for group, excerpt in _excerpts(neuron):
        packed[group].append(_pack_excerpt(excerpt, places, decimals))
    if neuron.get("effect"):
        packed["effect"] = _pack_effect(neuron["effect"], places)
        far = _pack_effect(neuron["effect"].get("far", {}), places)
        for direction in DIRECTIONS:  # the page shows no more of these
            far[direction] = [row[:2] for row in far[direction][:5]]
        packed["effect"]["far"] = far
    return {name: value for name, value in packed.items() if value not in (None, {}, [])}


def _pack_excerpt(excerpt, places, decimals):
    def integers(values):
        return [round(value * 10**decimals) for value in values] if values else 0

    return [
        excerpt["at"],
        excerpt["doc"],
        int(excerpt.get("part") == "score"),
        [places[id] for id in excerpt["tokens"]],
        integers(excerpt["acts"]),
        integers(excerpt.get("sim")),
    ]


def _pack_effect(effect, places):
    """An effect with places instead of token ids."""
    rows = {name: _replace_ids(effect.get(name, []), places) for name in DIRECTIONS}
    return {**effect, **rows}


def _replace_ids(rows, places):
    """Rows [id, ...] as [place, ...]."""
    return [[places[id], *rest] for id, *rest in rows]


def digits(values):
    """Decimals to write values with: all they have, up to 1/10,000 of the largest."""
    largest = max(map(abs, values), default=0)
    if not largest:
        return 0
    enough = max(0, 4 - math.floor(math.log10(largest)))
    for decimals in range(enough):
        if all(round(value, decimals) == value for value in values):
            return decimals
    return enough
