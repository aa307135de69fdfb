"""Reports of the study `models`, made from the content of results/models.json alone."""

import itertools
import statistics

from crate_mini.console.results import atomic_write
from crate_mini.plots.markdown import markdown
from crate_mini.studies import grid
from crate_mini.training.loss_curve import validation_curves

NAMES = {
    "crate": "CRATE (paper)",
    "crate-shift": "CRATE with key shift",
    "crate+": "crate+",
    "gpt2": "GPT-2 twin",
    "gpt2-shift": "twin with key shift",
}
TRIGRAM = "trigram of the same tokens (Kneser-Ney)"  # its name in models.json
LOG_HEAD = """# Log of the study of the model

Every model that was tried, with the loss expected before the run (committed in
`crate_mini/studies/grid.py` before it) and the outcome; written by
`python -m crate_mini.studies models --report`. Losses are validation losses in nats per token after
1,000 steps of 4,096 tokens unless the flags say otherwise; several seeds: their mean, and the
spread (largest minus smallest). Models marked * need `python -m crate_mini.studies.variants`.
"""


def write(content, folder):
    """Write models.png and log.md into a folder."""
    curves = {}
    for name, title in NAMES.items():
        runs = runs_of(content, name)
        if runs:
            curves[title] = [run["curve"] for run in runs]
    if curves:
        validation_curves(curves, folder / "models.png", trigram(content))
    with atomic_write(folder / "log.md") as file:
        file.write(log(content).encode())


def runs_of(content, name, text="pydocs"):
    """The runs of a row on a text, one for each seed."""
    return [r for r in content["runs"] if (r["name"], r["text"]) == (name, text)]


def trigram(content):
    """The loss of the trigram on pydocs in nats per token, or None.

    models.json has it in bits per byte; a run on the same text has its loss in both units.
    """
    bits = content.get("baselines_bits_per_byte", {}).get(TRIGRAM)
    runs = [run for run in content["runs"] if run["text"] == "pydocs"]
    if bits is None or not runs:
        return None
    return bits * runs[0]["val_loss"] / runs[0]["bits_per_byte"]


def mean(runs, key):
    """The mean of one entry of several runs."""
    return statistics.mean(run[key] for run in runs)


def spread(runs):
    """The largest loss minus the smallest, as text; empty for one seed."""
    losses = [run["val_loss"] for run in runs]
    return f"{max(losses) - min(losses):.3f}" if len(runs) > 1 else ""


def table(content):
    """The headline: losses on both texts, and what they cost, next to the baselines."""
    twin = runs_of(content, "gpt2")
    rows = []
    for name, title in NAMES.items():
        runs, wiki = runs_of(content, name), runs_of(content, name, "wiki")
        if not runs:
            continue
        rows.append(
            [
                title,
                len(runs),
                f"{mean(runs, 'val_loss'):.3f}",
                spread(runs),
                f"{mean(runs, 'bits_per_byte'):.3f}",
                f"{mean(wiki, 'val_loss'):.3f}" if wiki else "",
                f"{mean(runs, 'density'):.2f}",
                f"{runs[0]['parameters'] / 1e6:.2f} M",
                f"{runs[0]['flops_per_token'] / twin[0]['flops_per_token']:.2f}" if twin else "",
            ]
        )
    for baseline, bits in content.get("baselines_bits_per_byte", {}).items():
        rows.append([baseline, "", "", "", f"{bits:.3f}", "", "", "", ""])
    head = ["model", "seeds", "validation loss", "spread", "bits per byte", "wiki, loss"]
    return markdown([*head, "density", "parameters", "FLOPs / twin's"], rows)


def losses(content):
    """The headline in short, for the README."""
    twin = runs_of(content, "gpt2")
    rows = []
    for name, title in NAMES.items():
        runs = runs_of(content, name)
        rows.append(
            [
                title,
                f"{mean(runs, 'val_loss'):.2f}",
                f"{mean(runs, 'bits_per_byte'):.2f}",
                f"{runs[0]['parameters'] / 1e6:.2f} M",
                f"{runs[0]['flops_per_token'] / twin[0]['flops_per_token']:.2f}",
            ]
        )
    for baseline, bits in content["baselines_bits_per_byte"].items():
        rows.append([baseline, "", f"{bits:.2f}", "", ""])
    head = ["model", "validation loss", "bits per byte", "parameters", "FLOPs / twin's"]
    return markdown(head, rows)


def log(content):
    """log.md: one table for each group, and the rows that have not run."""
    parts = [LOG_HEAD]
    for group, rows in grid.GRID.items():
        parts.append(f"## {group}\n\n{group_table(content, rows)}\n")
    return "\n".join(parts)


def group_table(content, rows):
    """Expected and measured losses of a group's rows, on each text."""
    lines = []
    for row, text in itertools.chain(*(itertools.product([row], row.texts) for row in rows)):
        runs = runs_of(content, row.name, text)
        expected = "" if row.expected is None or text != "pydocs" else f"{row.expected:.2f}"
        outcome = ["not run", "", "", ""]
        if runs:
            commits = sorted({run["commit"] for run in runs})
            outcome = [f"{mean(runs, 'val_loss'):.3f}", spread(runs)]
            outcome += [f"{mean(runs, 'density'):.3f}", " ".join(commits)]
        name = f"{row.name}*" if row.variant else row.name
        flags = f"`{row.flags}`" if row.flags else ""
        lines.append([name, text, flags, row.why, expected, *outcome])
    head = ["row", "text", "flags", "why", "expected", "loss", "spread", "density", "commit"]
    return markdown(head, lines)
