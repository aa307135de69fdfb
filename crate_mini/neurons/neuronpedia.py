"""Neurons in Neuronpedia's public JSON shape, for tools that read it: one feature a line.

Each line is shaped as its API answers for a feature (GET /api/feature/MODEL/SOURCE/INDEX), names as in the
public schema (models Neuron, Activation, Explanation, ExplanationScore). Filled: modelId, layer (the source,
"LAYER-codes" or "LAYER-NAME" of an autoencoder), index, sourceSetName, maxActApprox, frac_nonzero,
freq_hist_data_bar_heights and _values (counts of positive values and middles of their bins: equally many),
pos_str, pos_values, neg_str, neg_values (a neuron's causal effect, changes of log-probability; theirs are
products of weights), activations, and the label as an explanation with its scores. The schema's other lists
are there and empty; fields not named are left to its defaults.
"""

import json

from crate_mini.data.tokenizer import visible
from crate_mini.neurons.page import label_text, read

EMPTY = (
    "vector",
    "topkCosSimIndices",
    "topkCosSimValues",
    "neuron_alignment_indices",
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "correlated_neurons_indices",
    "correlated_neurons_pearson",
    "correlated_neurons_l1",
    "correlated_features_indices",
    "correlated_features_pearson",
    "correlated_features_l1",
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "decoder_weights_dist",
)
SIGNS = (("pos", "raised"), ("neg", "lowered"))


def export(folder, token, model):
    """The lines of a result folder's neurons as bytes; token: id to bytes; model: what to call it there."""
    return "".join(
        json.dumps(_feature(n, token, model), allow_nan=False) + "\n" for n in read(folder)[2]
    ).encode()


def _feature(n, token, model):
    """One neuron."""

    def text(i):
        return token(i).decode("utf-8", "backslashreplace")

    kind = "codes" if "." not in n["site"] else n["site"].split(".", 1)[1]
    where = {"modelId": model, "layer": f"{n['layer']}-{kind}", "index": str(n["neuron"])}
    effect, hist = n.get("effect") or {}, n.get("hist") or []
    edges = n.get("hist_edges") or [k / max(1, len(hist)) for k in range(len(hist) + 1)]
    label = n.get("label") or {}
    words = label_text(label, lambda i: visible(token(i)))
    scores = [
        {"explanationScoreTypeName": name, "value": value}
        for name, value in n["scores"].items()
        if value is not None
    ]
    return {
        **where,
        "sourceSetName": kind,
        "maxActApprox": n["max"],
        "frac_nonzero": n["density"],
        "hasVector": False,
        **{name: [] for name in EMPTY},
        **{f"{sign}_str": [text(t) for t, _ in effect.get(key, [])] for sign, key in SIGNS},
        **{f"{sign}_values": [v for _, v in effect.get(key, [])] for sign, key in SIGNS},
        "freq_hist_data_bar_heights": hist,
        "freq_hist_data_bar_values": [(a + b) / 2 * n["max"] for a, b in zip(edges, edges[1:])],
        "activations": [
            _activation(e, text, where)
            for group in ("top", "intervals", "random")
            for e in n.get(group) or []
        ],
        "explanations": [
            {
                **where,
                "description": words,
                "typeName": "crate_mini-label",
                "explanationModelName": None,
                "scores": scores,
            }
        ]
        if words
        else [],
    }


def _activation(e, text, where):
    """One excerpt; a place before the text's beginning (id -1) is left out."""
    kept = [(text(t), v, k) for k, (t, v) in enumerate(zip(e["tokens"], e["acts"])) if t >= 0]
    tokens, values, places = zip(*kept)
    peak = max(range(len(values)), key=values.__getitem__)
    return {
        **where,
        "tokens": tokens,
        "values": values,
        "maxValue": values[peak],
        "minValue": min(values),
        "maxValueTokenIndex": peak,
        "dataIndex": str(e["doc"]),
        "qualifyingTokenIndex": places.index(e["at"]) if e["at"] in places else peak,
    }
