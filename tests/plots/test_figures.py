"""The helpers that every figure is made with."""

import sys

import pytest

from crate_mini import UserError
from crate_mini.plots.figure import grid, shared_legend, write


def test_a_grid_has_the_panels_asked_for_and_no_others():
    figure, panels = grid(5, 3, (2, 1))
    assert len(panels) == 5 and figure.axes == panels
    assert figure.get_size_inches().tolist() == [6, 2]


def test_the_shared_legend_names_each_line_once():
    figure, panels = grid(2, 2, (4, 3))
    for axes in panels:
        axes.plot([0, 1], label="trained")
    panels[1].plot([1, 0], label="untrained")
    shared_legend(figure, panels)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["trained", "untrained"]


def test_files_are_pngs_and_replace_what_was_there(tmp_path):
    target = tmp_path / "figure.png"
    target.write_bytes(b"old")
    figure, _ = grid(1, 1, (2, 2))
    assert write(figure, target) == target
    assert target.read_bytes().startswith(b"\x89PNG") and list(tmp_path.iterdir()) == [target]
    with pytest.raises(UserError, match="Cannot write"):
        write(figure, target / "below-a-file.png")


def test_drawing_leaves_the_backend_of_a_notebook_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it fails
    import matplotlib

    monkeypatch.setattr(matplotlib, "use", pytest.fail)
    figure, (axes,) = grid(1, 1, (2, 2))
    axes.plot([0, 1])
    write(figure, tmp_path / "figure.png")
