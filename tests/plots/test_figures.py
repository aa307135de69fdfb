"""Figures show what the results say: the drawn lines are read back."""

import random

import pytest

from crate_mini.plots import figure as figures


@pytest.fixture
def drawn(monkeypatch):
    """Figures as objects instead of files."""
    monkeypatch.setattr(figures, "write", lambda figure, target: figure)


def stat(mean, half=0.01):
    return {"n": 9, "mean": mean, "ci95": None if mean is None else [mean - half, mean + 2 * half]}


def summary(*means):
    return {
        "sites": {
            f"L{i}": {
                "n": {},
                "density": {"L0": 10.0 + i},
                "ngram_r": stat(m),
                "null_r": stat(0.01),
                "init_r": stat(0.05),
                "label_r@10": stat(None),
            }
            for i, m in enumerate(means)
        }
    }


def rows(n=50, seed=0):
    r = random.Random(seed)
    return [
        {
            "site": "L0",
            "layer": 0,
            "neuron": i,
            "status": "live",
            "density": 10 ** r.uniform(-4, 0),
            "scores": {"uniform": {"ngram_r": i / n, "null_r": 0.0}, "openai_tar[ngram]": 0.5},
        }
        for i in range(n)
    ]


def test_scores_by_layer_draws_means_intervals_and_controls(drawn):
    figure = figures.scores_by_layer(
        {"crate": summary(0.3, 0.2, 0.1), "gpt2": summary(0.4, None, 0.2)}, None
    )
    left, right = figure.axes
    bars = {c.get_label(): c for c in left.containers}
    assert set(bars) == {"two tokens", "null: another neuron's table", "the model untrained"}
    line, _, (segments,) = bars["two tokens"]
    assert line.get_ydata().tolist() == [0.3, 0.2, 0.1]
    assert segments.get_segments()[0][:, 1] == pytest.approx([0.29, 0.32])
    assert [round(x) for x in right.containers[0][0].get_xdata()] == [0, 2]  # a gap, not a 0
    assert [t.get_text() for t in left.get_xticklabels()] == ["L0", "L1", "L2"]


def test_autoencoders_are_not_joined_to_codes(drawn):
    found = summary(0.3, 0.2)
    found["sites"]["L1.sae-topk"] = {"ngram_r": stat(0.5)}
    (axes,) = figures.scores_by_layer({"crate": found}, None).axes
    lines = [c[0].get_ydata().tolist() for c in axes.containers if c.get_label() == "two tokens"]
    assert lines == [[0.3, 0.2], [0.5]]


def test_score_against_density_draws_every_scored_neuron_and_counts_the_rest(drawn):
    neurons = rows()
    neurons[3].update(
        status="dead", density=0.0, scores={"uniform": {"ngram_r": None, "null_r": None}}
    )
    neurons[4]["scores"]["uniform"]["ngram_r"] = None
    (axes,) = figures.score_against_density({"crate": neurons}, None).axes
    dots = next(line for line in axes.lines if line.get_linestyle() == "None")
    assert sorted(dots.get_ydata()) == [i / 50 for i in range(50) if i not in (3, 4)]
    assert (
        axes.get_title() == "crate: 48 neurons, 1 dead, 1 without score"
        and axes.get_xscale() == "log"
    )
    medians = {line.get_label(): line for line in axes.lines}["two tokens, median"]
    assert len(medians.get_xdata()) == 10
    (axes,) = figures.score_against_density({"crate": neurons}, None, "openai_tar[ngram]").axes
    assert axes.get_title() == "crate: 49 neurons, 1 dead, 0 without score"


@pytest.mark.parametrize(
    "neurons", [[], rows(1), [{**rows(1)[0], "status": "dead", "density": 0.0}]]
)
def test_few_neurons_or_none_can_be_drawn(neurons, tmp_path):
    target = figures.score_against_density({"crate": neurons}, tmp_path / "few.png")
    assert target.read_bytes().startswith(b"\x89PNG")


def test_l0_by_layer_draws_every_curve(drawn):
    curves = {
        "crate": [{"mean": 40.0, "std": 3.0}, {"mean": 30.0, "std": 2.0}],
        "crate untrained": [{"mean": 50.0}, {"mean": 50.0}],
    }
    (axes,) = figures.l0_by_layer(curves, None).axes
    assert {line.get_label(): list(line.get_ydata()) for line in axes.lines} == {
        name: [n["mean"] for n in curve] for name, curve in curves.items()
    }
    assert axes.lines[1].get_color() == figures.GREY != axes.lines[0].get_color()


def test_files_are_pngs_and_replace_what_was_there(tmp_path):
    target = tmp_path / "scores.png"
    target.write_bytes(b"old")
    assert figures.scores_by_layer({"crate": summary(0.1)}, target) == target
    assert target.read_bytes().startswith(b"\x89PNG") and list(tmp_path.iterdir()) == [target]
