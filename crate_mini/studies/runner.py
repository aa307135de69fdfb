"""Run the parts of a study, each a script in a process of its own, and keep what has finished.

How a study is written:

    @dataclass
    class Settings:
        "What the study asks: the description of its --help."

        text: str | None = setting(None, "text to train on")
        steps: int = setting(1000, "training steps", low=1)
        table: bool = setting(False, "only print the table of the results file again")

    def run(settings):
        runner = Runner("neurons", total=2)
        runner.part(folder, "train.py", "--data", absolute(settings.text), "--overwrite")
        runner.part(folder / "interpret", "interpret.py", "neurons", folder / "last")
        results.write_json(results.ROOT / "results" / "neurons.json", result)

    COMMAND = Command(Settings, run, checkpoint=False, positional=("text", "steps"))

`python -m crate_mini.studies neurons TEXT STEPS` runs it, once __main__.py lists it. A study
imports no other study: what two of them need is here, in tables.py or in a chapter. Every path
hangs on results.ROOT, read when it is used, so that a test can move a study to another folder.
"""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from crate_mini import UserError
from crate_mini.console import results, terminal


class Runner:
    """The parts of a study, one after the other, with one progress line.

    total: the number of parts. this_commit: whether a part that finished at another commit runs
    again; without it a part is kept as long as its command stays the same.
    """

    def __init__(self, study, total, this_commit=False):
        results.ready_folder(results.ROOT / "results")  # where every study writes at its end
        self.progress = terminal.Progress(study, total, every=0)
        self.this_commit = this_commit
        self.done = 0

    def part(self, folder, *words, name=None):
        """Run a script with --out `folder`, unless the same command has finished there before.

        words: the script, its command and flags. Next to the folder, NAME.log keeps the output and
        NAME.json the returned record {"command", "commit", "seconds"}; NAME is the folder's unless
        given. Raises UserError if the script fails.
        """
        name = name or folder.name
        words = relative([*words, "--out", folder])
        record_file = folder.with_name(f"{name}.json")
        record = self._kept(record_file, words)
        if record is None:
            print(f"\npython {shlex.join(words)}", flush=True)
            seconds = run_script(words, folder.with_name(f"{name}.log"))
            record = {"command": words, "commit": results.commit(), "seconds": round(seconds, 1)}
            results.write_json(record_file, record)
        self.done += 1
        self.progress.update(self.done)
        return record

    def _kept(self, record_file, words):
        """The record of a finished part, or None if it has to run."""
        if not record_file.exists():
            return None
        record = results.read_json(record_file)
        if record.get("command") != words:
            return None
        if self.this_commit and record.get("commit") != results.commit():
            return None
        return record


def run_script(words, log, threads=None):
    """Run `python WORDS` at the root of the checkout, its output to the file `log`.

    threads: for PyTorch, all cores if None. Returns the seconds it took. Raises UserError with the
    last line of its output if it fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    env = dict(os.environ)
    if threads:
        env["OMP_NUM_THREADS"] = str(threads)
    start = time.monotonic()
    with open(log, "w") as file:
        process = subprocess.run(
            [sys.executable, *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=results.ROOT,
            env=env,
        )
    if process.returncode:
        lines = log.read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
        raise UserError(
            f"`python {shlex.join(words)}` ended with code {process.returncode}: {last.strip()}"
        )
    return time.monotonic() - start


def relative(words):
    """Words of a command line, with the files of the checkout named from its root.

    The commands kept in result files then name no folder of this machine.
    """
    return [str(word).replace(f"{results.ROOT}/", "") for word in words]


def absolute(word):
    """The full name of a file, with what follows its first colon; any other word unchanged.

    Scripts run at the root of the checkout, while the user names files from the working folder.
    """
    name, colon, rest = word.partition(":")
    return f"{Path(name).resolve()}{colon}{rest}" if Path(name).exists() else word


def trained_model(name, seed, text="pydocs"):
    """The folder in which the study `models` trains a row of its grid on one of its texts."""
    folder = results.ROOT / "out" / "study"
    if text != "pydocs":
        folder /= text
    return folder / f"{name}-{seed}"


def is_trained(checkpoint):
    """Whether a training has ended in this checkpoint: one that was cut short has no final loss."""
    path = checkpoint / "config.json"
    return path.exists() and "val_loss" in results.read_json(path)["training"]


def neurons_checkpoint(preset, kind, seed):
    """The checkpoint that the study `neurons` scores: of the study `models`, on its second text."""
    name = kind if preset == "3L" else f"{kind}-{preset}"
    return trained_model(name, seed, "wiki") / "last"


def neurons_run(preset, kind, seed):
    """The folder in which the study `neurons` scores a model."""
    return results.ROOT / "out" / "neurons" / f"{kind}-{preset}-{seed}"
