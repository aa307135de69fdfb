"""`python -m crate_mini.studies.concepts REVIEWS RANKS [TOPICS]`: do concepts of classifiers survive controls?

CRATE and its GPT-2 twin at equal size (3 layers, d = 256) learn from the text of movie reviews as language
models, then tell reviews' sentiment and news topics apart (64 tokens of a text). Concepts of each of the four
classifiers are discovered by all methods with three seeds and judged beside all controls. -> results/
concepts.json. REVIEWS: labelled, like imdb_train.jsonl.xz; TOPICS: labelled, bbc unless given.

About an hour on one core. Every part is `train.py` or `interpret.py` itself in a process of its own; a part
that is finished is kept as long as its command stays the same. `... study_concepts table` prints the tables,
`table clvq` those of one method, for the README.
"""

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from crate_mini import UserError, atomic_write, cli
from crate_mini.concepts.ablate import VARIANTS
from crate_mini.concepts.faithfulness import AGAINST, FORMS
from crate_mini.studies.neurons import NAMES, ROOT, Study, absolute
from crate_mini.training import device as machine

CONTROLS = [*VARIANTS, "retrained"]
HEADLINE = 0.935  # relative drop of a probe's accuracy that CLVQ-VAE's log gives for its code


@dataclass
class ConceptStudy:
    """What is compared, and where; the defaults are the study in results/."""

    reviews: str
    ranks: str
    topics: str = "bbc"
    models: tuple = ("crate", "gpt2")
    base: tuple = (
        "--preset",
        "3L",
        "--n-embd",
        256,
        "--block-size",
        128,
        "--train-steps",
        400,
        "--lr",
        2e-3,
        "--warmup",
        100,
        "--eval-every",
        0,
        "--seed",
        1337,
    )
    classifier: tuple = ("--overwrite", "--length", 64, "--cut", "end", "--seed", 1337)
    reviewers: tuple = ("--texts", 12000, "--epochs", 2, "--names", "negative,positive")
    reporters: tuple = ("--texts", 0, "--epochs", 6)
    concepts: tuple = (
        "--seeds",
        "0,1,2",
        "--most",
        5,
        "--tests",
        400,
        "--whole",
        120,
        "--nodes",
        10,
        "--epochs",
        8,
    )
    least: tuple = (30, 8)  # times that training texts have a word: reviews, topics
    out: Path = ROOT / "out" / "concepts"
    results: Path = ROOT / "results"
    part = Study.part  # a finished part is kept

    def run(self):
        """All parts; after each the result file, for a study that is cut short. Prints tables."""
        runs = []
        for kind in self.models:
            base = self.out / f"{kind}-base"
            self.part(
                base,
                "train.py",
                "--model",
                kind,
                "--data",
                self.reviews,
                "--tokenizer",
                self.ranks,
                "--overwrite",
                *self.base,
            )
            for name, source, flags, least in (
                ("reviews", self.reviews, self.reviewers, self.least[0]),
                ("topics", self.topics, self.reporters, self.least[1]),
            ):
                place = self.out / f"{kind}-{name}"
                self.part(
                    place / "classifier",
                    "train.py",
                    "--task",
                    "classify",
                    "--init",
                    base / "last",
                    "--data",
                    source,
                    *flags,
                    *self.classifier,
                )
                self.part(
                    place / "concepts",
                    "interpret.py",
                    "concepts",
                    place / "classifier" / "last",
                    "--least",
                    least,
                    *self.concepts,
                )
                runs.append({"model": kind, "texts": name, **kept(place / "concepts")})
                found = self.write(runs)
        print(f"\n{tables(found)}")

    def write(self, runs):
        """results/concepts.json of the runs so far; returns what is in it."""
        found = {
            "schema": 1,
            "command": "python -m crate_mini.studies.concepts REVIEWS RANKS",
            "reviews": Path(self.reviews).name,
            "topics": Path(self.topics).name,
            "ranks": Path(self.ranks).name,
            "base": self.base,
            "classifier": self.classifier,
            "reviewers": self.reviewers,
            "reporters": self.reporters,
            "concepts": self.concepts,
            "least": self.least,
            "note": "one language model and one classifier of each kind; seeds are of discovery, "
            "partners, directions and folds",
            "machine": machine.describe(torch.device("cpu")),
            "runs": runs,
        }
        self.results.mkdir(exist_ok=True)
        with atomic_write(self.results / "concepts.json") as file:
            file.write(json.dumps(rounded(found), allow_nan=False).encode() + b"\n")
        return found


def kept(folder):
    """What results/concepts.json keeps of a concepts.json: all but the pages' words and the checkpoint."""
    found = cli.read_json(folder / "concepts.json")
    methods = {
        m: {
            k: of[k]
            for k in (
                "settings",
                "health",
                "explained_by_codes",
                "stability",
                "naive_bayes_proxy",
                "with_members",
                "wordless",
            )
        }
        for m, of in found["methods"].items()
    }
    names = (
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
    return {
        "methods": methods,
        "commit": found["machine"].get("commit"),
        **{k: found[k] for k in names},
    }


def rounded(value, digits=4):
    """Numbers of a nested result with as many decimals."""
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v, digits) for v in value]
    return round(value, digits) if isinstance(value, float) else value


def cuts(run, method, form, variant):
    """[outcome by seed] of a cut: a method's own, or a control shared by all."""
    return [
        seed["methods"][method][form].get(variant) or seed["shared"][form].get(variant)
        for seed in run["by_seed"].values()
    ]


def cell(found):
    """ "0.512 flip": mean accuracy over seeds and the verdict that most of them have; "-" for none."""
    if None in found:
        return "-"
    verdicts = [one["verdict"] for one in found]
    most = max(dict.fromkeys(verdicts), key=verdicts.count)
    return f"{statistics.mean(one['accuracy'] for one in found):.3f} {most}"


def faithfulness(found, methods):
    """Markdown: accuracy after each cut by texts, model, form, method; means over seeds."""
    lines = [
        f"| texts, model | form (intact, chance) | method | {' | '.join(CONTROLS)} |",
        "|---" * (len(CONTROLS) + 3) + "|",
    ]
    for run in found["runs"]:
        for form in FORMS:
            if form not in next(iter(run["by_seed"].values()))["shared"]:
                continue
            whole = [seed["shared"][form]["intact"] for seed in run["by_seed"].values()]
            mean = statistics.mean(w["accuracy"] for w in whole)
            intact = f"{form} ({mean:.3f}, {whole[0]['chance']:.3f})"
            for method in methods or run["methods"]:
                cells = [cell(cuts(run, method, form, v)) for v in CONTROLS]
                lines.append(
                    f"| {run['texts']}, {NAMES[run['model']]} | {intact} | {method} | "
                    f"{' | '.join(cells)} |"
                )
    return "\n".join(lines)


def codebooks(found):
    """Markdown: how codebooks are used, what they explain, how stable they are, what their words tell."""
    lines = [
        "| texts, model | method | perplexity of K | largest | explained | stability (AMI) | proxy: own "
        "| another | random words | majority |",
        "|---" * 10 + "|",
    ]
    for run in found["runs"]:
        for name, of in run["methods"].items():
            use = [h["test"] for h in of["health"].values()]
            proxy = list(of["naive_bayes_proxy"].values())
            stable = of["stability"]["mean"] if isinstance(of["stability"], dict) else None
            explained = [v for v in of["explained_by_codes"].values() if v is not None]
            numbers = [
                statistics.mean(u["largest"] for u in use),
                statistics.mean(explained) if explained else None,
                stable,
                *(
                    statistics.mean(p["agreement"][k] for p in proxy)
                    for k in ("own", "another", "random words")
                ),
                proxy[0]["majority"],
            ]
            cells = " | ".join("-" if n is None else f"{n:.3f}" for n in numbers)
            lines.append(
                f"| {run['texts']}, {NAMES[run['model']]} | {name} | "
                f"{statistics.mean(u['perplexity'] for u in use):.0f} of {run['k']} | {cells} |"
            )
    return "\n".join(lines)


def headline(found, method="clvq"):
    """Does a drop of 93 % survive? By form: the own code's relative drop, and whether it does more harm than
    each control, counted over runs and seeds."""
    lines = []
    for form in FORMS:
        own, passes, verdicts = [], {name: [] for name in AGAINST}, []
        for run in found["runs"]:
            for seed in run["by_seed"].values():
                if method in seed["methods"] and form in seed["methods"][method]:
                    one = seed["methods"][method][form]["own"]
                    own.append(one["relative_drop"])
                    verdicts.append(one["verdict"])
                    for name in AGAINST:
                        passes[name].append(
                            seed["methods"][method]["survives"][form][name]["passes"]
                        )
        if own:
            told = ", ".join(f"{name} {sum(p)} of {len(p)}" for name, p in passes.items())
            flips = verdicts.count("sign flip")
            lines.append(
                f"{method}, {form}: accuracy falls by {100 * statistics.mean(own):.1f} % on average "
                f"({100 * min(own):.1f} to {100 * max(own):.1f} %; the original's log: "
                f"{100 * HEADLINE:.1f} %), {flips} of {len(own)} below chance; more harm than "
                f"{told}."
            )
    return "\n".join(lines)


def tables(found, methods=()):
    """All that the study found; cuts of some methods only if any are named."""
    lines = [
        f"{NAMES[r['model']]} on {r['texts']}: classifier {r['classifier']['accuracy']:.3f} of "
        f"{r['classifier']['n']}, 95 % {r['classifier']['ci95'][0]:.3f} to "
        f"{r['classifier']['ci95'][1]:.3f}, chance {r['classifier']['chance']:.3f}; language-model "
        f"judges: {r['judge'] if isinstance(r['judge'], str) else 'run'}; people: not run"
        for r in found["runs"]
    ]
    return "\n\n".join(
        ["\n".join(lines), headline(found), faithfulness(found, methods), codebooks(found)]
    )


def main():
    words = sys.argv[1:]
    if words[:1] == ["table"]:
        print(tables(cli.read_json(ROOT / "results" / "concepts.json"), words[1:]))
    elif 2 <= len(words) <= 3:
        ConceptStudy(*map(absolute, words)).run()
    else:
        raise UserError(
            "give labelled reviews and the ranks of a tokenizer, then topics if not bbc: `python "
            "-m crate_mini.studies.concepts imdb_train.jsonl.xz gpt2.tiktoken:4095`."
        )


if __name__ == "__main__":
    cli.run(main)
