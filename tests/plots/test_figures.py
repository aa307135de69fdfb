"""The helpers that every figure is made with."""

import itertools
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crate_mini import UserError
from crate_mini.plots.figure import SERIES, grid, ink, label_ends, shared_legend, spread, write


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


# ---- colours -------------------------------------------------------------------------------------

# What a colour-blind eye sees of linear RGB (Machado, Oliveira and Fernandes 2009, severity 1).
EYES = {
    "full colour": np.eye(3),
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
DISTINCT = 20  # CIELAB units; 2.3 can just be noticed side by side


def linear(color):
    """Linear RGB of #rrggbb."""
    values = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIELAB of linear RGB, white D65."""
    xyz = XYZ @ rgb / XYZ.sum(1)
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eye", EYES)
def test_any_two_colours_of_curves_differ_for_every_eye(eye):
    seen = [lab(np.clip(EYES[eye] @ linear(color), 0, 1)) for color in SERIES]
    for (i, one), (j, other) in itertools.combinations(enumerate(seen), 2):
        assert np.linalg.norm(one - other) > DISTINCT, (SERIES[i], SERIES[j])


@pytest.mark.parametrize("color", SERIES)
def test_text_in_the_ink_of_a_colour_can_be_read_on_white(color):
    luminance = XYZ[1] @ linear(ink(color))
    assert 1.05 / (luminance + 0.05) > 4.5  # WCAG 2, level AA


# ---- labels at the ends of curves ----------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(-50, 50), st.floats(1, 20)), max_size=12))
def test_spread_boxes_keep_their_order_never_overlap_and_stay_if_they_can(boxes):
    boxes = sorted(boxes)
    middles, heights = [box[0] for box in boxes], [box[1] for box in boxes]
    moved = spread(middles, heights)
    assert len(moved) == len(middles)
    for i in range(len(moved) - 1):
        assert moved[i + 1] - moved[i] >= (heights[i] + heights[i + 1]) / 2 - 1e-9
    assert spread(moved, [0.99 * height for height in heights]) == pytest.approx(moved)
    total = sum(new - old for new, old in zip(moved, middles))
    assert total == pytest.approx(0, abs=1e-6)  # blocks stay around what their boxes wanted


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_labels_at_the_ends_stand_apart_outside_the_panel_and_inside_the_figure(scale):
    figure, panels = grid(2, 2, (4, 3))
    ends = []
    for i, y in enumerate((1.0, 1.001, 1.002, 3.0, 3.0)):
        panels[0].plot([0, 1], [2, y])
        ends.append((y, f"{y:.2f} curve $x_{i}$", SERIES[i]))
    panels[0].set_yscale(scale)
    texts = label_ends(panels[0], ends)
    figure.draw_without_rendering()
    assert [text.get_text() for text in texts] == [text for _, text, _ in ends]
    boxes = [text.get_window_extent() for text in texts]
    panel, next_panel = (axes.get_window_extent() for axes in panels)
    for i, box in enumerate(boxes):
        assert panel.x1 < box.x0 < box.x1 < next_panel.x0
        assert not any(box.overlaps(other) for other in boxes[:i])
    heights = [boxes[i].y0 + boxes[i].height / 2 for i in (1, 3)]
    wanted = panels[0].transData.transform([(1, 1.001), (1, 3.0)])[:, 1]
    assert heights == pytest.approx(wanted, abs=boxes[0].height)


def test_a_curve_that_ends_in_nothing_is_named_at_the_bottom():
    figure, (axes,) = grid(1, 1, (4, 3))
    axes.plot([0, 1], [1, 3])
    nan, inf = float("nan"), float("inf")
    ends = [(3.0, "top", SERIES[0]), (nan, "nan", SERIES[1]), (1.5, "low", SERIES[2])]
    texts = label_ends(axes, [*ends, (inf, "inf", SERIES[3])])
    assert [text.get_text() for text in texts] == ["nan", "inf", "low", "top"]
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in texts]
    assert all(low.y1 <= high.y0 for low, high in zip(boxes, boxes[1:]))
