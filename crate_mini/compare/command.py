"""The command `python -m crate_mini.compare`: a table of settings and results, and a figure."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from crate_mini import UserError
from crate_mini.cli import setting
from crate_mini.console.terminal import Command, aligned
from crate_mini.model import LM, Config
from crate_mini.plots.figure import SERIES, grid, label_ends, write
from crate_mini.training import checkpoint
from crate_mini.training.loss_curve import read_log, smooth
from crate_mini.training.settings import Settings as Training

# Settings that do not change what is computed, or follow from others.
IGNORED = {"out", "overwrite", "save_every", "keep_every", "log", "log_every", "micro_batch"}
WIDEST = 28  # characters of a cell


@dataclass
class Settings:
    """Compare training runs: settings that differ, results, and losses over one another."""

    runs: tuple[str, ...] = setting((), "folders of runs, like out/crate-3L out/gpt2-3L")
    out: str = setting("compare.png", "file of the figure")


@dataclass
class Run:
    """A run's folder: the settings and facts of its last checkpoint, and the curves of its log."""

    name: str
    settings: dict
    results: dict
    training: list  # (million tokens, loss)
    validation: list


def run(settings):
    """Print both tables and draw the figure. Raises UserError for fewer than two runs."""
    paths = [run_folder(Path(path)) for path in settings.runs]
    if len(paths) < 2 or len({path.resolve() for path in paths}) < len(paths):
        raise UserError(
            "a comparison needs two different runs or more, like `python -m crate_mini.compare "
            "out/crate-3L out/gpt2-3L`."
        )
    runs = [read_run(path, name) for path, name in zip(paths, names(paths))]
    differing = differences(runs)
    heads = [["setting", *(run.name for run in runs)]]
    same = "no setting that matters differs"
    print(aligned(heads + differing) if differing else same)
    print(f"\n{aligned(table_of_results(runs))}")
    if not one_text(runs):
        print("\nnote      they were validated on different texts, so only bits per byte compare")
    print(f"\nfiles     {draw(runs, Path(settings.out))}")


def names(paths):
    """The shortest ends of the paths that tell them apart, like a and b, or x/run and y/run."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(part[-length:]) for part in parts]
        if len(set(ends)) == len(ends):
            return ends
    return [str(path) for path in paths]


def run_folder(path):
    """The folder of a run, of which `path` may be a checkpoint."""
    is_checkpoint = path.name in ("last", "best") and (path / "config.json").exists()
    return path.parent if is_checkpoint else path


def read_run(path, name):
    """The Run in a folder. Raises UserError if it cannot be read."""
    if not (path / "last" / "config.json").exists():
        raise UserError(
            f"{path} holds no run; give the folder of one, like out/crate-3L, with `last` and "
            "log.csv in it."
        )
    meta = checkpoint.read_meta(path / "last")
    training = meta["training"]
    own = {f.name: f.default for f in fields(Training)} | training.get("settings", {})
    config = asdict(Config(**meta["config"]))
    settings = {name: value for name, value in {**own, **config}.items() if name not in IGNORED}
    curves = read_log(path / "log.csv")
    results = {
        "step": training.get("step"),
        "validation loss": training.get("val_loss", last(curves[1])),
        "best validation loss": training.get("best_val_loss"),
        "bits per byte": training.get("bits_per_byte"),
        "parameters": n_params(meta["config"]),
        "text": (training.get("corpus") or {}).get("text_sha256"),
    }
    return Run(name, settings, results, *curves)


def last(curve):
    return curve[-1][1] if curve else None


def n_params(config):
    """Parameters by the paper's rule: positions excluded, the tied head counted once."""
    with torch.device("meta"):
        return LM(Config(**config)).n_params()


# ---- tables --------------------------------------------------------------------------------------


def differences(runs):
    """[[setting, its value in each run]] where these are not all equal."""
    known = dict.fromkeys(name for run in runs for name in run.settings)
    rows = []
    for name in known:
        values = [run.settings.get(name) for run in runs]
        if any(value != values[0] for value in values):
            rows.append([name, *map(_text, values)])
    return rows


def table_of_results(runs):
    """[[result, its value in each run]], and the difference from the first run for losses."""
    rows = [["result", *(run.name for run in runs)]]
    for name in ("step", "parameters", "validation loss", "best validation loss", "bits per byte"):
        values = [run.results[name] for run in runs]
        cells = [_text(value) for value in values]
        if isinstance(values[0], float):
            for i, value in enumerate(values[1:], 1):
                if isinstance(value, float):
                    cells[i] += f" ({value - values[0]:+.4f})"
        rows.append([name, *cells])
    return rows


def _text(value):
    if isinstance(value, bool) or value is None:
        return "none" if value is None else str(value).lower()
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) >= 0.05 else f"{value:g}"
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return text if len(text) <= WIDEST else f"…{text[1 - WIDEST :]}"


def one_text(runs):
    """Whether all runs were validated on the same text."""
    return all(run.results["text"] == runs[0].results["text"] for run in runs)


# ---- figure --------------------------------------------------------------------------------------


def draw(runs, target):
    """Training losses, smoothed, and validation losses of all runs by tokens; returns the path."""
    figure, axes = grid(2, 2, (5, 3.8), sharey=True)
    ends = []
    for i, run in enumerate(runs):
        color = SERIES[i % len(SERIES)]
        tokens, losses = zip(*run.training)
        means = smooth(losses)
        axes[0].plot(tokens, means, color=color, linewidth=1.4)
        if run.validation:
            axes[1].plot(*zip(*run.validation), "o-", color=color, markersize=3)
            last_loss = run.validation[-1][1]
            ends.append((last_loss, f"{last_loss:.3f} {run.name}", color))
        else:
            ends.append((means[-1], f"{run.name}, not validated", color))
    axes[0].set(title="training loss, mean over 5 % of the run", ylabel="loss (nats per token)")
    axes[1].set(title="validation loss; at the right the last")
    for panel in axes:
        panel.set_xlabel("million tokens")
    label_ends(axes[1], ends)
    return write(figure, target)


COMMAND = Command(Settings, run, checkpoint=False, positional=("runs",))
