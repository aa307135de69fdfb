"""Figures from result files, and nothing else: a picture can be drawn again without a model."""

import csv
from pathlib import Path

from crate_mini import atomic_write


def loss_curve(path, title):
    """Draw loss.png beside a log.csv of train.py and return its path: training loss, its mean, validation."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    tokens, loss = [int(r["tokens"]) / 1e6 for r in rows], [float(r["loss"]) for r in rows]
    held = [(int(r["tokens"]) / 1e6, float(r["val_loss"])) for r in rows if r["val_loss"]]
    mean, smooth = None, []
    for value in loss:
        mean = value if mean is None else 0.9 * mean + 0.1 * value
        smooth.append(mean)
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    axes.plot(tokens, loss, color="#9fb8d8", linewidth=0.8, label="training, each logged step")
    axes.plot(tokens, smooth, color="#1f4e8c", linewidth=1.6, label="training, running mean")
    if held:
        label = f"validation, last {held[-1][1]:.3f}"
        axes.plot(*zip(*held), "o-", color="#d1495b", markersize=4, label=label)
    axes.set(title=title, xlabel="million tokens", ylabel="loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    target = Path(path).with_name("loss.png")
    with atomic_write(target) as file:
        figure.savefig(file, format="png", dpi=150)
    plt.close(figure)
    return target
