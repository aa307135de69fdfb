"""Figures of the loss, drawn from log.csv alone: they can be redrawn without the model."""

import csv
import itertools
import statistics
from pathlib import Path

from crate_mini import UserError
from crate_mini.plots.figure import BLUE, GREY, LIGHT, RED, SERIES, grid, label_ends, write


def read_log(path):
    """The two curves of a log.csv, training and validation: lists of (million tokens, loss).

    Raises UserError if it cannot be read, is damaged or holds no rows.
    """
    training, validation = [], []
    try:
        with open(path, newline="", encoding="ascii") as file:
            for row in csv.DictReader(file):
                tokens = int(row["tokens"]) / 1e6
                training.append((tokens, float(row["loss"])))
                if row["val_loss"]:
                    validation.append((tokens, float(row["val_loss"])))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, OverflowError, csv.Error):
        training.clear()
    if not training:
        raise UserError(f"{path} is damaged or holds no rows; expected the log of a training run.")
    return training, validation


def loss_curve(path, title, trigram=None):
    """Draw loss.png next to the log.csv at `path`; returns the path of the figure.

    trigram: loss of trigram.trigram_loss, drawn as a line to beat.
    """
    training, validation = read_log(path)
    tokens, losses = zip(*training)
    figure, axes = _panel(title)
    axes.plot(tokens, losses, color=LIGHT, linewidth=0.8)
    means = smooth(losses)
    axes.plot(tokens, means, color=BLUE, linewidth=1.6)
    text = f"{means[-1]:.2f} training,\nmean over 5 % of the run"
    ends = [(means[-1], text, BLUE)]
    if validation:
        axes.plot(*zip(*validation), "o-", color=RED, markersize=4)
        last = validation[-1][1]
        ends.append((last, f"{last:.2f} validation", RED))
    if trigram is not None:
        ends.append(_to_beat(axes, trigram))
    label_ends(axes, ends)
    return write(figure, Path(path).with_name("loss.png"))


def _to_beat(axes, trigram):
    """A dashed line at the trigram's loss; what label_ends needs to name it."""
    axes.axhline(trigram, color=GREY, linestyle="--", linewidth=1)
    return trigram, f"{trigram:.2f} trigram, same tokens", GREY


def smooth(losses):
    """Means over a centred window of 5 % of the run, shorter at both ends."""
    half = len(losses) // 40
    means = []
    for i in range(len(losses)):
        window = losses[max(0, i - half) : i + half + 1]
        means.append(statistics.mean(window))
    return means


def validation_curves(curves, target, trigram=None):
    """Draw validation curves of several models, one line per seed; returns the path.

    curves: {name: [[(tokens, loss), ...] for each seed]}. trigram as in loss_curve.
    """
    figure, axes = _panel("validation loss, one line per seed; at the right their mean")
    style = dict(markersize=3, linewidth=1.2, alpha=0.8)
    ends = []
    for (name, seeds), color in zip(curves.items(), itertools.cycle(SERIES)):
        for curve in seeds:
            millions = [tokens / 1e6 for tokens, _ in curve]
            losses = [loss for _, loss in curve]
            axes.plot(millions, losses, "o-", color=color, **style)
        last = statistics.mean(curve[-1][1] for curve in seeds)
        ends.append((last, f"{last:.2f} {name}", color))
    if trigram is not None:
        ends.append(_to_beat(axes, trigram))
    label_ends(axes, ends)
    return write(figure, target)


def _panel(title):
    """(figure, axes) of one panel with the axes of a loss curve."""
    figure, (axes,) = grid(1, 1, (7.4, 4.2))
    axes.set_title(title)
    axes.set(xlabel="million tokens", ylabel="loss (nats per token)")
    return figure, axes
