"""Figures of neuron scores show what the results say: the drawn lines are read back."""

import random

import pytest

from crate_mini.neurons import figures


@pytest.fixture
def figure_objects(monkeypatch):
    """Figures as objects instead of files."""

    def keep(figure, target):
        return figure

    monkeypatch.setattr(figures, "write", keep)


def statistic(mean, half=0.01):
    """A metric of a site; its interval reaches farther up than down."""
    interval = None if mean is None else [mean - half, mean + 2 * half]
    return {"n": 9, "mean": mean, "ci95": interval}


def made_up_summary(*means):
    """summary.json with a site for each mean of ngram_r."""
    sites = {}
    for layer, mean in enumerate(means):
        sites[f"L{layer}"] = {
            "n": {},
            "density": {"L0": 10.0 + layer},
            "ngram_r": statistic(mean),
            "null_r": statistic(0.01),
            "init_r": statistic(0.05),
            "label_r@10": statistic(None),
        }
    return {"sites": sites}


def made_up_neurons(n=50):
    """Lines of scores.jsonl; neuron i has ngram_r i/n."""
    draw = random.Random(0)
    neurons = []
    for i in range(n):
        scores = {"uniform": {"ngram_r": i / n, "null_r": 0.0}, "openai_tar[ngram]": 0.5}
        facts = {"site": "L0", "layer": 0, "neuron": i, "status": "live"}
        neurons.append({**facts, "density": 10 ** draw.uniform(-4, 0), "scores": scores})
    return neurons


def test_scores_by_layer_draws_means_intervals_and_controls(figure_objects):
    summaries = {"crate": made_up_summary(0.3, 0.2, 0.1), "gpt2": made_up_summary(0.4, None, 0.2)}
    left, right = figures.scores_by_layer(summaries, None).axes
    bars = {container.get_label(): container for container in left.containers}
    assert set(bars) == {"two tokens", "null: another neuron's table", "untrained model"}
    line, _, (segments,) = bars["two tokens"]
    assert line.get_ydata().tolist() == [0.3, 0.2, 0.1]
    assert segments.get_segments()[0][:, 1] == pytest.approx([0.29, 0.32])
    places = right.containers[0][0].get_xdata()
    assert [round(place) for place in places] == [0, 2]  # a gap, not a 0
    assert [text.get_text() for text in left.get_xticklabels()] == ["L0", "L1", "L2"]


def test_autoencoders_are_not_joined_to_codes(figure_objects):
    summary = made_up_summary(0.3, 0.2)
    summary["sites"]["L1.sae-topk"] = {"ngram_r": statistic(0.5)}
    (axes,) = figures.scores_by_layer({"crate": summary}, None).axes
    lines = []
    for container in axes.containers:
        if container.get_label() == "two tokens":
            lines.append(container[0].get_ydata().tolist())
    assert lines == [[0.3, 0.2], [0.5]]


def test_score_against_density_draws_scored_neurons_and_counts_the_rest(figure_objects):
    neurons = made_up_neurons()
    neurons[3] |= {"status": "dead", "density": 0.0}
    neurons[3]["scores"] = {"uniform": {"ngram_r": None, "null_r": None}}
    neurons[4]["scores"]["uniform"]["ngram_r"] = None
    (axes,) = figures.score_against_density({"crate": neurons}, None).axes
    dots = next(line for line in axes.lines if line.get_linestyle() == "None")
    assert sorted(dots.get_ydata()) == [i / 50 for i in range(50) if i not in (3, 4)]
    assert axes.get_title() == "crate: 48 neurons, 1 dead, 1 without a score"
    assert axes.get_xscale() == "log"
    medians = {line.get_label(): line for line in axes.lines}["two tokens, median"]
    assert len(medians.get_xdata()) == 10
    (axes,) = figures.score_against_density({"crate": neurons}, None, "openai_tar[ngram]").axes
    assert axes.get_title() == "crate: 49 neurons, 1 dead, 0 without a score"


@pytest.mark.parametrize("live, dead", [(0, 0), (1, 0), (0, 1)])
def test_few_neurons_or_none_can_be_drawn(live, dead, tmp_path):
    neurons = made_up_neurons(live + dead)
    for neuron in neurons[live:]:
        neuron |= {"status": "dead", "density": 0.0}
    target = figures.score_against_density({"crate": neurons}, tmp_path / "few.png")
    assert target.read_bytes().startswith(b"\x89PNG")


def test_files_are_pngs_and_replace_what_was_there(tmp_path):
    target = tmp_path / "scores.png"
    target.write_bytes(b"old")
    assert figures.scores_by_layer({"crate": made_up_summary(0.1)}, target) == target
    assert target.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [target]
