"""The study of the model: every Row of grid.py trained, one entry a run in results/models.json.

The file is also the memory of the study: a run that it holds, made with the same flags, is not made
again, on whatever machine. results/log.md and models.png are drawn from it alone (--report).
"""

import csv
import hashlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from crate_mini import UserError
from crate_mini.cli import one_of, setting
from crate_mini.console import results, terminal
from crate_mini.model import Config
from crate_mini.studies import grid, models_report, variants
from crate_mini.studies.baselines import baselines
from crate_mini.studies.runner import absolute, is_trained, run_script, trained_model
from crate_mini.training import device

# Settings that a hash leaves out.
NO_RESULT = ("out", "overwrite", "device", "data", "text_field", "tokenizer")

NOT_COUNTED = ("positions.weight", "._u", "._v")  # the last are spectral norm's vectors


@dataclass
class Settings:
    """Train the models of the grid and set each loss next to what was expected.

    Writes results/models.json, models.png and log.md. A run that models.json holds is kept.
    """

    group: str = setting(
        "headline", f"rows of the grid, separated by commas: all, {one_of(grid.GRID)}"
    )
    only: str | None = setting(None, "names of rows, separated by commas, instead of a group")
    text: str | None = setting(None, "the second text, like wiki.txt.xz; without it, pydocs alone")
    ranks: str = setting("gpt2", "tokenizer of the second text: gpt2, or a file of its ranks")
    seeds: int = setting(3, "at most this many seeds for a row", low=1, high=3)
    dtype: str = setting("auto", "of the products, as in train.py")
    jobs: int = setting(1, "runs side by side, each on its share of the cores", low=1)
    checkpoints: bool = setting(
        False, "train also what models.json holds if its checkpoint is not here; the file stays"
    )
    report: bool = setting(False, "train nothing, only draw the reports again")


@dataclass(frozen=True)
class Run:
    """One model to train: a Row of a group, on one text, with one seed."""

    group: str
    row: grid.Row
    text: str
    seed: int

    @property
    def key(self):
        """What names the run in models.json."""
        return self.row.name, self.text, self.seed

    @property
    def folder(self):
        """Where it trains."""
        return trained_model(self.row.name, self.seed, self.text)


class Store:
    """results/models.json: {"runs": [...], "baselines_bits_per_byte": {...}}."""

    def __init__(self, path):
        self.path = path
        self.lock = threading.Lock()
        self.content = {"command": "python -m crate_mini.studies models", "runs": []}
        if path.exists():
            self.content = results.read_json(path)

    def holds(self, run):
        """Whether the run was made with the flags that the grid gives it now."""
        for old in self.content["runs"]:
            if (old["name"], old["text"], old["seed"]) == run.key:
                return (old["flags"], old["variant"]) == (run.row.flags, run.row.variant)
        return False

    def add(self, entry):
        """Put a run in the place of an earlier one of its key, in the grid's order, and save."""
        key = entry["name"], entry["text"], entry["seed"]
        with self.update():
            runs = self.content["runs"]
            others = [r for r in runs if (r["name"], r["text"], r["seed"]) != key]
            self.content["runs"] = sorted([*others, entry], key=place_in_grid)

    def set_baselines(self, bits_per_byte):
        """Put the baselines, {name: bits per byte}, in the place of earlier ones, and save."""
        with self.update():
            self.content["baselines_bits_per_byte"] = bits_per_byte

    @contextmanager
    def update(self):
        """Read the file again, as another process may have added runs; save after the block."""
        with self.lock:
            if self.path.exists():
                self.content = results.read_json(self.path)
            yield
            results.write_json(self.path, self.content)


def place_in_grid(entry):
    """A key that sorts runs as the grid does; runs of rows that are gone come last."""
    names = [row.name for rows in grid.GRID.values() for row in rows]
    known = entry["name"] in names
    return (names.index(entry["name"]) if known else len(names)), entry["text"], entry["seed"]


def run(settings):
    """Train what is missing, then write the reports. Raises UserError for an unknown row."""
    store = Store(results.ROOT / "results" / "models.json")
    results.ready_file(store.path)
    if not settings.report:
        missing = [r for r in chosen(settings) if is_missing(r, store, settings)]
        has_new = not all(store.holds(r) for r in missing)
        train_all(missing, store, settings)
        if has_new or "baselines_bits_per_byte" not in store.content:
            store.set_baselines(baselines())
    models_report.write(store.content, store.path.parent)
    print(f"\n{models_report.table(store.content)}")


def is_missing(run, store, settings):
    """Whether a run has to be trained: for its row in models.json, or for its checkpoint."""
    if not store.holds(run):
        return True
    return settings.checkpoints and not is_trained(run.folder / "last")


def chosen(settings):
    """The Runs that the settings ask for.

    Raises UserError for an unknown group or row, and if none of them has its text.
    """
    groups = list(grid.GRID)[:-1] if settings.group == "all" else settings.group.split(",")
    names = settings.only.split(",") if settings.only else None
    known = [row.name for rows in grid.GRID.values() for row in rows]
    for group in groups:
        if group not in grid.GRID:
            raise UserError(f"--group {group} is unknown; choose all, {one_of(grid.GRID)}.")
    for name in names or ():
        if name not in known:
            raise UserError(f"--only {name} is no row of the grid; choose {one_of(known)}.")
    runs = []
    for group, rows in grid.GRID.items():
        for row in rows:
            if row.name in names if names else group in groups:
                runs += runs_of(group, row, settings)
    if not runs:
        raise UserError(
            "the rows asked for need a second text; give --text wiki.txt.xz --ranks gpt2.tiktoken."
        )
    return runs


def runs_of(group, row, settings):
    """The Runs of a row: on each of its texts that is at hand."""
    runs = []
    for text in row.texts:
        if text != "pydocs" and settings.text is None:
            continue
        seeds = min(row.seeds, settings.seeds)
        runs += [Run(group, row, text, seed) for seed in grid.SEEDS[:seeds]]
    return runs


def train_all(runs, store, settings):
    """Train the runs, `jobs` at a time; each is in the store as soon as it has finished.

    When one fails, those that run already go on to their end, and the rest is not begun. An entry
    that the store holds stays as it is, so that tables do not move with the machine that makes a
    checkpoint again.
    """
    progress = terminal.Progress("models", len(runs), every=0)
    threads = max(1, torch.get_num_threads() // settings.jobs)  # of the cores we may use

    has_failed = threading.Event()  # seen by the next run sooner than the pool can be stopped

    def train_and_keep(run):
        if has_failed.is_set():
            return
        try:
            finished = train(run, settings, threads)
        except BaseException:
            has_failed.set()
            raise
        if not store.holds(run):
            store.add(finished)

    with ThreadPoolExecutor(settings.jobs) as pool:
        futures = [pool.submit(train_and_keep, run) for run in runs]
        try:
            for done, future in enumerate(futures, 1):
                future.result()
                progress.update(done)
        except BaseException:  # also Ctrl-C, which the running trainings receive too
            pool.shutdown(cancel_futures=True)
            raise


def train(run, settings, threads):
    """Train one model; returns its entry for models.json."""
    words = ["train.py"] if run.row.variant is None else variant_words(run.row.variant)
    flags = [*grid.SHARED.split(), *run.row.flags.split(), "--seed", str(run.seed)]
    flags += ["--dtype", settings.dtype, *text_flags(run.text, settings)]
    log = run.folder.with_name(f"{run.folder.name}.log")
    words = [*words, *flags, "--overwrite", "--out", str(run.folder)]
    seconds = run_script(words, log, threads)
    return entry(run, seconds, threads)


def variant_words(name):
    """How to start the training of a variant."""
    return ["-m", "crate_mini.studies.variants", name]


def text_flags(text, settings):
    """Flags of train.py for a text of the grid."""
    if text == "pydocs":
        return []
    spec = absolute(settings.ranks)
    if text == "wiki":
        spec = f"{spec}:{grid.WIKI_IDS}"
    return ["--data", absolute(settings.text), "--tokenizer", spec]


def entry(run, seconds, threads):
    """What models.json keeps of a finished run."""
    meta = results.read_json(run.folder / "last" / "config.json")
    training, config = meta["training"], Config(**meta["config"])
    with open(run.folder / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    curve = [[int(r["tokens"]), float(r["val_loss"])] for r in rows if r["val_loss"]]
    output = run.folder.with_name(f"{run.folder.name}.log").read_text(errors="replace")
    sample = output.partition("\nsample    ")[2].partition("\nresult ")[0]
    if run.row.variant:
        flops = variants.flops_per_token(run.row.variant, config)
    else:
        flops = device.flops_per_token(config)
    return {
        "name": run.row.name,
        "group": run.group,
        "text": run.text,
        "seed": run.seed,
        "flags": run.row.flags,
        "variant": run.row.variant,
        "hash": fingerprint(meta["config"], training["settings"]),
        "text_sha256": training["corpus"]["text_sha256"],
        "commit": training["machine"]["commit"],
        "machine": {**training["machine"], "threads": threads},
        "dtype": training["settings"]["dtype"],
        "parameters": parameters(run.folder),
        "flops_per_token": flops,
        "tokens": int(rows[-1]["tokens"]),
        "minutes": round(seconds / 60, 2),
        "val_loss": training["val_loss"],
        "bits_per_byte": training["bits_per_byte"],
        "density": training["density"],
        "curve": curve,
        "sample": sample.strip(),
    }


def parameters(folder):
    """Parameters of a finished run by the paper's rule: without positions, the tied head once.

    Counted in its weights, because a variant has some that its Config does not name.
    """
    meta = results.read_json(folder / "last" / "config.json")
    weights = torch.load(folder / "last" / meta["files"]["weights"]["name"], weights_only=True)
    counted = (w for name, w in weights.items() if not name.endswith(NOT_COUNTED))
    return sum(w.numel() for w in counted)


def fingerprint(config, settings):
    """A hash of everything that shapes the loss of a run, except the text."""
    kept = {name: value for name, value in settings.items() if name not in NO_RESULT}
    return hashlib.sha256(json.dumps([config, kept], sort_keys=True).encode()).hexdigest()[:12]


COMMAND = terminal.Command(Settings, run, checkpoint=False)
