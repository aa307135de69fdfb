"""Loss curves, drawn from log.csv alone."""

import pytest
from refusals import refused

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
