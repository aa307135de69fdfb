"""Neurons in Neuronpedia's shape."""

import json

import pytest
from neuron_results import PLAIN, write_results

from crate_mini.console.results import write_rows
from crate_mini.neurons import neuronpedia, score_files
from crate_mini.neurons.protocols import flat_scores


def test_features_have_the_shape_and_the_numbers(tmp_path):
    scores, excerpts = write_results(tmp_path)
    scores[0]["effect"] = {"raised": [[4, 1.5], [5, 1.25]], "lowered": [[6, -2.0]], "clamp": 8.0}
    write_rows(tmp_path / "scores.jsonl", scores)
    content = neuronpedia.export(score_files.read(tmp_path), PLAIN.__getitem__, "tiny")
    features = [json.loads(line) for line in content.splitlines()]
    for index, feature in enumerate(features[:2]):
        source = [feature[name] for name in ("modelId", "layer", "index")]
        assert source == ["tiny", "0-codes", str(index)]
    for feature, score, shown in zip(features, scores, excerpts, strict=True):
        assert feature["frac_nonzero"] == score["density"]
        assert feature["maxActApprox"] == score["max"]
        assert len(feature["freq_hist_data_bar_heights"]) == 50
        middles = [(2 * i + 1) / 100 * score["max"] for i in range(50)]
        assert feature["freq_hist_data_bar_values"] == pytest.approx(middles)
        count = sum(len(shown[group]) for group in ("top", "intervals", "random"))
        assert len(feature["activations"]) == count
        for activation in feature["activations"]:
            assert len(activation["tokens"]) == len(activation["values"])
            peak = activation["values"][activation["maxValueTokenIndex"]]
            assert peak == activation["maxValue"]
        for side in ("pos", "neg"):
            assert len(feature[f"{side}_str"]) == len(feature[f"{side}_values"])
    first = features[0]
    assert first["pos_str"] == [" w4", " w5"]
    assert first["neg_values"] == [-2.0]
    exported = {}
    for score in first["explanations"][0]["scores"]:
        exported[score["explanationScoreTypeName"]] = score["value"]
    known = flat_scores(scores[0]["scores"])
    assert exported == {name: value for name, value in known.items() if value is not None}
