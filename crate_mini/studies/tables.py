"""`python -m crate_mini.studies tables`: the tables of the README, from the files in results/.

TABLES are those of results/README.md, FINDINGS the small ones of the README; each entry makes
Markdown from the JSON file of its name.
"""

import itertools
import re
import statistics
from collections import Counter
from dataclasses import dataclass

from crate_mini.console import results
from crate_mini.console.terminal import Command
from crate_mini.neurons.summary import STATUS
from crate_mini.plots.markdown import markdown
from crate_mini.steering.tables import cell, name, readme
from crate_mini.studies import codes, models_report, theory

NAMES = {"crate": "CRATE (paper)", "crate+": "crate+", "gpt2": "GPT-2 twin"}


def mean(rows, key):
    """The mean of one entry of several rows."""
    return statistics.mean(row[key] for row in rows)


def speed(study):
    """Tokens per second of train.py, in thousands."""
    rows = []
    for ids, kind in itertools.product((50304, 8192), ("crate", "gpt2")):
        rates = {}
        for row in study["rows"]:
            if (row["ids"], row["model"]) == (ids, kind):
                rates[row["dtype"], row["compile"]] = row["tokens_per_s"] / 1000
        order = itertools.product(("bfloat16", "float32"), ("off", "on"))
        rows.append([f"{ids:,}", NAMES[kind], *(f"{rates[key]:.1f} k" for key in order)])
    head = ["ids", "model", "bf16", "bf16, compiled", "fp32", "fp32, compiled"]
    return markdown(head, rows)


BENCHED = r"(ista|mssa) (8192x128|2048x768|3001x100) .* both|decode 1x768 .*|step 8x256 V=4096 .*"


def medians(row):
    """{contestant: milliseconds} of a row of bench.json."""
    return {contestant: times["median"] for contestant, times in row["ms"].items()}


def bench(study):
    """Kernels, forward and backward: times as fast as PyTorch, and as its matrix products alone."""
    cells = {}  # operation: {dtype: its four cells}
    for row in study["rows"]:
        density = re.search(r"density ([\d.]+)", row["note"])
        if not re.fullmatch(BENCHED, row["name"]):
            continue
        if density and not 5 < float(density[1]) < 20:
            continue
        op, shape, dtype = row["name"].removesuffix(" both").rsplit(" ", 2)
        title = f"{op} {shape}"
        if density:
            title += f", density {float(density[1]):.0f} %"
        ms = medians(row)
        numbers = [f"{ms['fused']:.3g}"]
        for contestant in ("eager", "compile", "products"):
            known = contestant in ms
            numbers.append(f"{ms[contestant] / ms['fused']:.2f}x" if known else "")
        cells.setdefault(title, {})[dtype] = numbers
    rows = [[title, *by["bfloat16"], *by["float32"]] for title, by in cells.items()]
    columns = ["eager", "compiled", "products"]
    return markdown(["forward and backward", "bf16 ms", *columns, "fp32 ms", *columns], rows)


def versions(study):
    """Versions of a kernel, naive to fast, forward: milliseconds (times as fast as eager PyTorch).

    The naive version is in float32 alone.
    """
    cells = {}  # dtype: {version: its cell}
    for row in study["rows"]:
        _, _, dtype, version, direction = row["name"].split()
        if direction != "forward":
            continue
        ms = medians(row)
        time = f"{ms['fused']:.3g}" if ms["fused"] < 1000 else f"{ms['fused']:,.0f}"
        text = f"{time} ({ms['eager'] / ms['fused']:.2f}x)"
        cells.setdefault(dtype, {})[version] = text
    names = max(cells.values(), key=len)
    rows = [[dtype, *(by.get(name, "") for name in names)] for dtype, by in cells.items()]
    return markdown(["ms", *names], rows)


def score(runs, scoring, metric):
    """A metric x 100, mean over layers and runs."""
    return f"{100 * statistics.mean(r[scoring]['overall'][metric]['mean'] for r in runs):.1f}"


def deepest(study):
    """[(model's name, its runs)] of the preset with the most layers."""
    preset = study["presets"][-1]
    models = []
    for kind, model in NAMES.items():
        models.append((f"{preset} {model}", runs_of(study, preset, kind)))
    return models


def runs_of(study, preset, kind):
    """The runs of one model in results/neurons.json, one for each seed."""
    return [run for run in study["runs"] if (run["preset"], run["model"]) == (preset, kind)]


def mean_density(runs):
    """Share of tokens on which a neuron fires, in percent; mean over neurons, layers and runs."""
    sites = [site for run in runs for site in run["as it is"]["sites"].values()]
    return f"{100 * statistics.mean(site['density']['mean'] for site in sites):.1f}"


BEYOND = {  # title of a row: where its number is among the sets of a site of beyond.json
    "coverage beyond the token": ("neurons", "coverage"),
    "that of a random rotation": ("rotation", "coverage"),
    "neurons minus rotation": ("rotation", "neurons_minus", "difference"),
    "that of an untrained model": ("untrained", "coverage"),
    "probe of 1 minus token table": ("neurons", "probing", "k = 1", "minus_table", "difference"),
    "probe of 5 minus token table": ("neurons", "probing", "k = 5", "minus_table", "difference"),
}


def beyond_the_token(runs, title):
    """A cell of a row of BEYOND: mean x 100 over layers and seeds; - if a layer has none."""
    values = []
    for run in runs:
        of_layers = []
        for site in run["beyond"]["sites"].values():
            value = site["sets"]
            for key in BEYOND[title]:
                value = (value or {}).get(key)
            of_layers.append(value)
        values.append(None if None in of_layers else statistics.mean(of_layers))
    return over_runs(values)


def over_runs(values):
    """59.1 ± 0.4: the mean x 100 of a value of each run, half of their range; - if one has none."""
    if not values or None in values:
        return "-"
    half = f" ± {50 * (max(values) - min(values)):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{half}"


def neurons(study):
    """Deepest models: scores x 100, means over layers and seeds; all with `neurons table`."""
    metrics = ["ngram_r", "token_r", "null_r", "init_r"]
    rows = []
    for model, runs in deepest(study):
        known = [beyond_the_token(runs, title) for title in BEYOND]
        scores = [score(runs, "as it is", metric) for metric in metrics]
        matched = score(runs, "matched", "ngram_r")
        loss = f"{mean(runs, 'val_loss'):.3f}"
        rows.append([model, loss, mean_density(runs), *known, *scores, matched])
    matched = f"ngram_r, density <= {study['match_density']:.0%}"
    return markdown(["", "validation loss", "density, %", *BEYOND, *metrics, matched], rows)


def concepts(study, method="clvq", control="same class"):
    """One sentence: how far accuracy falls without a concept's code, and if the code is why."""
    drops = {}  # form of the test: relative drops
    passed = []
    for run in study["runs"]:
        for seed in run["by_seed"].values():
            outcomes = seed["methods"][method]
            for form, controls in outcomes["survives"].items():
                drops.setdefault(form, []).append(outcomes[form]["own"]["relative_drop"])
                passed.append(controls[control]["passes"])
    means = [100 * statistics.mean(values) for values in drops.values()]
    return (
        f"accuracy falls by {min(means):.0f} to {max(means):.0f} %, by the form of the test, and "
        f"in {sum(passed)} of {len(passed)} cases by more than without the code of another text of "
        "the same class"
    )


def predictability(study):
    """Scores of neurons x 100 in short: beyond the token, then how predictable they are."""
    titles = list(BEYOND)[:4]
    rows = []
    for model, runs in deepest(study):
        known = [beyond_the_token(runs, title) for title in titles]
        scores = [score(runs, "as it is", "ngram_r"), score(runs, "as it is", "init_r")]
        rows.append([model, *known, *scores, score(runs, "matched", "ngram_r")])
    saturated = ["two tokens predict (ngram_r)", "untrained", "at equal density"]
    return markdown(["model", *titles, *saturated], rows)


def gains(study):
    """Steering in short: nats gained at equal side effect, by neurons and by random directions."""
    rows = []
    for result in study["models"].values():
        for kind in ("neuron", "random"):
            at_kl = result["summary"][kind]["at_kl"]
            rows.append([f"{name(result)}, {kind}", cell(at_kl["own"]), cell(at_kl["seen"])])
    return markdown(["steered", "tokens it raises", "tokens that follow it in text"], rows)


TABLES = {
    "models": models_report.table,
    "theory": theory.table,
    "speed": speed,
    "bench": bench,
    "versions": versions,
    "neurons": neurons,
    "steering": readme,
    "concepts": concepts,
    "codes": codes.table,
}
FINDINGS = {"models": models_report.losses, "neurons": predictability, "steering": gains}


# ---- for the studies -----------------------------------------------------------------------------


def add_counts(sites, metric="ngram_r"):
    """Counts of a metric over all sites of a summary: total, live, dead, undefined, failed."""
    counts = Counter()
    for site in sites.values():
        counts.update({key: site["n"][metric][key] for key in ("total", *STATUS)})
    return dict(counts)


@dataclass
class Settings:
    """Print the tables of results/README.md, then the small ones of the README."""


def run(settings):
    """Print every table. Raises UserError for a file of results/ that is missing or damaged."""
    for tables in (TABLES, FINDINGS):
        for file, table in tables.items():
            path = results.ROOT / "results" / f"{file}.json"
            print(f"{table(results.read_json(path))}\n")


COMMAND = Command(Settings, run, checkpoint=False)
