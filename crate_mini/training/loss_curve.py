"""Figures from result files, and nothing else: a picture can be drawn again without a model."""

import csv
import statistics
from pathlib import Path

from crate_mini import atomic_write


def _read(path):
    """Of a log.csv: (million tokens, loss) of every row, (million tokens, val_loss) where there is one."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return (
        [(int(r["tokens"]) / 1e6, float(r["loss"])) for r in rows],
        [(int(r["tokens"]) / 1e6, float(r["val_loss"])) for r in rows if r["val_loss"]],
    )


def loss_curve(path, title):
    """Draw loss.png beside a log.csv of train.py and return its path: training loss, its mean, validation."""
    (tokens, loss), held = zip(*_read(path)[0]), _read(path)[1]
    half = len(loss) // 40  # of a centred window: 5 % of the run
    smooth = [statistics.mean(loss[max(0, i - half) : i + half + 1]) for i in range(len(loss))]
    figure, axes = _axes(title)
    axes.plot(tokens, loss, color="#9fb8d8", linewidth=0.8, label="training, single steps")
    axes.plot(
        tokens, smooth, color="#1f4e8c", linewidth=1.6, label="training, mean over 5 % of the run"
    )
    if held:
        label = f"validation, last {held[-1][1]:.3f}"
        axes.plot(*zip(*held), "o-", color="#d1495b", markersize=4, label=label)
    return _write(figure, axes, Path(path).with_name("loss.png"))


def loss_curves(logs, target):
    """Draw the validation curves of several models, one line a seed; logs {name: [paths of log.csv]}."""
    figure, axes = _axes("validation loss, one line per seed")
    for (name, paths), color in zip(logs.items(), ("#1f4e8c", "#2a9d6f", "#d1495b")):
        for i, path in enumerate(paths):
            axes.plot(
                *zip(*_read(path)[1]),
                "o-",
                color=color,
                markersize=3,
                linewidth=1.2,
                alpha=0.8,
                label=name if i == 0 else None,
            )
    return _write(figure, axes, target)


def _axes(title):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    axes.set_title(title, parse_math=False)
    axes.set(xlabel="million tokens", ylabel="loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _write(figure, axes, target):
    import matplotlib.pyplot as plt

    axes.legend(frameon=False)
    with atomic_write(target) as file:
        figure.savefig(file, format="png", dpi=150)
    plt.close(figure)
    return target
