"""The tables of steering.json, the result of `steer.py measure`, in Markdown."""

from crate_mini.model import Config
from crate_mini.neurons.record import kind_of
from crate_mini.neurons.steering_section import tables
from crate_mini.plots.markdown import markdown
from crate_mini.steering.dose_response import AT_KL


def name(result):
    """The kind of model and its number of layers, like "crate 3L" or "crate 3L, top_k=16"."""
    config = Config(**result["checkpoint"]["config"])
    kind, comma, changes = kind_of(config).partition(",")
    return f"{kind} {config.n_layer}L{comma}{changes}"


def cell(interval):
    """ "mean [95 % interval]", or "none reached"; one neuron has no interval."""
    if interval["mean"] is None:
        return "none reached"
    if interval["ci95"] is None:
        return f"{interval['mean']:+.3g}"
    low, high = interval["ci95"]
    return f"{interval['mean']:+.3g} [{low:.3g}, {high:.3g}]"


def null(row):
    """The correlation with another neuron's attribution, as text."""
    return "none" if row["null"] is None else f"{row['null']:.3f}"


def table(result):
    """Everything measured, in Markdown: the tables that index.html shows."""
    return "\n\n".join(markdown(head, rows) for head, rows in tables(result))


def readme(study):
    """The README's tables of results/steering.json: kinds, their pairs, weights against runs."""
    steered, pairs = [], []
    attribution = []
    for result in study["models"].values():
        steered += _kinds(result)
        for pair, intervals in result["contrasts"].items():
            own, seen = intervals["own"], intervals["seen"]
            pairs.append([f"{name(result)}, {pair}", cell(own), cell(seen), own["n"]])
        smallest = min(row["dose"] for row in result["attribution"])
        correlations = [
            f"{row['correlation']:.2f} ({null(row)})"
            for row in result["attribution"]
            if row["dose"] == smallest
        ]
        attribution.append([name(result), *correlations])
    layers = [f"layer {n}" for n in range(max(map(len, attribution)) - 1)]
    costs = ["base loss", "KL of inserting it, by layer"]
    return "\n\n".join(
        (
            markdown(["what is steered", *costs, f"own at KL {AT_KL}", "seen", "n"], steered),
            markdown([f"the same neurons at KL {AT_KL}", "own", "seen", "n"], pairs),
            markdown(["weights against a run (another neuron's)", *layers], attribution),
        )
    )


def _kinds(result):
    """A row for each kind of one model: base loss, cost of inserting it, gains at equal KL."""
    losses = [run["val_loss"] for run in result["runs"]]
    rows = []
    for kind, summary in result["summary"].items():
        costs = [
            "0 exactly" if row["kl"] == 0 else f"{row['kl']:.2g}"
            for row in result["inserted"]
            if row["kind"] == kind
        ]
        own, seen = summary["at_kl"]["own"], summary["at_kl"]["seen"]
        rows.append(
            [
                f"{name(result)}, {kind}",
                f"{sum(losses) / len(losses):.3f}",
                ", ".join(dict.fromkeys(costs)),
                cell(own),
                cell(seen),
                own["n"],
            ]
        )
    return rows
