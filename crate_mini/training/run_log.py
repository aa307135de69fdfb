"""The output of a run: its folder, its first and last lines, log.csv, progress."""

import hashlib
import math
import os
import shutil
import sys
import tempfile
import time
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from crate_mini import UserError, ops
from crate_mini.console import terminal
from crate_mini.console.results import atomic_write, read_bytes
from crate_mini.console.terminal import flag_words, typable
from crate_mini.training import checkpoint
from crate_mini.training.device import has_mps
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
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    handle = None
    try:
        try:
            handle = _open_locked(folder)
        except BlockingIOError:
            created.clear()  # they are the other run's now
            raise UserError(
                f"Another process is training in {folder} now; wait for it, stop it, or choose "
                "another --out."
            ) from None
        except OSError as error:
            raise UserError(
                f"Nothing can be written to {folder} ({error.strerror}); choose another --out."
            ) from None
        yield
    finally:
        for path in created:
            with suppress(OSError):
                path.rmdir()
        if handle is not None:  # after the removal: else another run might lock what is removed
            os.close(handle)


def _open_locked(folder, attempts=100):
    """A handle of the folder, created if missing and locked; None on Windows.

    Raises BlockingIOError if another process holds the lock.
    """
    try:
        checkpoint.make_folder(folder)
        tempfile.TemporaryFile(dir=folder).close()
        if fcntl is None:
            return None
        handle = os.open(folder, os.O_RDONLY)
        if _lock(handle) and os.path.samestat(os.fstat(handle), os.stat(folder)):
            return handle
        os.close(handle)
    except (FileNotFoundError, FileExistsError):  # the second: it was there, and then was not
        if not attempts:
            raise
    # Another run has just removed its empty folder.
    return _open_locked(folder, attempts - 1)


def _lock(handle):
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:
        pass  # a file system without locks
    return True


def refuse_occupied(folder, overwrite):
    """Raise UserError if the folder is a checkpoint, or holds a run that a new one would replace.

    overwrite: whether it may replace that run; it never writes into a checkpoint.
    """
    if Path(folder, "config.json").exists():
        raise UserError(
            f"--out {folder} is a checkpoint, and a run has checkpoints of its own; choose a "
            "folder for the run, like --out out/run."
        )
    if not overwrite and Path(folder, "last", "config.json").exists():
        raise UserError(
            f"{folder} already holds a run; continue it with "
            f"{typable(*flag_words('--resume', folder))}, replace it with --overwrite, or choose "
            "another --out."
        )


def make_room(trainer):
    """Remove what --overwrite replaces; keep a best checkpoint that the next cannot beat."""
    if not trainer.processes.is_first:
        return
    out = Path(trainer.s.out)
    best = out / "best"
    if trainer.step == 0:
        for folder in (out / "last", best, *kept(out)):
            shutil.rmtree(folder, ignore_errors=True)
    elif trainer.best == math.inf and trainer.step < trainer.s.train_steps:
        now = {"settings": asdict(trainer.s), "corpus": trainer.corpus.meta}
        with suppress(UserError, OSError):
            facts = checkpoint.read_meta(best)["training"]
            if measured(facts) != measured(now):
                best.rename(out / f"best-step-{facts.get('step')}")
    if not best.exists():
        trainer.best = math.inf


def kept_name(step):
    """The folder, in that of the run, of a checkpoint of --keep-every."""
    return f"step-{step:06d}"


def kept(out):
    """The checkpoints of --keep-every in the folder of a run, by step."""
    folders = [path for path in Path(out).glob("step-*") if path.name[5:].isdecimal()]
    return sorted(folders, key=lambda path: int(path.name[5:]))


def measured(facts):
    """What the validation losses of a run are measured on; None if its training facts lack it."""
    try:
        corpus = facts["corpus"]
        text = corpus["text_sha256"] or corpus["source"]
        limit = min(facts["settings"]["eval_tokens"], corpus["tokens"]["val"])
        return [text, corpus["val_fraction"], corpus["split"], corpus["tokens"], limit]
    except (KeyError, TypeError):
        return None


# ---- a run that cannot go on in its folder -------------------------------------------------------


def rescued(trainer, error, **scores):
    """Save the present step where that is still possible; the error, with how to go on from it.

    error: a UserError, such as of a full disk. scores: further training facts.
    """
    out = trainer.s.out
    with suppress(UserError):
        trainer.log.check_folder()
        with suppress(UserError):
            trainer.log.write(Path(out))
        _save_all(trainer, out, scores)
        return UserError(f"{error} {how_to_resume(out)}")
    for folder in fallbacks(out, trainer.step):
        with suppress(UserError):
            trainer.log.write(folder)
            _save_all(trainer, folder, scores)
            return UserError(
                f"{error} Step {trainer.step} was saved in {folder} instead; "
                f"{typable(*flag_words('--resume', folder))} continues from it."
            )
    return UserError(f"{error} {how_to_resume(out)}")


def _save_all(trainer, out, scores):
    if trainer.improved:
        trainer.save("best", resume=False, out=out)
    trainer.save("last", out=out, **scores)


def fallbacks(out, step):
    """New folders to save a run in that cannot go on in its own: next to it, then a temporary one.

    Asking for the next one removes the last, in which nothing could be saved.
    """
    sibling = Path(out).absolute()
    sibling = sibling.with_name(f"{sibling.name}-step-{step}")
    for make in (sibling.mkdir, tempfile.mkdtemp):
        try:
            folder = Path(make() or sibling)
        except OSError:
            continue
        yield folder
        shutil.rmtree(folder, ignore_errors=True)


# ---- introduction and conclusion -----------------------------------------------------------------


def introduction(trainer, mode, mode_reason, dtype_reason, peak_reason):
    """The lines before training: model, device, dtype, corpus, each choice with its reason."""
    s, c = trainer.s, trainer.config
    n_tokens = trainer.corpus.n_tokens
    source = s.init or f"{s.model} {s.preset}"
    shape = f"L={c.n_layer} d={c.n_embd} K={c.n_head} h={c.n_code} V={c.vocab_size}"
    peak = f"{trainer.peak / 1e9:,.0f} GFLOP/s, " if trainer.peak else ""
    tokens = trainer.tokens + (s.train_steps - trainer.step) * s.batch_size * c.block_size
    epochs = tokens / n_tokens["train"]
    lines = [
        f"model     {source}: {c.attention} + {c.sparsifier}, {shape}",
        f"          {trainer.lm.n_params() / 1e6:.2f} M parameters without positions",
        f"device    {trainer.machine['device']}; {trainer.processes.world} process(es)",
        f"mode      {mode}: {mode_reason}",
        f"dtype     {s.dtype}: {dtype_reason}",
        f"backend   {': '.join(ops.backend(trainer.device.type))}",
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
    if s.device == "auto" and trainer.device.type == "cpu" and has_mps():
        lines.append(
            "note      MPS is there, but none of this has run on it and our kernels are for the "
            "CPU, so auto leaves it; --device mps tries it"
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
    more_steps = ["--train-steps", str(2 * s.train_steps)]
    commands.append([*flag_words("--resume", s.out), *more_steps])
    indent = "\n          "
    sample = terminal.printable(sample).strip().replace("\n", indent)
    next_commands = indent.join(typable("python", "train.py", *words) for words in commands)
    files = [out / name for name in ("last", "best", "log.csv")]
    if figure:
        files.append(figure)
    return (
        f"\nsample    {sample}\n"
        f"\nresult    {result}"
        f"\nfiles     {', '.join(map(str, files))}"
        f"\nnext      {next_commands}"
    )


def how_to_resume(out):
    """A sentence, for errors, on how to resume the run in this folder."""
    if not Path(out, "last", "config.json").exists():
        return "no checkpoint was due yet."
    return f"{typable(*flag_words('--resume', out))} continues from the last good checkpoint."


# ---- progress ------------------------------------------------------------------------------------


class Pace:
    """How fast a run is now: the mean over its last steps.

    The first step, which may compile, does not count; nor does what lies between steps, such as
    validations, except in `remaining`.
    """

    def __init__(self, window=20):
        self.seconds = deque(maxlen=window)  # of each of the last steps
        self.n_steps = 0
        self.between = 0.0  # seconds that were not spent in steps
        self.end = None  # of the last step

    @contextmanager
    def step(self):
        """Its block is one step."""
        start = time.perf_counter()
        if self.end is not None:
            self.between += start - self.end
        yield
        self.end = time.perf_counter()
        if self.n_steps:
            self.seconds.append(self.end - start)
        self.n_steps += 1

    def step_seconds(self):
        """The mean time of a step; None as long as there was only the first."""
        return sum(self.seconds) / len(self.seconds) if self.seconds else None

    def remaining(self, n_steps):
        """Seconds that so many steps will take, with validations as often as so far."""
        return n_steps * (self.step_seconds() + self.between / self.n_steps)


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
        self.pace = Pace()
        self.copy = None  # a logger besides log.csv
        self.folder = Path(trainer.s.out)
        self.path = self.folder / "log.csv"
        self.lines = [",".join(self.COLUMNS) + "\n"]
        self.n_written = 0  # of these lines
        if trainer.processes.is_first:
            if trainer.step:
                self.lines += self._lines_to_keep()
            self.folder.mkdir(parents=True, exist_ok=True)
            self.write(self.folder)
            self.place = os.stat(self.folder)
            if trainer.s.log:
                from crate_mini.training import loggers  # needed only then

                self.copy = loggers.start(trainer)
                trainer.undo.callback(self.copy.close)

    def write(self, folder):
        """Write all rows so far to log.csv in this folder, the run's or another."""
        with atomic_write(folder / "log.csv") as file:
            file.write("".join(self.lines).encode())
        self.n_written = len(self.lines)

    def fingerprint(self):
        """{"bytes", "sha256"} of the written rows; a checkpoint keeps it, to check them later."""
        content = "".join(self.lines[: self.n_written]).encode()
        return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def _lines_to_keep(self):
        """The lines up to the checkpoint that a resumed run starts from; it repeats later steps.

        A damaged file, which no longer begins with what the checkpoint saw, is set aside.
        """
        try:
            content = read_bytes(self.path)
        except FileNotFoundError:
            return []
        except OSError:  # a folder, or a damaged file system
            self._set_aside()
            return []
        lines = content.decode(errors="replace").splitlines(keepends=True)[1:]
        if lines and not lines[-1].endswith("\n"):
            lines.pop()  # the end of a run that was killed
        rows = [line for line in lines if self._is_row(line)]
        seen = self.trainer.seen_log
        if seen:
            beginning = content[: seen["bytes"]]
            intact = hashlib.sha256(beginning).hexdigest() == seen["sha256"]
        else:  # the checkpoint is of an older version
            intact = len(rows) == len(lines)
        if not intact:
            self._set_aside()
        return [line for line in rows if int(line.split(",")[0]) <= self.trainer.step]

    def _is_row(self, line):
        """Whether a line holds a step, tokens, and numbers or nothing in the other columns."""
        cells = line.rstrip("\n").split(",")
        try:
            for cell in filter(None, cells):
                float(cell)
        except ValueError:
            return False
        counts = [cell.isdecimal() for cell in cells[:2]]
        return line.isascii() and all(counts) and len(cells) == len(self.COLUMNS)

    def _set_aside(self):
        """Rename a damaged log.csv, so that a new one can take its place."""
        damaged = self.folder / "log-damaged.csv"
        number = 1
        while damaged.exists():
            number += 1
            damaged = damaged.with_name(f"log-damaged-{number}.csv")
        with suppress(OSError):
            self.path.rename(damaged)
        self.trainer.say(
            f"note      {self.path} was damaged and is now {damaged.name}; the new one keeps the "
            "rows that can be read"
        )

    def check_folder(self):
        """Raise UserError if the run's folder has been moved away, or another is in its place."""
        with suppress(OSError):
            if os.path.samestat(self.place, os.stat(self.folder)):
                return
        raise UserError(f"{self.folder} was moved or removed while the run was using it.")

    def row(self, loss, norm, lr, validation):
        """Write the row of the last step, if one is due, and show the progress line."""
        trainer, s = self.trainer, self.trainer.s
        due = validation or trainer.step % s.log_every == 0 or trainer.stopping
        if not trainer.processes.is_first or not (due or sys.stdout.isatty()):
            return
        rate = None  # tokens per second
        if step_seconds := self.pace.step_seconds():
            rate = s.batch_size * trainer.config.block_size / step_seconds
        if due:
            values = {
                "step": trainer.step,
                "tokens": trainer.tokens,
                "loss": loss,
                "lr": lr,
                "grad_norm": norm,
                **validation,
            }
            if rate:
                values["tokens_per_s"] = round(rate)
            self._append([str(values.get(name, "")) for name in self.COLUMNS])
            if self.copy:
                self.copy(values)
        try:
            terminal.show_line(self._line(loss, validation, rate), last=bool(validation))
        except OSError:
            # The reader has left, as in `train.py | head`, or the disk is full: stop as for a
            # signal.
            terminal.silence_stdout()
            trainer.stop.caught = SIGPIPE

    def _append(self, row):
        self.lines.append(",".join(row) + "\n")
        self.check_folder()
        try:
            with open(self.path, "a", newline="") as file:
                file.write(self.lines[-1])
            self.n_written = len(self.lines)
        except OSError as error:
            raise UserError(f"Cannot write {self.path}: {error.strerror}; make room.") from None

    def _line(self, loss, validation, rate):
        """The progress line; validation: scores of this very step, or {}.

        rate: tokens per second, None after the first step.
        """
        trainer = self.trainer
        words = [f"step {trainer.step}/{trainer.s.train_steps}", f"loss {loss:.4f}"]
        for name, value in validation.items():
            words.append(f"{name.replace('_loss', '')} {value:.4f}")
        if rate is None:
            return "  ".join(words)
        words.append(f"{rate:,.0f} tokens/s")
        if trainer.peak:
            mfu = rate * trainer.flops / trainer.peak / trainer.processes.world
            words.append(f"MFU {100 * mfu:.0f} %")
        remaining = self.pace.remaining(trainer.s.train_steps - trainer.step)
        words.append(f"ETA {terminal.eta(remaining)}")
        return "  ".join(words)
