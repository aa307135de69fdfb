"""`interpret.py neurons`: six stages, each from files to files, so that any can be run again alone.

    record    text, model                 -> record*               activations.py
    select    record                      -> select-SITE.npz       excerpts of every protocol
    explain   record, model               -> explain-SITE.jsonl    labels, effects on the next token, tries
    simulate  record, select, explain     -> simulate-SITE.npz     what each simulator expects, where
    score     all of them                 -> scores.jsonl, excerpts.jsonl, summary.json
    report    scores, excerpts, summary   -> index.html, human.html, scores.png, density.png

SITE is the name of a Site: L0 for the codes of layer 0. The folder `init` holds the record of the same
architecture untrained, the control; `probe` the short record that finds the thresholds of density matching.
What the stages share is a `Run`; they are in stages.py and results.py.
"""

import json
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from crate_mini import UserError, atomic_write
from crate_mini.neurons import record as activations
from crate_mini.neurons import score as results
from crate_mini.neurons import simulators as explain
from crate_mini.neurons import stages

STAGES = {
    "record": stages.record,
    "select": stages.select,
    "explain": stages.explain_all,
    "simulate": stages.simulate,
    "score": results.score_all,
    "report": results.report,
}
PARTS = ("tokens", "acts", "doc", "origin")  # of Excerpts


def run(r, start="record", until="report"):
    """The stages of a Run from `start` to `until`. What earlier ones have written stays, whatever happens."""
    names = list(STAGES)
    for flag, name in (("from", start), ("until", until)):
        if name not in names:
            raise UserError(f"--{flag} {name!r} is no stage; choose one of {', '.join(names)}.")
    chosen = names[names.index(start) : names.index(until) + 1]
    if not chosen:
        raise UserError(
            f"--until {until} comes before --from {start}; the order is {', '.join(names)}."
        )
    for name in chosen:
        began = time.monotonic()
        try:
            STAGES[name](r)
        except BaseException:
            if name != names[0]:
                r.log(
                    f"{name:9s} stopped; what the stages before it wrote is kept: --from {name} goes on"
                )
            raise
        r.log(f"{name:9s} {time.monotonic() - began:.1f} s")


@dataclass
class Run:
    """What the stages share: a model with its text, what is asked, and the folder that everything lies in."""

    model: object
    meta: dict
    tokenizer: object
    corpus: object
    folder: Path
    sites: list
    path: str = ""  # of the checkpoint, for the header
    command: str = ""
    seed: int = 0
    tokens: int = 1_000_000
    n: int = 0  # neurons of a site that are scored, drawn by the seed; 0: all
    controls: tuple = ("init", "shuffle")
    density: float = 0.0  # match-density: share of tokens on which a neuron may fire; 0: as it is
    trie: int = 0  # neurons of a site that get a trie
    dedup: bool = True  # top windows: at most one of a document
    directions: dict = field(
        default_factory=dict
    )  # {site: (width, h)}: what a unit of a feature is in codes
    log: Callable = print
    _record: object = None

    @property
    def record(self):
        """The record in the folder, opened when first asked for; UserError if another run left it there."""
        if self._record is None:
            found = activations.load(self.folder)
            here = found.header["checkpoint"]["sha256"], found.header["seed"]
            if here != (self.meta.get("sha256"), self.seed):
                raise UserError(
                    f"the record in {self.folder} is of another checkpoint or seed; make one "
                    "with --from record, or choose another --out."
                )
            self._record = found
        return self._record

    @record.setter
    def record(self, found):
        self._record = found

    @property
    def init(self):
        """The record of the untrained model; UserError if it is not of this text and architecture."""
        found = activations.load(self.folder / "init")
        theirs, ours = (
            [h["seed"], h["corpus"], h["tokens"], h["checkpoint"]["config"]]
            for h in (found.header, self.record.header)
        )
        if theirs != ours:
            raise UserError(
                f"the record in {self.folder / 'init'} is of another text, seed or model than "
                "that beside it; make both with --from record."
            )
        return found

    def each_site(self):
        """The sites one after the other; what was read of a site's record is dropped after its turn."""
        for site in self.sites:
            yield site
            self.record.site(site.name).forget()

    def rng(self, site, purpose):
        """A generator of its own for every site and purpose."""
        return np.random.default_rng([self.seed, *f"{site.name}/{purpose}".encode()])

    def neurons(self, site):
        """Numbers of the site's neurons that are scored, sorted: every one is as likely as any other."""
        if not self.n or self.n >= site.width:
            return np.arange(site.width)
        return np.sort(self.rng(site, "neurons").choice(site.width, self.n, replace=False))

    @property
    def has_init(self):
        """Whether there is an untrained model beside this one; no autoencoder is of such a model."""
        return "init" in self.controls and any(site.sae is None for site in self.sites)

    @property
    def saw(self):
        """{simulator: what it saw}, of those in this run."""
        absent = {
            "null": "shuffle" not in self.controls,
            "init": not self.has_init,
            "trie": not self.trie,
        }
        return {name: sentence for name, sentence in explain.SAW.items() if not absent.get(name)}

    def file(self, stage, site, kind="npz"):
        """Path of what a stage writes for a site."""
        return self.folder / f"{stage}-{site.name}.{kind}"

    def read(self, stage, site):
        """The arrays that a stage has written for a site; UserError if it has not, or not of this record."""
        path = self.file(stage, site)
        try:
            with np.load(path) as file:
                arrays = dict(file)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"Cannot read {path} ({error}); make it with --from {stage}.") from None
        if str(arrays.pop("stamp", "")) != self.record.header["stamp"]:
            raise UserError(
                f"{path} is of another record than is there now; make it with --from {stage}."
            )
        return SimpleNamespace(**arrays)

    def write(self, stage, site, arrays):
        """Write arrays for `read`."""
        with atomic_write(self.file(stage, site)) as file:
            np.savez(file, stamp=np.array(self.record.header["stamp"]), **arrays)

    def chosen(self, selected, protocol, part, i):
        """The Excerpts of scored neuron number i from what `select` has written."""
        found = {name: getattr(selected, f"{protocol}_{part}_{name}")[i] for name in PARTS}
        n = int((found["origin"] != "").sum())
        return SimpleNamespace(**{name: value[:n] for name, value in found.items()})

    def explained(self, site):
        """The lines that `explain` has written; UserError if they are not of the neurons that are scored, or
        not of this record: their labels may have been made from the documents that now score."""
        path = self.file("explain", site, "jsonl")
        try:
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            if {line.get("record") for line in lines} != {self.record.header["stamp"]}:
                reason = "it is of another record than is there now"
            elif [line["neuron"] for line in lines] == self.neurons(site).tolist():
                return lines
            else:
                reason = "it is of other neurons"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = error
        raise UserError(f"Cannot use {path} ({reason}); make it with --from explain.")

    def tables(self, site, neurons, record=None):
        """The n-gram tables of some neurons of a site, from the fit part of a record, by default this one."""
        record = record or self.record
        shared, own = record.shared, record.site(site.name)
        return explain.Backoff(
            shared["counts"],
            own["token_sum"][:, neurons],
            shared["pairs"],
            shared["pair_counts"],
            own["pair_sum"][:, neurons],
        )
