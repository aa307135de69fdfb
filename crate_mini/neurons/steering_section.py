"""The section of index.html on steering: the figure and the numbers of `steer.py measure`.

The chapter `steering` builds on this one, so nothing of it is imported: the section is made from
steering.json and steering.png alone, if the command left them in the folder.
"""

from html import escape
from pathlib import Path

from crate_mini import UserError
from crate_mini.console import results
from crate_mini.plots.html import embedded

ENTRIES = {"command", "summary", "inserted", "attribution", "checkpoint"}  # of steering.json
METRICS = ("effect", "own", "seen", "kl", "loss")
ALT = "effect and side effect of steering, by dose and by layer"  # of the figure
AT_KL = 0.1  # nats of side effect at which kinds are compared


def read(path):
    """The content of a steering.json. Raises UserError for any other file."""
    steering = results.read_json(path, expected="what `python steer.py measure CKPT` writes")
    if ENTRIES <= set(steering) and _has_its_numbers(steering):
        return steering
    raise UserError(f"{path} is not a steering.json; `python steer.py measure CKPT` writes one.")


def _has_its_numbers(steering):
    """Whether everything that tables and the figure show is there, of the right types."""
    try:
        tables(steering)
        for summary in steering["summary"].values():
            doses = [float(dose) for dose in summary["doses"]]
        return bool(doses) and "sha256" in set(steering["checkpoint"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return False


def section(folder, sha256):
    """The section as HTML; "" if the folder has no steering.json of the checkpoint `sha256`.

    Raises UserError for a steering.json that `steer.py measure` did not write.
    """
    path = Path(folder, "steering.json")
    if not path.exists():
        return ""
    steering = read(path)
    if steering["checkpoint"]["sha256"] != sha256:
        return ""
    parts = [embedded(path.with_suffix(".png"), ALT)]
    parts += [_table(head, rows) for head, rows in tables(steering)]
    return (
        f'<section><h2>Steering</h2><p class="saw">{escape(steering["command"])}. Doses are '
        "multiples of each neuron’s observed maximum. KL and loss are measured on other text than "
        "the continuations were chosen on; intervals are of the mean, over other neurons and other "
        "documents.</p>"
        f"{''.join(parts)}</section>"
    )


def tables(steering):
    """[(head, rows of text)]: effects by dose, at equal side effect, of inserting, attribution."""
    by_dose, at_equal_kl = [], []
    for kind, summary in steering["summary"].items():
        for dose, means in summary["doses"].items():
            by_dose.append([kind, f"{dose}x", *(_mean(means[metric]) for metric in METRICS)])
        at_kl = summary["at_kl"]
        means = [_mean(mean) for mean in at_kl.values()]
        at_equal_kl.append([kind, *means, str(at_kl["effect"]["n"])])
    inserted = []
    for row in steering["inserted"]:
        cost = [f"{row['kl']:.4g}", f"{row['loss']:+.4g}"]
        inserted.append([str(row["layer"]), row["kind"], *cost])
    attribution = []
    for row in steering["attribution"]:
        null = "none" if row["null"] is None else f"{row['null']:.3f}"
        agreement = [f"{row['correlation']:.3f}", null, f"{row['top10']:.2f}"]
        attribution.append([str(row["layer"]), f"{row['dose']:g}x", *agreement])
    return [
        (["kind", "dose", "effect", "own", "seen", "KL", "loss"], by_dose),
        ([f"kind, at KL {AT_KL}", "effect", "own", "seen", "n"], at_equal_kl),
        (["layer", "inserted, not steered", "KL", "loss"], inserted),
        (
            [
                "layer",
                "direct attribution at",
                "correlation with a run",
                "with another neuron’s run",
                "top 10 shared",
            ],
            attribution,
        ),
    ]


def _mean(statistic):
    """mean [95 % interval] as text."""
    if statistic["mean"] is None:
        return "none reached"
    if statistic["ci95"] is None:  # of one neuron
        return f"{statistic['mean']:+.3g}"
    low, high = statistic["ci95"]
    return f"{statistic['mean']:+.3g} [{low:.3g}, {high:.3g}]"


def _table(head, rows):
    """A table as HTML."""
    heads = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    lines = []
    for row in rows:
        cells = []
        for name, text in zip(head, row):
            cells.append(f'<td data-name="{escape(name)}">{escape(text)}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="wide"><table class="cards"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
