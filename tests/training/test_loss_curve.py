"""Loss curves, drawn from log.csv alone."""

import pytest
from refusals import refused

from crate_mini.training import loss_curve as loss_curve_module
from crate_mini.training.loss_curve import loss_curve, read_log, smooth, validation_curves

LOG = "step,tokens,loss,val_loss\n1,1000000,5.0,\n2,2000000,4.0,4.5\n3,3000000,3.0,\n"


def test_a_log_gives_two_curves(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(LOG)
    training, validation = read_log(path)
    assert training == [(1.0, 5.0), (2.0, 4.0), (3.0, 3.0)] and validation == [(2.0, 4.5)]
    assert loss_curve(path, "a $title").read_bytes().startswith(b"\x89PNG")
    target = tmp_path / "curves.png"
    curves = {"CRATE": [[(1e6, 5.0), (2e6, 4.0)], [(1e6, 5.0), (2e6, 4.2)]]}
    assert validation_curves(curves, target) == target and target.exists()


@pytest.fixture
def drawn(monkeypatch):
    """Figures as objects instead of files."""
    monkeypatch.setattr(loss_curve_module, "write", lambda figure, target: figure)


def test_the_curves_of_a_run_are_named_at_their_ends(tmp_path, drawn):
    path = tmp_path / "log.csv"
    path.write_text(LOG)
    (axes,) = loss_curve(path, "title", trigram=3.75).axes
    assert [text.get_text() for text in axes.texts] == [
        "3.00 training,\nmean over 5 % of the run",
        "3.75 trigram, same tokens",
        "4.50 validation",
    ]
    assert list(axes.lines[-1].get_ydata()) == [3.75, 3.75] and axes.get_legend() is None
    (axes,) = loss_curve(path, "title").axes
    assert len(axes.lines) == 3 and len(axes.texts) == 2


def test_validation_curves_are_named_with_the_mean_of_their_seeds(drawn):
    curves = {"CRATE": [[(1e6, 5.0), (2e6, 4.0)], [(1e6, 5.0), (2e6, 4.2)]], "twin": [[(2e6, 4.1)]]}
    (axes,) = validation_curves(curves, None, 4.5).axes
    texts = [text.get_text() for text in axes.texts]
    assert sorted(texts) == ["4.10 CRATE", "4.10 twin", "4.50 trigram, same tokens"]
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not boxes[0].overlaps(boxes[1])


def test_smoothing_keeps_short_runs_and_averages_long_ones():
    assert smooth([3.0, 1.0]) == [3.0, 1.0]
    assert smooth([1.0, 3.0] * 40)[40] == 1.8  # two on each side and itself


@pytest.mark.parametrize(
    "content",
    [
        b"",
        LOG.encode()[:30],
        LOG.replace("5.0", "5..0").encode(),
        LOG.replace("tokens", "tok").encode(),
        LOG.encode() + b"\xff\0",
        LOG.encode() + b"4\n",
        LOG.encode() + b"4," + b"9" * 400 + b",1.0,1.0,0.1,1,\n",
    ],
)
def test_a_damaged_log_is_one_sentence(content, tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes(content)
    refused("damaged or holds no rows", loss_curve, path, "title")
    path.unlink()
    refused("cannot be read: No such file", loss_curve, path, "title")


def test_a_title_may_name_a_file_in_any_encoding(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(LOG)
    assert loss_curve(path, "crate 1L on caf\udce9 $x_$.txt").exists()
