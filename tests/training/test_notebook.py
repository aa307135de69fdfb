"""Training from a notebook or another program leaves its process as it was."""

import importlib
import os
import random
import shlex
import signal
import sys
import threading
import warnings

import matplotlib
import numpy as np
import pytest
import tiny_runs
import torch
from tiny_runs import facts, run, tiny, train

from crate_mini import UserError

# Fixtures.
figures = tiny_runs.figures
own_place = tiny_runs.own_place
text = tiny_runs.text


def state_of_the_process():
    """What belongs to the process, by name."""
    return {
        "signals": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)],
        "backend": matplotlib.get_backend(),
        "pyplot": "matplotlib.pyplot" in sys.modules,
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "dtype": torch.get_default_dtype(),
        "precision": torch.get_float32_matmul_precision(),
        "gradients": torch.is_grad_enabled(),
        "random": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state().tolist(),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "arguments": list(sys.argv),
        "warnings": list(warnings.filters),
        "streams": (sys.stdin, sys.stdout, sys.stderr, sys.stdout.errors),
    }


@pytest.fixture(autouse=True)
def imported():
    """Imports change a process once: sympy, which torch imports late, adds a filter of warnings."""
    importlib.import_module("sympy")


def changed(before):
    after = state_of_the_process()
    return [name for name in before if before[name] != after[name]]


def test_a_run_leaves_its_process_as_it_was(text, tmp_path, figures):
    matplotlib.use("svg")
    torch.manual_seed(3)
    before = state_of_the_process()
    assert run(*tiny(text, tmp_path / "run", 3)) == 0
    assert not changed(before)
    assert (tmp_path / "run" / "loss.png").exists()


def test_so_does_a_run_that_fails_or_is_stopped(text, tmp_path, monkeypatch):
    before = state_of_the_process()
    with pytest.raises(UserError, match="nowhere"):
        run(*tiny("nowhere.txt", tmp_path / "a", 3))
    assert not changed(before)
    one_step = train.Trainer.one_step

    def interrupted(trainer):
        signal.raise_signal(signal.SIGTERM)
        return one_step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "one_step", interrupted)
        assert run(*tiny(text, tmp_path / "b", 3)) == 128 + signal.SIGTERM
    assert not changed(before)


def test_a_run_in_another_thread_is_the_same_run(text, tmp_path):
    codes = []

    def work():
        torch.set_num_threads(1)
        codes.append(run(*tiny(text, tmp_path / "thread", 5)))

    before = state_of_the_process()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert codes == [0] and not changed(before)
    assert run(*tiny(text, tmp_path / "main", 5)) == 0
    assert tiny_runs.weights(tmp_path / "thread") == tiny_runs.weights(tmp_path / "main")


def test_the_command_kept_is_the_one_given(text, tmp_path):
    words = tiny(text, tmp_path / "a b", 1)
    run(*words)
    command = facts(tmp_path / "a b")["command"]
    assert shlex.split(command) == ["python", "train.py", *words]
