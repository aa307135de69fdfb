"""The figure of autoencoders shows their numbers in the field's words, nothing over another."""

from figure_texts import clashes

from crate_mini.sae import figure


def made_up(k, width, L0, zero=0.9):
    """What the figure reads of an SAE's JSON."""
    held_out = {
        "L0": L0,
        "recovered": {"zero": zero, "mean": None},
        "explained_variance": 0.7 + L0 / 1000,
        "cosine": 0.9,
        "dead": 0.125,
    }
    return {"k": k, "width": width, "h": 128, "layer": 1, "tokens": 9999, "held_out": held_out}


def test_the_figure_shows_loss_recovered_reconstruction_and_dead_features(monkeypatch):
    monkeypatch.setattr(figure, "write", lambda drawing, target: drawing)
    saes = [made_up(8, 512, 8.0), made_up(32, 512, 32.0, 0.99), made_up(0, 1024, 41.5)]
    drawing = figure.draw(saes, None)
    titles = [axes.get_title().partition("\n")[0] for axes in drawing.axes]
    assert titles == ["Loss recovered", "Reconstruction", "Dead features"]
    loss, reconstruction, dead = drawing.axes
    assert list(loss.lines[0].get_xdata()) == [8.0, 32.0]
    assert list(loss.lines[0].get_ydata()) == [0.9, 0.99]
    assert list(reconstruction.lines[0].get_ydata()) == [0.708, 0.732]
    assert list(dead.lines[0].get_ydata()) == [12.5, 12.5] and dead.get_ylim()[0] == 0
    assert all("L0" in axes.get_xlabel() and axes.get_ylabel() for axes in drawing.axes)
    (legend,) = drawing.legends
    assert [text.get_text() for text in legend.get_texts()] == ["TopK, 4x", "ReLU + L1, 8x"]
    for axes in drawing.axes:  # the legend lies below all data
        assert legend.get_window_extent().y1 <= axes.get_window_extent().y0
    assert not clashes(drawing)


def test_one_autoencoder_can_be_drawn(tmp_path):
    target = figure.draw([made_up(8, 512, 8.0)], tmp_path / "sae.png")
    assert target.read_bytes().startswith(b"\x89PNG")
