"""The output of a run: its folder, its first and last lines, log.csv, progress."""

import csv
import os
import shlex
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

from crate_mini import UserError, atomic_write, ops
from crate_mini.console import terminal
from crate_mini.training.settings import twin

try:
    import fcntl
except ImportError:  # Windows: two runs may share a folder
    fcntl = None

SIGPIPE = 13  # as a number: Windows has no such name


# ---- the folder ----------------------------------------------------------------------------------


@contextmanager
def claim(folder):
    """Lock the folder of a run; the lock ends with the process, even if it is killed.

    Folders that it created and that are still empty at the end are removed. Raises UserError if
    another run holds the lock, or if the folder cannot be written to.
    """
    folder = Path(folder)
    created = []
    handle = None
    try:
        try:
            created += [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=folder).close()
            if fcntl:
                handle = os.open(folder, os.O_RDONLY)
        except OSError as error:
            raise UserError(
                f"Nothing can be written to {folder} ({error.strerror}); choose another --out."
            ) from None
        if fcntl:
            _lock(handle, folder)
        yield
    finally:
        if handle is not None:
            os.close(handle)
        for path in created:
            with suppress(OSError):
                path.rmdir()


def _lock(handle, folder):
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"Another process is training in {folder} now; wait for it, stop it, or choose "
            "another --out."
        ) from None
    except OSError:
        pass  # a file system without locks


# ---- introduction and conclusion -----------------------------------------------------------------


def introduction(trainer, mode, mode_reason, dtype_reason, peak_reason):
    """The lines before training: model, device, dtype, corpus, each choice with its reason."""
    s, c = trainer.s, trainer.config
    n_tokens = trainer.corpus.n_tokens
    source = s.init or f"{s.model} {s.preset}"
    shape = f"L={c.n_layer} d={c.n_embd} K={c.n_head} h={c.n_code} V={c.vocab_size}"
    peak = f"{trainer.peak / 1e9:,.0f} GFLOP/s, " if trainer.peak else ""
    epochs = s.train_steps * s.batch_size * c.block_size / n_tokens["train"]
    lines = [
        f"model     {source}: {c.attention} + {c.sparsifier}, {shape}",
        f"          {trainer.lm.n_params() / 1e6:.2f} M parameters without positions",
        f"device    {trainer.machine['device']}; {trainer.processes.world} process(es)",
        f"mode      {mode}: {mode_reason}",
        f"dtype     {s.dtype}: {dtype_reason}",
        f"backend   {': '.join(ops.backend())}",
        f"step      {s.batch_size} x {c.block_size} tokens of {trainer.flops / 1e6:.1f} MFLOP",
        f"peak      {peak}{peak_reason}",
        f"corpus    {s.data}: {n_tokens['train']:,} tokens to train on for {epochs:.1f} epochs, "
        f"{n_tokens['val']:,} held out",
    ]
    if s.warmup > s.train_steps:
        lines.append(
            f"note      --warmup {s.warmup} outlasts the run: the learning rate will not reach "
            f"{s.lr}"
        )
    return "\n".join(lines)


def conclusion(trainer, validation, sample, figure):
    """The lines after training: sample, scores, files, and the commands to run next."""
    s, out = trainer.s, Path(trainer.s.out)
    scores = [
        f"validation loss {validation['val_loss']:.4f} nats per token",
        f"{validation['bits_per_byte']:.4f} bits per byte",
    ]
    if "density" in validation:
        scores.append(f"density {validation['density']:.3f}")
    result = ", ".join(scores)
    if trainer.skipped:
        result += f"; {trainer.skipped} steps skipped as not finite"
    commands = []
    if not s.init:  # a model that starts from given weights has no known twin
        commands.append(twin(s, trainer.config, trainer.tokenizer.vocab_size))
    commands.append(["--resume", s.out, "--train-steps", str(2 * s.train_steps)])
    indent = "\n          "
    sample = sample.strip().replace("\n", indent)
    next_commands = indent.join(shlex.join(["python", "train.py", *flags]) for flags in commands)
    return (
        f"\nsample    {sample}\n"
        f"\nresult    {result}"
        f"\nfiles     {out / 'last'}, {out / 'best'}, {out / 'log.csv'}, {figure}"
        f"\nnext      {next_commands}"
    )


def how_to_resume(out):
    """A sentence, for errors, on how to resume the run in this folder."""
    if not Path(out, "last", "config.json").exists():
        return "no checkpoint was due yet."
    return f"--resume {shlex.quote(out)} continues from the last good checkpoint."


# ---- progress ------------------------------------------------------------------------------------


class Log:
    """log.csv and the progress line."""

    COLUMNS = (
        "step",
        "tokens",
        "loss",
        "lr",
        "grad_norm",
        "tokens_per_s",
        "val_loss",
        "bits_per_byte",
        "density",
    )

    def __init__(self, trainer):
        self.trainer = trainer
        self.start_time = time.perf_counter()
        self.start_step = trainer.step
        self.validation = {}  # the latest scores
        self.path = Path(trainer.s.out, "log.csv")
        if trainer.processes.is_first:
            rows = [",".join(row) + "\n" for row in (self.COLUMNS, *self._rows_to_keep())]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.path) as file:
                file.write("".join(rows).encode())

    def _rows_to_keep(self):
        """The rows up to the checkpoint that a resumed run starts from; it repeats later steps."""
        if not self.trainer.step or not self.path.exists():
            return []
        rows = []
        with open(self.path, newline="") as file:
            for row in csv.reader(file):
                whole = len(row) == len(self.COLUMNS) and row[0].isdigit()
                if whole and int(row[0]) <= self.trainer.step:
                    rows.append(row)
        return rows

    def row(self, loss, norm, lr, validation):
        """Write the row of the last step, if one is due, and show the progress line."""
        trainer, s = self.trainer, self.trainer.s
        self.validation = validation or self.validation
        due = validation or trainer.step % s.log_every == 0 or trainer.stopping
        if not trainer.processes.is_first or not (due or sys.stdout.isatty()):
            return
        seconds = time.perf_counter() - self.start_time
        steps = trainer.step - self.start_step
        tokens = s.batch_size * trainer.config.block_size
        rate = steps * tokens / seconds
        if due:
            values = {
                "step": trainer.step,
                "tokens": trainer.step * tokens,
                "loss": loss,
                "lr": lr,
                "grad_norm": norm,
                "tokens_per_s": round(rate),
                **validation,
            }
            self._append([str(values.get(name, "")) for name in self.COLUMNS])
        remaining = seconds / steps * (s.train_steps - trainer.step)
        try:
            terminal.show_line(self._line(loss, rate, remaining), last=bool(validation))
        except BrokenPipeError:
            # The reader has left, as in `train.py | head`: stop as for a signal.
            terminal.silence_stdout()
            trainer.caught = SIGPIPE

    def _append(self, row):
        try:
            with open(self.path, "a", newline="") as file:
                file.write(",".join(row) + "\n")
        except OSError as error:
            raise UserError(
                f"Cannot write {self.path}: {error.strerror}; make room. "
                f"{how_to_resume(self.trainer.s.out)}"
            ) from None

    def _line(self, loss, rate, remaining):
        """The progress line; rate: tokens per second, remaining: seconds."""
        trainer = self.trainer
        words = [f"step {trainer.step}/{trainer.s.train_steps}", f"loss {loss:.4f}"]
        for name, value in self.validation.items():
            words.append(f"{name.replace('_loss', '')} {value:.4f}")
        words.append(f"{rate:,.0f} tokens/s")
        if trainer.peak:
            mfu = rate * trainer.flops / trainer.peak / trainer.processes.world
            words.append(f"MFU {100 * mfu:.0f} %")
        words.append(f"ETA {terminal.eta(remaining)}")
        return "  ".join(words)
