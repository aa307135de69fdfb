"""Helpers for tests of the trainer: a tiny model, a text, runs in this process or in children."""

import csv
import functools
import json
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch
from forked import ROOT, run_script, start_script

from crate_mini.training import device, loss_curve
from crate_mini.training.settings import flags

sys.path.insert(0, str(ROOT))
import train  # noqa: E402

TINY = dict(
    n_layer=1,
    n_embd=16,
    n_head=2,
    block_size=16,
    batch_size=4,
    tokenizer="bytes",
    dtype="float32",
    eval_tokens=200,
    log_every=1,
    warmup=2,
    eval_every=4,
)
measured_once = functools.cache(device.product_rate)
kernels_measured_once = functools.cache(device.kernel_rate)


# ---- fixtures ------------------------------------------------------------------------------------


@pytest.fixture
def figures():
    """For a test that looks at loss.png; runs of the others do not draw it.

    A figure costs more than the training of a tiny model.
    """


@pytest.fixture(autouse=True)
def own_place(request, tmp_path_factory, monkeypatch):
    """An empty working folder, a cache of this session, one thread, signal handlers put back.

    With one thread, equal runs are equal to the bit. The CPU's peak is measured once for all runs.
    """
    monkeypatch.setattr(device, "product_rate", measured_once)
    monkeypatch.setattr(device, "kernel_rate", kernels_measured_once)
    if "figures" not in request.fixturenames:
        monkeypatch.setattr(loss_curve, "loss_curve", lambda log, *_: log.with_name("loss.png"))
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))
    monkeypatch.setenv("CRATE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A corpus of a few hundred lines made from a seed, with enough order in it to be learned."""
    draw = random.Random(0)
    words = ["code", "rate", "step", "sparse", "dictionary", "token", "subspace", "signal", "head"]
    lines = []
    for _ in range(400):
        line = " ".join(draw.choice(words) for _ in range(draw.randint(3, 9)))
        lines.append(line + ".\n")
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("".join(lines))
    return str(path)


# ---- runs ----------------------------------------------------------------------------------------


def tiny(text, out, train_steps, **settings):
    """The words of a command line that trains a tiny model on a text."""
    settings = {**TINY, "data": text, "out": out, "train_steps": train_steps, **settings}
    return flags(settings)


def run(*words):
    """train.py's main in this process; returns its exit code, raises its UserError."""
    return train.main(list(words))


def script(*words, fresh=False, **env):
    """train.py in a child, to its end."""
    env = {**os.environ, **env}
    return run_script(["train.py", *words], env=env, timeout=180, fresh=fresh)


def script_at_step(step, words, fresh=False):
    """train.py in a child that has just printed its progress at `step`."""
    process = start_script(["train.py", *words], fresh=fresh)
    for line in process.stdout:
        if line.startswith(f"step {step}/"):
            break
    return process


# ---- what a run has written ----------------------------------------------------------------------


def rows(out):
    """The rows of log.csv, without the measured speed."""
    with open(Path(out, "log.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["tokens_per_s"]
    return rows


def facts(out, name="last"):
    """The training facts in a checkpoint's config.json."""
    return json.loads(Path(out, name, "config.json").read_text())["training"]


def weights(out, name="last"):
    """sha256 of a checkpoint's weights."""
    meta = json.loads(Path(out, name, "config.json").read_text())
    return meta["files"]["weights"]["sha256"]
