"""Figures of the loss, drawn from log.csv alone: they can be redrawn without the model."""

import csv
import statistics
from pathlib import Path

from crate_mini import UserError
from crate_mini.plots.figure import AMBER, BLUE, GREEN, GREY, LIGHT, RED, grid, write


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


def loss_curve(path, title):
    """Draw loss.png next to the log.csv at `path`; returns the path of the figure."""
    training, validation = read_log(path)
    tokens, losses = zip(*training)
    figure, axes = _panel(title)
    axes.plot(tokens, losses, color=LIGHT, linewidth=0.8, label="training, single steps")
    label = "training, mean over 5 % of the run"
    axes.plot(tokens, smooth(losses), color=BLUE, linewidth=1.6, label=label)
    if validation:
        label = f"validation, last {validation[-1][1]:.3f}"
        axes.plot(*zip(*validation), "o-", color=RED, markersize=4, label=label)
    axes.legend(frameon=False)
    return write(figure, Path(path).with_name("loss.png"))


def smooth(losses):
    """Means over a centred window of 5 % of the run, shorter at both ends."""
    half = len(losses) // 40
    means = []
    for i in range(len(losses)):
        window = losses[max(0, i - half) : i + half + 1]
        means.append(statistics.mean(window))
    return means


def validation_curves(curves, target):
    """Draw validation curves of several models, one line per seed; returns the path.

    curves: {name: [[(tokens, loss), ...] for each seed]}. The mean loss at the end stands next to
    each name.
    """
    figure, axes = _panel("validation loss, one line per seed")
    style = dict(markersize=3, linewidth=1.2, alpha=0.8)
    for (name, seeds), color in zip(curves.items(), (BLUE, GREEN, AMBER, RED, GREY)):
        last = statistics.mean(curve[-1][1] for curve in seeds)
        for i, curve in enumerate(seeds):
            label = f"{name}: {last:.2f}" if i == 0 else None
            millions = [tokens / 1e6 for tokens, _ in curve]
            losses = [loss for _, loss in curve]
            axes.plot(millions, losses, "o-", color=color, label=label, **style)
    axes.legend(frameon=False)
    return write(figure, target)


def _panel(title):
    """(figure, axes) of one panel with the axes of a loss curve."""
    figure, (axes,) = grid(1, 1, (6.4, 4))
    axes.set_title(title)
    axes.set(xlabel="million tokens", ylabel="loss (nats per token)")
    return figure, axes
