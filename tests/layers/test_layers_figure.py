"""Figures of the layers show the numbers of layers.json: the drawn lines are read back."""

from crate_mini.layers import figure
from crate_mini.plots.figure import GREY


def test_l0_by_layer_draws_every_curve(monkeypatch):
    monkeypatch.setattr(figure, "write", lambda drawing, target: drawing)
    curves = {
        "crate": [{"mean": 40.0, "std": 3.0}, {"mean": 30.0, "std": 2.0}],
        "crate untrained": [{"mean": 50.0}, {"mean": 50.0}],
    }
    (axes,) = figure.l0_by_layer(curves, None).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines == {"crate": [40.0, 30.0], "crate untrained": [50.0, 50.0]}
    assert {text.get_text() for text in axes.texts} == set(curves) and axes.get_legend() is None
    assert axes.lines[1].get_color() == GREY != axes.lines[0].get_color()
