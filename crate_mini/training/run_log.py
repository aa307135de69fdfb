"""A run as others see it: its folder, held for it alone, what it says at start and end, log.csv, progress."""

import csv
import os
import shlex
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

from crate_mini import UserError, atomic_write, cli, ops
from crate_mini.training import device as machine
from crate_mini.training.settings import twin

try:
    import fcntl
except ImportError:  # Windows, where two runs in one folder are not kept apart
    fcntl = None

SIGPIPE = 13  # by number: Windows has no such name


@contextmanager
def claim(folder):
    """Hold the folder of a run for this process; whatever ends the process, a kill too, sets it free.

    Made here, and still empty at the end, it goes again. Raises UserError when another run holds it, or when
    nothing can be written in it.
    """
    folder, made, handle = Path(folder), [], None
    try:
        try:
            made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=folder).close()
            handle = fcntl and os.open(folder, os.O_RDONLY)
        except OSError as error:
            raise UserError(
                f"Nothing can be written to {folder} ({error.strerror}); choose another --out."
            ) from None
        try:
            fcntl and fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Another process is training in {folder} now; wait for it, stop it, or choose "
                "another --out."
            ) from None
        except OSError:
            pass  # a file system without locks: as on Windows
        yield
    finally:
        if handle is not None:
            os.close(handle)
        for path in made:
            with suppress(OSError):
                path.rmdir()


def introduction(run, mode, why_mode, why_dtype, why_peak):
    """What will run, where and why."""
    s, c, tokens = run.s, run.config, run.corpus.n_tokens
    return (
        f"model     {s.init or f'{s.model} {s.preset}'}: {c.attention} + {c.sparsifier}, "
        f"L={c.n_layer} d={c.n_embd} K={c.n_head} h={c.n_code} V={c.vocab_size}\n"
        f"          {run.lm.n_params() / 1e6:.2f} M parameters without positions\n"
        f"device    {machine.describe(run.device)['device']}; {run.world} process(es)\n"
        f"mode      {mode}: {why_mode}\n"
        f"dtype     {str(run.dtype)[6:]}: {why_dtype}\n"
        f"backend   {': '.join(ops.backend())}\n"
        f"step      {s.batch_size} x {c.block_size} tokens of {run.flops / 1e6:.1f} MFLOP\n"
        f"peak      {f'{run.peak / 1e9:,.0f} GFLOP/s, ' if run.peak else ''}{why_peak}\n"
        f"corpus    {s.data}: {tokens['train']:,} tokens to train on, {tokens['val']:,} held out; this "
        f"run sees {s.train_steps * s.batch_size * c.block_size / tokens['train']:.1f} times the first"
        + (
            f"\nnote      --warmup {s.warmup} outlasts the run: the learning rate will not reach {s.lr}"
            if s.warmup > s.train_steps
            else ""
        )
    )


def conclusion(run, val, sample, figure):
    """What came out, where it lies, and what to type next."""
    s, out = run.s, Path(run.s.out)
    commands = [["--resume", s.out, "--train-steps", str(2 * s.train_steps)]]
    if not s.init:  # weights from elsewhere have no twin to begin beside
        commands.insert(0, twin(s, run.config, run.tokenizer.vocab_size))
    return (
        "\nsample    "
        + sample.strip().replace("\n", "\n          ")
        + f"\n\nresult    validation loss {val['val_loss']:.4f} nats per token, "
        f"{val['bits_per_byte']:.4f} bits per byte"
        + (f", density {val['density']:.3f}" if "density" in val else "")
        + (f"; {run.skipped} steps skipped as not finite" if run.skipped else "")
        + f"\nfiles     {out / 'last'}, {out / 'best'}, {out / 'log.csv'}, {figure}\n"
        "next      " + "\n          ".join(shlex.join(["python", "train.py", *c]) for c in commands)
    )


class Log:
    """log.csv and the progress line: one line that moves on a terminal, plain lines in a pipe."""

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

    def __init__(self, run):
        self.run, self.start, self.first, self.val = run, time.perf_counter(), run.step, {}
        self.path = Path(run.s.out, "log.csv")
        if (
            not run.rank
        ):  # rows after the checkpoint that a resume starts from belong to a lost future
            rows = []
            if run.step and self.path.exists():
                with open(self.path, newline="") as file:
                    rows = [
                        r
                        for r in csv.reader(file)
                        if len(r) == len(self.COLUMNS) and r[0].isdigit() and int(r[0]) <= run.step
                    ]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.path) as file:
                file.write("".join(",".join(row) + "\n" for row in [self.COLUMNS, *rows]).encode())

    def row(self, loss, norm, lr, val):
        """Record the step just done, when one is due, and show where the run stands."""
        run, s = self.run, self.run.s
        done = run.step - self.first
        seconds, tokens = time.perf_counter() - self.start, s.batch_size * run.config.block_size
        rate = done * tokens / seconds
        self.val = val or self.val
        due = val or run.step % s.log_every == 0 or run.signal
        if run.rank or not (due or sys.stdout.isatty()):
            return
        if due:
            values = {
                "step": run.step,
                "tokens": run.step * tokens,
                "loss": loss,
                "lr": lr,
                "grad_norm": norm,
                "tokens_per_s": round(rate),
                **val,
            }
            try:
                with open(self.path, "a", newline="") as file:
                    file.write(",".join(str(values.get(name, "")) for name in self.COLUMNS) + "\n")
            except OSError as error:
                raise UserError(
                    f"Cannot write {self.path}: {error.strerror}; make room. {run.last_good()}"
                ) from None
        left = int(seconds / done * (s.train_steps - run.step))
        line = (
            f"step {run.step}/{s.train_steps}  loss {loss:.4f}"
            + "".join(
                f"  {name.replace('_loss', '')} {value:.4f}" for name, value in self.val.items()
            )
            + f"  {rate:,.0f} tokens/s"
            + (f"  MFU {100 * rate * run.flops / run.peak / run.world:.0f} %" if run.peak else "")
            + f"  ETA {left // 60}:{left % 60:02d}"
        )
        moving = sys.stdout.isatty()
        try:
            print(
                f"\r{line}\033[K" if moving else line,
                end="" if moving and not val else "\n",
                flush=True,
            )
        except (
            BrokenPipeError
        ):  # the reader has left, as in `train.py | head`: a signal like others
            cli.hush()
            run.caught = SIGPIPE


def track(items, what, every=3.0):
    """Yield the items of a list and say now and then how many are done and how long the rest will take."""
    start = said = time.perf_counter()
    moving = sys.stdout.isatty()
    for done, item in enumerate(items, 1):
        yield item
        now, last = time.perf_counter(), done == len(items)
        if now - said >= every or last and said > start:
            said, left = now, int((now - start) / done * (len(items) - done))
            line = f"{what:<9} {done}/{len(items)}  ETA {left // 60}:{left % 60:02d}"
            print(
                f"\r{line}\033[K" if moving else line,
                end="" if moving and not last else "\n",
                flush=True,
            )
