"""The state that the stages of `interpret.py neurons` share: model, text, settings, files."""

import json
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from crate_mini import UserError, atomic_write
from crate_mini.neurons import record_files
from crate_mini.neurons.simulators import SAW, NgramTable

EXCERPT_ARRAYS = ("tokens", "acts", "doc", "origin")  # the fields of Excerpts that `select` keeps


@dataclass
class Workspace:
    """A model with its text, the settings of the command, and the folder that holds all files.

    A stage reads the files of earlier stages and writes its own. Each file carries the stamp of
    the record it was made from, so that files of two records never mix.
    """

    model: object
    meta: dict  # of the model, from checkpoint.load
    tokenizer: object
    corpus: object
    folder: Path
    sites: list
    path: str = ""  # of the checkpoint, for the header
    command: str = ""
    seed: int = 0
    tokens: int = 1_000_000
    n: int = 0  # neurons to score in each site, drawn by the seed; 0: all
    controls: tuple = ("init", "shuffle")
    density: float = 0.0  # share of tokens on which a neuron may fire; 0: no limit
    trie: int = 0  # neurons in each site that get a trie
    dedup: bool = True  # top windows: at most one from each document
    directions: dict = field(default_factory=dict)  # {site: (width, h)}, of features in codes
    log: Callable = print
    _record: object = None

    # ---- records ---------------------------------------------------------------------------------

    @property
    def record(self):
        """The record in the folder, opened at first use.

        Raises UserError if it was made from another checkpoint or with another seed.
        """
        if self._record is None:
            loaded = record_files.load(self.folder)
            checkpoint = loaded.header["checkpoint"]["sha256"]
            if (checkpoint, loaded.header["seed"]) != (self.meta.get("sha256"), self.seed):
                raise UserError(
                    f"the record in {self.folder} is of another checkpoint or seed; make a new one "
                    "with --from record, or choose another --out."
                )
            self._record = loaded
        return self._record

    def forget_record(self):
        """Open the record again at the next use: its files have changed."""
        self._record = None

    @property
    def has_init(self):
        """Whether the control `init` applies: no autoencoder was trained on an untrained model."""
        return "init" in self.controls and any(site.sae is None for site in self.sites)

    @property
    def init_record(self):
        """The record of the untrained model.

        Raises UserError unless it has the same text, seed and architecture as the record.
        """
        folder = self.folder / "init"
        loaded = record_files.load(folder)
        if _origin(loaded.header) != _origin(self.record.header):
            raise UserError(
                f"the record in {folder} is of another text, seed or model than the one in "
                f"{self.folder}; make both with --from record."
            )
        return loaded

    def each_site(self):
        """Yield the sites; what was read from a site's record is dropped after its turn."""
        for site in self.sites:
            yield site
            self.record.site(site.name).forget()

    # ---- choices ---------------------------------------------------------------------------------

    def rng(self, site, purpose):
        """A random generator for one site and one purpose, independent of all others."""
        return np.random.default_rng([self.seed, *f"{site.name}/{purpose}".encode()])

    def neurons(self, site):
        """Indices of the site's neurons to score, ascending; all are equally likely to be drawn."""
        if not self.n or self.n >= site.width:
            return np.arange(site.width)
        return np.sort(self.rng(site, "neurons").choice(site.width, self.n, replace=False))

    @property
    def saw(self):
        """{simulator: a sentence on what it saw}, for the simulators and controls of this run."""
        absent = set()
        if "shuffle" not in self.controls:
            absent.add("null")
        if not self.has_init:
            absent.add("init")
        if not self.trie:
            absent.add("trie")
        return {name: sentence for name, sentence in SAW.items() if name not in absent}

    def ngram_table(self, site, neurons, record=None):
        """The NgramTable of some neurons of a site, from the fit part of a record.

        record: by default the record of this workspace.
        """
        record = record or self.record
        shared, arrays = record.shared, record.site(site.name)
        return NgramTable(
            shared["counts"],
            arrays["token_sum"][:, neurons],
            shared["pairs"],
            shared["pair_counts"],
            arrays["pair_sum"][:, neurons],
        )

    # ---- files of the stages ---------------------------------------------------------------------

    def file(self, stage, site, suffix="npz"):
        """Path of the file that a stage writes for a site."""
        return self.folder / f"{stage}-{site.name}.{suffix}"

    def write(self, stage, site, arrays):
        """Write {name: array} of a stage, to be read with `read`."""
        with atomic_write(self.file(stage, site)) as file:
            np.savez(file, stamp=np.array(self.record.header["stamp"]), **arrays)

    def read(self, stage, site):
        """The arrays that a stage wrote for a site, as attributes of a namespace.

        Raises UserError if the file is missing, damaged or made from another record.
        """
        path = self.file(stage, site)
        try:
            with np.load(path) as file:
                arrays = dict(file)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"cannot read {path} ({error}); make it with --from {stage}.") from None
        if str(arrays.pop("stamp", "")) != self.record.header["stamp"]:
            raise UserError(f"{path} is of another record; make it again with --from {stage}.")
        return SimpleNamespace(**arrays)

    def selected(self, arrays, protocol, part, i):
        """The excerpts of the i-th scored neuron, without padding; arrays: what `select` wrote."""
        excerpts = {
            name: getattr(arrays, f"{protocol}_{part}_{name}")[i] for name in EXCERPT_ARRAYS
        }
        n = int((excerpts["origin"] != "").sum())
        return SimpleNamespace(**{name: values[:n] for name, values in excerpts.items()})

    def explanations(self, site):
        """The lines that `explain` wrote for a site, a dict each, in the order of `neurons`.

        Raises UserError unless they are of this record and of these neurons: labels from another
        record may have been made from the documents that now score them.
        """
        path = self.file("explain", site, "jsonl")
        try:
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            if {line.get("record") for line in lines} != {self.record.header["stamp"]}:
                reason = "it is of another record"
            elif [line["neuron"] for line in lines] != self.neurons(site).tolist():
                reason = "it is of other neurons"
            else:
                return lines
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = error
        raise UserError(f"cannot use {path} ({reason}); make it again with --from explain.")


def _origin(header):
    """The facts that the records of a model and of its untrained control must share."""
    return (header["seed"], header["corpus"], header["tokens"], header["checkpoint"]["config"])
