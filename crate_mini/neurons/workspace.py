"""The state that the stages of `interpret.py neurons` share: model, text, settings, files."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from crate_mini import UserError
from crate_mini.console.results import atomic_write
from crate_mini.neurons import npz, record_files, score_files
from crate_mini.neurons.cut import cut_site
from crate_mini.neurons.documents import FitScoreSplit
from crate_mini.neurons.record import max_bigrams
from crate_mini.neurons.simulators import SAW, NgramTable

FACTS = ("stamp", "neurons", "before")  # in the file of a stage: what it was made from
EXCERPT_ARRAYS = ("tokens", "acts", "doc", "origin")  # the fields of Excerpts that `select` keeps
TEXT_FACTS = ("text_sha256", "tokenizer_hash", "val_fraction")  # of Corpus.meta: which text it is


@dataclass
class Workspace:
    """A model with its text, the settings of the command, and the folder that holds all files.

    A stage reads the files of earlier stages and writes its own. Each file carries the stamp of
    the record it was made from and the choices that it depends on, so that files of two records,
    or of two choices, never mix.
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
    splits: int = 0  # other splits of the documents to record, for the spread of means
    trie: int = 0  # neurons in each site that get a trie
    dedup: bool = True  # top windows: at most one from each document
    directions: dict = field(default_factory=dict)  # {site: (width, h)}, of features in codes
    log: Callable = print
    _record: object = None

    # ---- records ---------------------------------------------------------------------------------

    @property
    def record(self):
        """The record in the folder, opened at first use.

        Raises UserError if it was made from another checkpoint, or with other settings than these.
        """
        if self._record is None:
            loaded = record_files.load(self.folder)
            checkpoint = loaded.header["checkpoint"]["sha256"]
            if (checkpoint, loaded.header["seed"]) != (self.meta.get("sha256"), self.seed):
                raise UserError(
                    f"the record in {self.folder} is of another checkpoint or seed; make a new one "
                    "with --from record, or choose another --out."
                )
            problem = next(self._other_settings(loaded), None)
            if problem:
                raise UserError(
                    f"the record in {self.folder} {problem}; give the same again, or make a new "
                    "record with --from record."
                )
            self._record = loaded
        return self._record

    def _other_settings(self, record):
        """Yield how these settings differ from those of a record, as the end of a sentence."""
        header = record.header
        for fact in TEXT_FACTS:
            if header["corpus"].get(fact) != self.corpus.meta.get(fact):
                yield "is of other text than --data, --val-fraction and the tokenizer give now"
        if header["dedup"] != self.dedup:
            yield f"was made with {'--dedup' if header['dedup'] else '--no-dedup'}"
        recorded = {site["name"]: site for site in header["sites"]}
        for site in self.sites:
            weights = recorded.get(site.name, {}).get("sha256")
            if weights not in (None, site.sha256):
                yield f"is of another autoencoder {site.sae}, which has been trained again since"
        splits = self.folder / "splits.json"
        if self.splits and not splits.exists():
            yield f"was made with --splits 0, not {self.splits}"
        complete = len(record.shared["pairs"]) < max_bigrams(
            sum(site["width"] for site in header["sites"])
        )
        if not complete and set(recorded) != {site.name for site in self.sites}:
            yield f"is of {', '.join(recorded)}, which share its room for bigrams"
        T, eot = self.model.config.block_size, self.tokenizer.eot
        documents = FitScoreSplit(self.corpus, header["split"], eot, T, self.seed, self.tokens)
        if documents.count_tokens() != header["tokens"]:
            n = sum(header["tokens"].values())
            yield f"has {n:,} tokens, which are others than --tokens {self.tokens} chooses"

    def check_record(self):
        """Raise UserError unless there is a record, made with these settings."""
        self._record = self.record

    def open_new_record(self):
        """Take the record that was just made in the folder, with the settings of this object."""
        self._record = record_files.load(self.folder)

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

    def recorded(self, site):
        """The Site whose activations the record holds: cut ones with density matching."""
        if not self.density:
            return site
        return cut_site(site, self.record.site(site.name)["limits"])

    # ---- choices ---------------------------------------------------------------------------------

    def rng(self, site, purpose):
        """A random generator for one site and one purpose, independent of all others."""
        return np.random.default_rng([self.seed, *f"{site.name}/{purpose}".encode()])

    def neurons(self, site):
        """Indices of the site's neurons to score, ascending; all are equally likely to be drawn."""
        if not self.n or self.n >= site.width:
            return np.arange(site.width)
        return np.sort(self.rng(site, "neurons").choice(site.width, self.n, replace=False))

    def chunks(self, part):
        """The Chunks of a part of the text, as they were recorded."""
        T, eot = self.model.config.block_size, self.tokenizer.eot
        split = self.record.header["split"]
        return FitScoreSplit(self.corpus, split, eot, T, self.seed, self.tokens).chunks(part)

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
        """Write {name: array or npz.Halves} of a stage, to be read with `read`."""
        facts = {
            "stamp": np.array(self.record.header["stamp"]),
            "neurons": self.neurons(site),
            "before": np.array(self._before(stage, site)),
        }
        with atomic_write(self.file(stage, site)) as file:
            npz.write(file, {**facts, **arrays})

    def read(self, stage, site):
        """The arrays that a stage wrote for a site, as attributes of a namespace.

        Raises UserError as `check_file` does.
        """
        self.check_file(stage, site)
        return SimpleNamespace(**npz.arrays(self.file(stage, site), _make(stage)))

    def check_file(self, stage, site):
        """Raise UserError unless the file of a stage for a site can be used.

        It may be missing or damaged, or made from another record, for other neurons, or before a
        file that it was made from was made again.
        """
        if stage == "explain":
            self.explanations(site)
            return
        path = self.file(stage, site)
        facts = npz.arrays(path, _make(stage), FACTS)
        if str(facts["stamp"]) != self.record.header["stamp"]:
            raise UserError(f"{path} is of another record; make it again with --from {stage}.")
        neurons, wanted = facts["neurons"], self.neurons(site)
        if not np.array_equal(neurons, wanted):
            differs = f"{len(neurons)} neurons, not of {len(wanted)}"
            if len(neurons) == len(wanted):
                differs = "other neurons"
            raise UserError(
                f"{path} is of {differs}; make it again with --from {stage}, or give the --n that "
                "it was made with."
            )
        if str(facts["before"]) != self._before(stage, site):
            raise UserError(
                f"{path} is older than what it was made from; make it again with --from {stage}."
            )

    def _before(self, stage, site):
        """A digest of what a stage reads of the stages before it; "" for the first."""
        if stage == "select":
            return ""
        path = self.file("select", site)
        if not path.exists():
            raise UserError(f"{path} is missing; make it with --from select.")
        digest = hashlib.sha256(path.read_bytes())
        labels = [line["label"] for line in self.explanations(site)]
        digest.update(json.dumps(labels).encode())
        return digest.hexdigest()[:16]

    @property
    def made_with(self):
        """What the scores of these settings are made with: a JSON-able dict."""
        return {
            "record": self.record.header["stamp"],
            "n": self.n,
            "controls": list(self.controls),
            "match_density": self.density or None,
            "splits": self.splits,
            "trie": self.trie,
        }

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
        lines = score_files.read_rows(path, "explain")
        neurons = self.neurons(site).tolist()
        tries = sum("trie" in line for line in lines)
        if {line.get("record") for line in lines} != {self.record.header["stamp"]}:
            reason = "it is of another record"
        elif [line.get("neuron") for line in lines] != neurons:
            reason = "it is of other neurons"
        elif tries != min(self.trie, len(neurons)):
            reason = f"it has {tries} tries, unlike --trie {self.trie}"
        else:
            return lines
        raise UserError(f"cannot use {path} ({reason}); make it again with --from explain.")

    def check_scores(self, rows, summary):
        """Raise UserError unless scores in the folder are of these settings; for a report of them.

        rows: of scores.jsonl; summary: of summary.json.
        """
        scored = [(row["site"], row["neuron"]) for row in rows]
        wanted = [(site.name, j) for site in self.sites for j in self.neurons(site).tolist()]
        saw = summary.get("what_the_simulator_saw", {})
        same = {"n": self.n}  # two of them may choose the same neurons
        made_with = {**summary.get("made_with", self.made_with), **same}
        if (
            sorted(scored) != sorted(wanted)
            or set(saw) != set(self.saw)
            or made_with != {**self.made_with, **same}
        ):
            raise UserError(
                f"the scores in {self.folder} are of other --layers, --n, --controls, --trie "
                "or --splits than these; give the same again, or score again with --from select."
            )


def _make(stage):
    """The end of a sentence about a file that cannot be used."""
    return f"make it with --from {stage}"


def _origin(header):
    """The facts that the records of a model and of its untrained control must share."""
    names = ("seed", "corpus", "tokens", "dedup")
    return ([header[name] for name in names], header["checkpoint"]["config"])
