"""The record of a run while it runs: log.csv on disk and the progress line on the screen."""

import csv
import sys
import time
from pathlib import Path

from crate_mini import atomic_write


class Log:
    """log.csv and the progress line: one line that moves on a terminal, plain lines in a pipe."""
    COLUMNS = ("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s",
               "val_loss", "bits_per_byte", "density")

    def __init__(self, run):
        self.run, self.start, self.first, self.val = run, time.perf_counter(), run.step, {}
        self.path = Path(run.s.out, "log.csv")
        if not run.rank:  # rows after the checkpoint that a resume starts from belong to a lost future
            rows = []
            if run.step and self.path.exists():
                with open(self.path, newline="") as file:
                    rows = [r for r in csv.reader(file) if len(r) == len(self.COLUMNS) and r[0].isdigit()
                            and int(r[0]) <= run.step]
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
            values = {"step": run.step, "tokens": run.step * tokens, "loss": loss, "lr": lr,
                      "grad_norm": norm, "tokens_per_s": round(rate), **val}
            with open(self.path, "a", newline="") as file:
                file.write(",".join(str(values.get(name, "")) for name in self.COLUMNS) + "\n")
        left = int(seconds / done * (s.train_steps - run.step))
        line = (f"step {run.step}/{s.train_steps}  loss {loss:.4f}"
                + "".join(f"  {name.replace('_loss', '')} {value:.4f}" for name, value in self.val.items())
                + f"  {rate:,.0f} tokens/s"
                + (f"  MFU {100 * rate * run.flops / run.peak / run.world:.0f} %" if run.peak else "")
                + f"  ETA {left // 60}:{left % 60:02d}")
        if sys.stdout.isatty():
            print(f"\r{line}\033[K", end="\n" if due and val else "", flush=True)
        else:
            print(line, flush=True)


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
            print(f"\r{line}\033[K" if moving else line, end="" if moving and not last else "\n", flush=True)
