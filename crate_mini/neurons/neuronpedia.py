"""Neurons in Neuronpedia's public JSON shape, for tools that read it: one feature a line.

A line looks like the answer of its API for a feature (GET /api/feature/MODEL/SOURCE/INDEX), with
the names of the public schema (models Neuron, Activation, Explanation, ExplanationScore). Filled:

    modelId, layer, index, sourceSetName         layer is the source, "0-codes" or "0-AUTOENCODER"
    maxActApprox, frac_nonzero                   observed maximum, density
    freq_hist_data_bar_heights, _values          counts of positive values, middles of their bins
    pos_str, pos_values, neg_str, neg_values     tokens whose log-probability the neuron changes, a
                                                 causal effect; Neuronpedia multiplies weights
    activations                                  excerpts
    explanations                                 the label, with its scores

All other lists of the schema are empty; fields not named here keep its defaults.
"""

import json

from crate_mini.data.tokenizer import visible
from crate_mini.neurons.labels import label_text
from crate_mini.neurons.page_data import GROUPS

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


def export(scored, token_bytes, model):
    """Scored neurons, one JSON object a line, as bytes.

    token_bytes: from an id to its bytes; model: the name to give the model.
    """
    features = [_feature(neuron, token_bytes, model) for neuron in scored.neurons]
    return "".join(json.dumps(line, allow_nan=False) + "\n" for line in features).encode()


def _feature(neuron, token_bytes, model):
    """One neuron as a feature."""

    def text(id):
        return token_bytes(id).decode("utf-8", "backslashreplace")

    _, _, autoencoder = neuron["site"].partition(".")
    kind = autoencoder or "codes"
    source = {
        "modelId": model,
        "layer": f"{neuron['layer']}-{kind}",
        "index": str(neuron["neuron"]),
    }
    effect = neuron.get("effect") or {}
    counts = neuron.get("hist") or []
    activations = []
    for group in GROUPS:
        for excerpt in neuron.get(group) or []:
            activations.append(_activation(excerpt, text, source))
    return {
        **source,
        "sourceSetName": kind,
        "maxActApprox": neuron["max"],
        "frac_nonzero": neuron["density"],
        "hasVector": False,
        **{name: [] for name in EMPTY},
        "pos_str": [text(id) for id, *_ in effect.get("raised", [])],
        "neg_str": [text(id) for id, *_ in effect.get("lowered", [])],
        "pos_values": [change for _, change, *_ in effect.get("raised", [])],
        "neg_values": [change for _, change, *_ in effect.get("lowered", [])],
        "freq_hist_data_bar_heights": counts,
        "freq_hist_data_bar_values": _bin_middles(neuron, len(counts)),
        "activations": activations,
        "explanations": _explanations(neuron, token_bytes, source),
    }


def _bin_middles(neuron, bins):
    """The activation in the middle of each of equal bins from 0 to the neuron's maximum."""
    edges = [i / max(1, bins) for i in range(bins + 1)]
    return [(left + right) / 2 * neuron["max"] for left, right in zip(edges, edges[1:])]


def _explanations(neuron, token_bytes, source):
    """The label as the only explanation, with all scores; none without a label."""

    def token_text(id):
        return visible(token_bytes(id))

    description = label_text(neuron.get("label") or {}, token_text)
    if not description:
        return []
    scores = []
    for name, value in neuron["scores"].items():
        if value is not None:
            scores.append({"explanationScoreTypeName": name, "value": value})
    explanation = {
        **source,
        "description": description,
        "typeName": "crate_mini-label",
        "explanationModelName": None,
        "scores": scores,
    }
    return [explanation]


def _activation(excerpt, text, source):
    """One excerpt; places before the beginning of the text (id -1) are left out."""
    places = [place for place, id in enumerate(excerpt["tokens"]) if id >= 0]
    tokens = [text(excerpt["tokens"][place]) for place in places]
    values = [excerpt["acts"][place] for place in places]
    largest = max(values)
    peak = values.index(largest)
    chosen = places.index(excerpt["at"]) if excerpt["at"] in places else peak
    return {
        **source,
        "tokens": tokens,
        "values": values,
        "maxValue": largest,
        "minValue": min(values),
        "maxValueTokenIndex": peak,
        "dataIndex": str(excerpt["doc"]),
        "qualifyingTokenIndex": chosen,
    }
