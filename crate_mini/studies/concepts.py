"""Do the concepts of classifiers survive their controls? -> results/concepts.json.

CRATE and its GPT-2 twin of equal size (3 layers, d = 256) are trained as language models on the
text of movie reviews, then fine-tuned to classify the sentiment of reviews and the topics of news
(64 tokens of a text). In each of the four classifiers, concepts are discovered by all methods with
three seeds, and judged next to all controls. About an hour on one core.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from crate_mini import UserError, cli
from crate_mini.cli import setting
from crate_mini.concepts.ablate import VARIANTS
from crate_mini.concepts.faithfulness import AGAINST, FORMS
from crate_mini.concepts.methods import METHODS
from crate_mini.console import results
from crate_mini.console.terminal import Command
from crate_mini.plots.markdown import markdown
from crate_mini.studies.runner import Runner, absolute
from crate_mini.studies.tables import NAMES
from crate_mini.training.device import machine

MODELS = ("crate", "gpt2")
SIZE = ("--preset", "3L", "--n-embd", 256, "--block-size", 128)
SCHEDULE = ("--train-steps", 400, "--lr", 2e-3, "--warmup", 100, "--eval-every", 0)
BASE = (*SIZE, *SCHEDULE, "--seed", 1337)
CLASSIFIER = ("--overwrite", "--length", 64, "--cut", "end", "--seed", 1337)
REVIEWERS = ("--texts", 12000, "--epochs", 2, "--names", "negative,positive")
REPORTERS = ("--texts", 0, "--epochs", 6)
TESTS = ("--tests", 400, "--whole", 120, "--nodes", 10)
CONCEPTS = ("--seeds", "0,1,2", "--most", 5, *TESTS, "--epochs", 8)
LEAST = {"reviews": 30, "topics": 8}  # occurrences that a word needs in the training texts
CONTROLS = [*VARIANTS, "retrained"]
HEADLINE = 0.935  # relative drop of a probe's accuracy in the log of CLVQ-VAE's authors
KEPT = (  # of a concepts.json: all but the pages' words and the checkpoint
    "labelled",
    "seeds",
    "layers",
    "k",
    "classes",
    "classifier",
    "words",
    "salience",
    "controls",
    "not_run",
    "by_seed",
    "judge",
    "people",
)
KEPT_OF_METHOD = (
    "settings",
    "health",
    "explained_by_codes",
    "stability",
    "agreement",
    "naive_bayes_proxy",
    "with_members",
    "wordless",
)


@dataclass
class Settings:
    """Concepts of four classifiers, CRATE and its twin on reviews and on news, with all controls.

    Writes results/concepts.json.
    """

    reviews: str | None = setting(None, "labelled reviews, like imdb_train.jsonl.xz")
    ranks: str | None = setting(None, "ranks of a tokenizer, like gpt2.tiktoken:4095")
    topics: str = setting("bbc", "labelled news")
    table: bool = setting(False, "only print the tables of results/concepts.json")
    methods: str = setting(
        "", "with --table: the methods to show, separated by commas; all if empty"
    )


def run(settings):
    """Run the study, or print the tables of its last result.

    Raises UserError without reviews and ranks, and for an unknown method.
    """
    if settings.table:
        methods = [name for name in settings.methods.split(",") if name]
        for name in methods:
            if name not in METHODS:
                suggestion = cli.nearest(name, METHODS)
                raise UserError(
                    f"--methods {name!r} is unknown{suggestion}; choose {cli.one_of(METHODS)}."
                )
        print(tables(results.read_json(result_file()), methods))
        return
    if settings.reviews is None or settings.ranks is None:
        raise UserError(
            "give labelled reviews and the ranks of a tokenizer, then topics if not bbc: `python "
            "-m crate_mini.studies concepts imdb_train.jsonl.xz gpt2.tiktoken:4095`."
        )
    study(absolute(settings.reviews), absolute(settings.ranks), absolute(settings.topics))


def result_file():
    return results.ROOT / "results" / "concepts.json"


# ---- running -------------------------------------------------------------------------------------


def study(reviews, ranks, topics):
    """Run all parts; writes the result after each classifier, in case the study is cut short."""
    runner = Runner("concepts", total=len(MODELS) * (1 + 2 * len(LEAST)))
    sources = {"reviews": (reviews, REVIEWERS), "topics": (topics, REPORTERS)}
    files = {"reviews": reviews, "topics": topics, "ranks": ranks}
    names = {name: Path(file).name for name, file in files.items()}
    runs = []
    for model in MODELS:
        base = results.ROOT / "out" / "concepts" / f"{model}-base"
        words = ["train.py", "--model", model, "--data", reviews, "--tokenizer", ranks]
        runner.part(base, *words, "--overwrite", *BASE)
        for texts, (source, flags) in sources.items():
            folder = base.with_name(f"{model}-{texts}")
            words = ["train.py", "--task", "classify", "--init", base / "last", "--data", source]
            runner.part(folder / "classifier", *words, *flags, *CLASSIFIER)
            words = ["interpret.py", "concepts", folder / "classifier" / "last"]
            runner.part(folder / "concepts", *words, "--least", LEAST[texts], *CONCEPTS)
            concepts = results.read_json(folder / "concepts" / "concepts.json")
            runs.append({"model": model, "texts": texts, **essence(concepts)})
            write(runs, names)
    print(f"\n{tables(results.read_json(result_file()))}")  # as rounded there


def write(runs, names):
    """Write results/concepts.json of the runs so far; names: of the files."""
    result = {
        "schema": 1,
        "command": "python -m crate_mini.studies concepts REVIEWS RANKS",
        **names,
        "base": BASE,
        "classifier": CLASSIFIER,
        "reviewers": REVIEWERS,
        "reporters": REPORTERS,
        "concepts": CONCEPTS,
        "least": list(LEAST.values()),
        "note": "one language model and one classifier of each kind; seeds are of discovery, "
        "partners, directions and folds",
        "machine": machine(torch.device("cpu")),
        "runs": runs,
    }
    results.write_json(result_file(), rounded(result))


def essence(concepts):
    """The part of a concepts.json that results/concepts.json keeps."""
    methods = {}
    for name, method in concepts["methods"].items():
        methods[name] = {key: method[key] for key in KEPT_OF_METHOD}
    kept = {key: concepts[key] for key in KEPT}
    return {"methods": methods, "commit": concepts["machine"].get("commit"), **kept}


def rounded(value, digits=4):
    """The numbers of a nested result, rounded."""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    return round(value, digits) if isinstance(value, float) else value


# ---- tables --------------------------------------------------------------------------------------


def tables(result, methods=()):
    """All tables as Markdown; methods: those to show in the table of ablations, or all."""
    parts = [classifiers(result), headline(result)]
    parts += [ablations(result, methods), codebooks(result)]
    return "\n\n".join(parts)


def classifiers(result):
    """One line for each classifier."""
    lines = []
    for run in result["runs"]:
        test = run["classifier"]
        low, high = test["ci95"]
        judges = run["judge"] if isinstance(run["judge"], str) else "run"
        lines.append(
            f"{NAMES[run['model']]} on {run['texts']}: classifier {test['accuracy']:.3f} of "
            f"{test['n']}, 95 % {low:.3f} to {high:.3f}, chance {test['chance']:.3f}; "
            f"language-model judges: {judges}; people: not run"
        )
    return "\n".join(lines)


def headline(result, method="clvq"):
    """Does a drop of 93 % survive its controls? One sentence for each form.

    The relative drop without the own code, and how often, over runs and seeds, the own code does
    more harm than each control.
    """
    lines = []
    for form in FORMS:
        outcomes = all_outcomes(result, method, form)
        if not outcomes:
            continue
        drops = [100 * own["relative_drop"] for own, _ in outcomes]
        flips = [own["verdict"] for own, _ in outcomes].count("sign flip")
        passes = []
        for name in AGAINST:
            passed = sum(survives[name]["passes"] for _, survives in outcomes)
            passes.append(f"{name} {passed} of {len(outcomes)}")
        lines.append(
            f"{method}, {form}: accuracy falls by {statistics.mean(drops):.1f} % on average "
            f"({min(drops):.1f} to {max(drops):.1f} %; the original's log: "
            f"{100 * HEADLINE:.1f} %), {flips} of {len(outcomes)} below chance; more harm than "
            f"{', '.join(passes)}."
        )
    return "\n".join(lines)


def all_outcomes(result, method, form):
    """[(outcome of the own code, comparison with each control)] over runs and seeds."""
    outcomes = []
    for run in result["runs"]:
        for seed in run["by_seed"].values():
            by_form = seed["methods"].get(method, {})
            if form in by_form:
                outcomes.append((by_form[form]["own"], by_form["survives"][form]))
    return outcomes


def ablations(result, methods):
    """Accuracy without each direction by texts, model, form and method; means over seeds."""
    rows = []
    for run in result["runs"]:
        seeds = list(run["by_seed"].values())
        for form in seeds[0]["shared"]:
            intact = [seed["shared"][form]["intact"] for seed in seeds]
            accuracy = statistics.mean(outcome["accuracy"] for outcome in intact)
            title = f"{form} ({accuracy:.3f}, {intact[0]['chance']:.3f})"
            for method in methods or run["methods"]:
                cells = [cell(of_seeds(seeds, method, form, variant)) for variant in CONTROLS]
                texts = f"{run['texts']}, {NAMES[run['model']]}"
                rows.append([texts, title, method, *cells])
    head = ["texts, model", "form (intact, chance)", "method", *CONTROLS]
    return markdown(head, rows)


def of_seeds(seeds, method, form, variant):
    """The outcome of a variant for each seed: a method's own, or a control that all share."""
    outcomes = []
    for seed in seeds:
        own = seed["methods"][method][form].get(variant)
        outcomes.append(own or seed["shared"][form].get(variant))
    return outcomes


def cell(outcomes):
    """ "0.512 drop": mean accuracy over seeds and their most frequent verdict; "-" for none."""
    if None in outcomes:
        return "-"
    verdict = statistics.mode(outcome["verdict"] for outcome in outcomes)
    return f"{statistics.mean(outcome['accuracy'] for outcome in outcomes):.3f} {verdict}"


def codebooks(result):
    """How codebooks are used, what they explain, how stable they are, what their words predict."""
    head = ["texts, model", "method", "perplexity of K", "largest", "explained", "stability (AMI)"]
    head += [
        "as clvq (AMI)",
        "as its start (AMI)",
        "proxy: own",
        "another",
        "random words",
        "majority",
    ]
    rows = []
    for run in result["runs"]:
        texts = f"{run['texts']}, {NAMES[run['model']]}"
        for name, method in run["methods"].items():
            usage = [health["test"] for health in method["health"].values()]
            perplexity = statistics.mean(test["perplexity"] for test in usage)
            cells = ["-" if n is None else f"{n:.3f}" for n in codebook_numbers(method, usage)]
            rows.append([texts, name, f"{perplexity:.0f} of {run['k']}", *cells])
    return markdown(head, rows)


def codebook_numbers(method, usage):
    """The numbers of one method in `codebooks`, means over seeds; None where there is none."""
    explained = [value for value in method["explained_by_codes"].values() if value is not None]
    stability = method["stability"]
    proxy = list(method["naive_bayes_proxy"].values())
    agreement = []
    for shown in ("own", "another", "random words"):
        agreement.append(statistics.mean(seed["agreement"][shown] for seed in proxy))
    return [
        statistics.mean(test["largest"] for test in usage),
        statistics.mean(explained) if explained else None,
        stability["mean"] if isinstance(stability, dict) else None,
        mean_agreement(method, "clvq"),
        mean_agreement(method, "start"),
        *agreement,
        proxy[0]["majority"],
    ]


def mean_agreement(method, other):
    """Mean over seeds of a method's agreement; None without any, as in results made before it."""
    values = [seed[other] for seed in method.get("agreement", {}).values()]
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


COMMAND = Command(Settings, run, checkpoint=False, positional=("reviews", "ranks", "topics"))
