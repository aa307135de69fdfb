"""Figures of neuron scores show what the results say: the drawn lines are read back."""

import random

import pytest
from figure_texts import clashes
from matplotlib.container import BarContainer, ErrorbarContainer

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


def bars_of(axes):
    """{label: [(site's place, height) of each bar]}."""
    found = {}
    for container in axes.containers:
        if isinstance(container, BarContainer):
            (bar,) = container
            place = round(bar.get_x() + bar.get_width() / 2)
            found.setdefault(container.get_label(), []).append((place, bar.get_height()))
    return found


def test_scores_by_layer_draws_means_intervals_and_controls(figure_objects):
    summaries = {"crate": made_up_summary(0.3, 0.2, 0.1), "gpt2": made_up_summary(0.4, None, 0.2)}
    figure = figures.scores_by_layer(summaries, None)
    left, right = figure.axes
    control = "control: another neuron's table"
    assert set(bars_of(left)) == {"two tokens", control, "control: untrained model"}
    assert bars_of(left)["two tokens"] == [(0, 0.3), (1, 0.2), (2, 0.1)]
    assert bars_of(right)["two tokens"] == [(0, 0.4), (2, 0.2)]  # a gap, not a 0
    whiskers = next(c for c in left.containers if isinstance(c, ErrorbarContainer))
    segments = whiskers[2][0].get_segments()
    assert segments[0][:, 1] == pytest.approx([0.29, 0.32])
    assert [text.get_text() for text in left.get_xticklabels()] == ["L0", "L1", "L2"]
    assert {"0.30", "0.20", "0.10", "0.01", "0.05"} == {text.get_text() for text in left.texts}
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(named) == len(set(named)) == 3 and not clashes(figure)


def test_scores_that_are_equal_are_all_visible(figure_objects):
    summary = made_up_summary(0.9)
    summary["sites"]["L0"] |= {"token_r": statistic(0.9), "label_r@10": statistic(0.9)}
    (axes,) = figures.scores_by_layer({"crate": summary}, None).axes
    spans = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches)
    assert len(spans) == 5
    for (_, end), (start, _) in zip(spans, spans[1:]):
        assert start == pytest.approx(end)


def test_autoencoders_stand_beside_the_codes_and_many_sites_can_still_be_read(figure_objects):
    summary = made_up_summary(*[0.3] * 12)
    summary["sites"]["L11.sae-topk"] = {"ngram_r": statistic(0.5)}
    figure = figures.scores_by_layer({"crate": summary}, None)
    assert bars_of(figure.axes[0])["two tokens"][-1] == (12, 0.5)
    assert not clashes(figure)


def test_densities_of_all_models_are_drawn_over_the_same_range(figure_objects):
    one, other = made_up_neurons(), made_up_neurons()
    for neuron in other:
        neuron["density"] = max(0.2, neuron["density"])
    figure = figures.score_against_density({"one": one, "other": other}, None)
    ranges = {axes.get_xlim() for axes in figure.axes}
    lowest = min(neuron["density"] for neuron in one)
    assert ranges == {(lowest / 2, 1.2)} and not clashes(figure)


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
