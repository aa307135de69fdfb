"""What tests of the trainer share: a small model, a text, runs and what they wrote.

Runs happen inside this process, or in children forked from a server that has the imports, because starting
Python and PyTorch costs more than the training here.
"""

import csv
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train  # noqa: E402

TINY = [
    "--n-layer",
    "1",
    "--n-embd",
    "16",
    "--n-head",
    "2",
    "--block-size",
    "16",
    "--batch-size",
    "4",
    "--tokenizer",
    "bytes",
    "--dtype",
    "float32",
    "--eval-tokens",
    "200",
    "--log-every",
    "1",
    "--warmup",
    "2",
    "--eval-every",
    "4",
]


@pytest.fixture(autouse=True)
def clean_machine(tmp_path_factory, monkeypatch):
    """Cache of this session, one thread (bitwise equal runs), signal handlers put back."""
    monkeypatch.setenv("CRATE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    old, threads = (
        [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)],
        torch.get_num_threads(),
    )
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), old):
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A corpus of a few hundred lines made from a seed, with enough order in it to be learned."""
    draw = random.Random(0)
    words = ["code", "rate", "step", "sparse", "dictionary", "token", "subspace", "signal", "head"]
    lines = [
        " ".join(draw.choice(words) for _ in range(draw.randint(3, 9))) + ".\n" for _ in range(400)
    ]
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("".join(lines))
    return str(path)


def run(*flags):
    """train.py's main in this process; returns its exit code, raises its UserError."""
    return train.main(list(flags))


def rows(out):
    """log.csv without the column that tells the time."""
    with open(Path(out, "log.csv"), newline="") as file:
        return [{k: v for k, v in r.items() if k != "tokens_per_s"} for r in csv.DictReader(file)]


def weights(out, name="last"):
    meta = json.loads(Path(out, name, "config.json").read_text())
    return meta["files"]["weights"]["sha256"]


def script(*flags, timeout=120, **env):
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *flags],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        cwd=ROOT,
    )
