"""Record: run a model over held-out documents and keep what scoring needs of each site.

    sites -> record -> record.json, record-shared.npz, record-<site>.npz (record_files.py)

Two passes over the documents: the first counts tokens and bigrams, the second runs the model, for
all sites at once. Memory depends on the model and the sites, not on the length of the corpus. The
seed alone decides on documents and windows, so that an untrained control sees what the trained
model saw.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch

from crate_mini import UserError
from crate_mini.console import terminal
from crate_mini.data.tokenizer import load_tokenizer
from crate_mini.intervene import hook_codes
from crate_mini.layers.measure import must_be_finite
from crate_mini.model import KINDS, Config
from crate_mini.neurons import npz, record_files
from crate_mini.neurons.accumulate import Shared, TokenStats, TopWindows
from crate_mini.neurons.documents import PARTS, WINDOW, FitScoreSplit
from crate_mini.neurons.histogram import BINS, LogHistogram
from crate_mini.training.checkpoint import untrained
from crate_mini.training.device import choose_dtype, machine, total_memory

UNIFORM = {"fit": 128, "score": 256}  # windows drawn uniformly, the same for all neurons
TOP = 36  # windows with the highest peaks, of each neuron in each part
BIGRAM_BYTES = 1 << 28  # of the sums by bigram, all sites together
BATCH_TOKENS = 1 << 13
SIZES = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")  # fields of Config
BATCH_FLOATS = 1 << 24  # activations of the widest site in a batch
UNDEFINED_IF_CONSTANT = ("skew", "kurtosis")  # NaN there; all else in a record is finite


@dataclass(frozen=True)
class Site:
    """Neurons to score: a layer's codes, or features computed from them.

    encode: None for the codes themselves, else codes (N, h) -> features (N, width).
    """

    name: str
    layer: int
    width: int
    encode: Callable | None = field(default=None, compare=False)
    sae: str | None = None  # file of the autoencoder
    sha256: str | None = None  # of that file
    limits: np.ndarray | None = field(default=None, compare=False)  # (width,), see cut.py


def sites(model, layers="all"):
    """The Site of each layer's codes; layers: "all", or numbers such as "0,2".

    Raises UserError for a layer that does not exist.
    """
    n = len(model.blocks)
    if layers == "all":
        numbers = range(n)
    else:
        numbers = sorted({_layer_number(word.strip(), n) for word in layers.split(",")})
    return [Site(f"L{i}", i, model.config.n_code) for i in numbers]


def _layer_number(word, n):
    if not word.isdecimal() or int(word) >= n:
        raise UserError(
            f"layer {word!r} does not exist; the model's layers are 0 to {n - 1}, as in --layers 0."
        )
    return int(word)


def untrained_control(model, meta, seed=0):
    """(model, meta): the same architecture with fresh weights on the same device, for init_r."""
    fresh = untrained(model.config, seed).to(model.tokens.weight.device)
    training = {"step": 0, "settings": {"seed": seed}}
    return fresh, {**meta, "sha256": None, "training": training}


def kind_of(config):
    """The nearest preset and what differs from it, size aside, like "crate, top_k=16"."""
    named = []
    for kind, changes in KINDS.items():
        preset = Config(**changes)
        words = [kind]
        for f in fields(Config):
            value = getattr(config, f.name)
            if f.name not in SIZES and value != getattr(preset, f.name):
                words.append(f"{f.name}={value}")
        named.append(words)
    return ", ".join(min(named, key=len))


def record(
    model,
    meta,
    sites,
    corpus,
    out,
    *,
    path="",
    command="",
    seed=0,
    tokens=1_000_000,
    dedup=True,
    dtype="auto",
    split="val",
    room=None,
    facts=None,
    log=print,
    show_every=3.0,
):
    """Record `sites` over about `tokens` tokens of a corpus split, in the folder `out`.

    Returns the Record. meta: from checkpoint.load; path, command: for the header. dedup: at most
    one top window per document (the paper's code does not dedup). dtype: see choose_dtype; sums are
    float32, powers float64. room: neurons that share the memory for bigrams, by default those of
    the sites. facts: makes further entries of the header from {site: densities}. The files are
    replaced all together or not at all. Raises UserError for too few windows, too little memory, or
    no room on the disk.
    """
    began = time.monotonic()
    device, V = model.tokens.weight.device, model.config.vocab_size
    eot = load_tokenizer(meta["tokenizer"]["spec"]).eot
    documents = FitScoreSplit(corpus, split, eot, model.config.block_size, seed, tokens)
    counts, token_counts, bigrams = _count(documents, sites, V, device, room)
    dtype, reason = choose_dtype(device, dtype)
    total = sum(counts["tokens"].values())
    log(f"record    {_what(sites, meta)}, {total:,} tokens; products in {_name(dtype)}: {reason}")
    windows = {part: (UNIFORM[part], counts["windows"][part]) for part in PARTS}
    shared = Shared(token_counts, bigrams, V, windows, seed, device)
    progress = terminal.Progress("record", total, show_every)
    arrays = _run(model, documents, sites, shared, dedup, dtype, progress)
    header = {
        "schema": record_files.SCHEMA,
        "command": command,
        "machine": machine(device),
        "seed": seed,
        "checkpoint": _checkpoint(model, meta, path),
        "corpus": corpus.meta,
        "split": split,
        **counts,
        "limit": tokens,
        "notes": documents.notes,
        "window": WINDOW,
        "dedup": dedup,
        "dtype": _name(dtype),
        "seconds": round(time.monotonic() - began, 1),
        "sites": [_description(site) for site in sites],
        **(facts or _no_facts)({site.name: arrays[site.name]["density"] for site in sites}),
    }
    record_files.write(Path(out), header, arrays)
    return record_files.load(out)


def _what(sites, meta):
    """What is recorded, in words; meta: as untrained_control returns it for the control."""
    n_sites = "1 site" if len(sites) == 1 else f"{len(sites)} sites"
    is_control = "sha256" in meta and meta["sha256"] is None
    return f"{n_sites} of an untrained model, the control" if is_control else n_sites


def _no_facts(densities):
    return {}


def limits(
    model, sites, corpus, share, *, eot, seed=0, tokens=1_000_000, dtype="auto", split="val"
):
    """{site: (width,)}: the least activation that at most `share` of a neuron's tokens reach.

    Read off histograms of the same tokens that `record` takes, in a pass of its own; seed, tokens,
    dtype and split must be the same there. Raises UserError as `record` does.
    """
    V, T = model.config.vocab_size, model.config.block_size
    device = model.tokens.weight.device
    documents = FitScoreSplit(corpus, split, eot, T, seed, tokens)
    counts = documents.count_tokens()
    none = np.empty((0, 2), np.int64)
    shared = Shared(np.zeros(V, np.int64), none, V, dict.fromkeys(PARTS, (0, 0)), seed, device)
    dtype, _ = choose_dtype(device, dtype)
    stats = {site.name: _Values(site.width, device) for site in sites}
    progress = terminal.Progress("limits", sum(counts.values()))
    _run_documents(model, documents, sites, shared, stats, dtype, progress)
    return {name: values.histogram.limits(share) for name, values in stats.items()}


class _Values:
    """The histogram of one site, in place of SiteStats."""

    def __init__(self, width, device):
        self.histogram = LogHistogram(width, device)

    def add(self, x, batch, part):
        x = x.flatten(0, 1)
        self.histogram.add(x if batch.text is None else x[batch.text])


def _count(documents, sites, V, device, room):
    """FitScoreSplit.count with as many bigrams as memory allows.

    Raises UserError if a part has no window, or if the arrays of the record would not fit.
    """
    most = max_bigrams(room or sum(site.width for site in sites))
    counts, token_counts, bigrams = documents.count(V, most)
    _check_windows(counts, documents)
    _check_memory(sites, V, len(bigrams), device)
    return counts, token_counts, bigrams


def products_dtype(model):
    """The name of the dtype that "auto" stands for on the model's device."""
    return _name(choose_dtype(model.tokens.weight.device, "auto")[0])


def max_bigrams(width):
    """The most bigrams that sums are kept of, for sites of this width together."""
    return BIGRAM_BYTES // 4 // width


def _run(model, documents, sites, shared, dedup, dtype, progress):
    """Send all documents through the model; {"shared" or site: {name: array}} of the record."""
    stats = {site.name: SiteStats(site, shared, dedup, shared.device) for site in sites}
    _run_documents(model, documents, sites, shared, stats, dtype, progress)
    arrays = {"shared": shared.results()}
    for name, site_stats in stats.items():
        arrays[name] = site_stats.results()
    return arrays


def _run_documents(model, documents, sites, shared, stats, dtype, progress):
    """Send all documents through the model; stats {site: object with SiteStats.add} take them."""
    widest = max(site.width for site in sites)
    size = max(documents.T, min(BATCH_TOKENS, BATCH_FLOATS // widest))
    done = 0
    for part in PARTS:
        for chunks in documents.batches(part, size):
            batch = shared.batch(part, chunks)
            _run_batch(model, batch, part, sites, stats, dtype)
            done += len(batch.token)
            progress.update(done)


@torch.no_grad()
def _run_batch(model, batch, part, sites, stats, dtype):
    """Send one batch through the model; the SiteStats of each site take its activations."""

    def observe(site):
        def take(codes):  # (R, C, h)
            must_be_finite(codes, f"a code of layer {site.layer}")
            x = codes.float()
            if site.encode is not None:
                features = site.encode(x.flatten(0, 1)).float()
                must_be_finite(features, f"a feature of {site.name}")
                x = features.unflatten(0, x.shape[:2])
            stats[site.name].add(x.contiguous(), batch, part)

        return take

    with ExitStack() as hooks:
        for site in sites:
            hooks.enter_context(hook_codes(model, site.layer, observe(site)))
        with torch.autocast(batch.ids.device.type, dtype, enabled=dtype != torch.float32):
            model.trunk(batch.ids)


class SiteStats:
    """The state of one site: statistics of all tokens, top and uniform windows."""

    def __init__(self, site, shared, dedup, device):
        self.site = site
        self.tokens = TokenStats(site.width, shared.V, len(shared.bigrams), device)
        self.top = {}
        self.uniform = {}
        for part in PARTS:
            shape = len(shared.uniform[part].numbers), WINDOW, site.width
            self.top[part] = TopWindows(site.width, TOP, dedup, device)
            self.uniform[part] = torch.zeros(shape, device=device)

    def add(self, x, batch, part):
        """Add a batch of a part; x (R, C, width) float32."""
        self.tokens.add(x, batch, part == "fit")
        self.top[part].offer(x, batch)
        for slot, row, start in batch.drawn:
            self.uniform[part][slot] = x[row, start : start + WINDOW]

    def results(self):
        """{name: array or Halves} of record-SITE.npz. Raises UserError for what is not finite."""
        arrays = self.tokens.results()
        for part in PARTS:
            arrays |= self.top[part].results(part)
            arrays[f"uniform_{part}_acts"] = self.uniform[part].cpu().numpy()
        for name, array in arrays.items():
            if name not in UNDEFINED_IF_CONSTANT and not np.isfinite(array).all():
                raise UserError(
                    f"{name} of {self.site.name} is not finite: the activations are too large to "
                    "sum in single precision; use a checkpoint with smaller weights."
                )
        for part in PARTS:
            for name, axis in ((f"top_{part}_acts", 0), (f"uniform_{part}_acts", -1)):
                arrays[name] = npz.Halves(arrays[name], axis)
        if self.site.limits is not None:
            arrays["limits"] = self.site.limits
        return arrays


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def _checkpoint(model, meta, path):
    """The header's facts about the model."""
    return {
        "path": str(path),
        "sha256": meta.get("sha256"),
        "kind": kind_of(model.config),
        "config": asdict(model.config),
        "training": meta.get("training", {}),
    }


def _description(site):
    facts = {"name": site.name, "layer": site.layer, "width": site.width, "sae": site.sae}
    return facts | ({"sha256": site.sha256} if site.sha256 else {})


def _check_windows(counts, documents):
    """Raise UserError unless both parts have windows."""
    if documents.T < WINDOW:
        raise UserError(
            f"the model's context of {documents.T} tokens is shorter than a window of {WINDOW}; "
            f"train one with --block-size {WINDOW} or more."
        )
    corpus, split = documents.corpus, documents.split
    for part in PARTS:
        if not counts["windows"][part]:
            source = corpus.meta["source"]["name"]
            raise UserError(
                f"the {split} split of {source} ({corpus.n_tokens[split]:,} tokens) leaves part "
                f"{part!r} without a document of {WINDOW} tokens; give more text with --data, or "
                "more --tokens."
            )


def _check_memory(sites, V, P, device):
    """Raise UserError if the arrays of a record would not fit into memory."""
    sums = 4 * (V + P)  # bytes per neuron
    uniform = 4 * WINDOW * sum(UNIFORM.values())
    top = 2 * TOP * (8 * WINDOW + 22)
    needed = (sums + uniform + top + 8 * BINS) * sum(site.width for site in sites)
    available = total_memory(device)
    if available and needed > 0.8 * available:
        raise UserError(
            f"{len(sites)} sites need about {needed / 1e9:.0f} GB of memory, {device} has "
            f"{available / 1e9:.0f}; record fewer layers at a time, as in --layers 0."
        )
