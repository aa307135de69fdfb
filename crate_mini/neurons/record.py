"""Record: run a model over held-out documents and keep, of each site, what scoring needs.

    sites -> record -> record.json, record-shared.npz, record-<site>.npz -> load -> select (excerpts.py)

    record.json          schema, seed, checkpoint, corpus, counts by part, sites; see `record`
    record-shared.npz    counts (V,) of tokens, pairs (P, 2) frequent bigrams and pair_counts (P,), of fit;
                         uniform_fit (128, 65), uniform_score (256, 65) windows and uniform_<part>_doc
    record-<site>.npz    of all tokens: mean var skew kurtosis density max (h,), hist (h, 50), hist_edges
                         (51,); of fit: token_sum (V, h), pair_sum (P, h); of both: uniform_<part>_acts (W,
                         64, h), top_<part>_tokens (h, 36, 65), _acts (h, 36, 64), _at, _doc (h, 36)

Two passes: one over the tokens (what is there, which bigrams are frequent), one through the model for all
sites at once. Memory depends on the model and the sites, not on the length of the corpus. The same seed deals
the same documents and windows, whatever the model: an untrained one's record lies in a folder of its own.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from crate_mini import UserError
from crate_mini.data.tokenizer import load_tokenizer
from crate_mini.model import KINDS, LM, to_dict
from crate_mini.neurons.accumulate import BINS, Shared, Tally, Top, half
from crate_mini.neurons.documents import PARTS, WINDOW, Parts, documents
from crate_mini.neurons.excerpts import Excerpts, select
from crate_mini.neurons.record_files import SCHEMA, Record, load, write
from crate_mini.training import device as machine

__all__ = [
    "Excerpts",
    "Record",
    "Site",
    "documents",
    "kind_of",
    "load",
    "record",
    "select",
    "sites",
    "untrained",
]

UNIFORM = {"fit": 128, "score": 256}  # windows drawn uniformly, the same for all neurons
TOP = 36  # windows of highest peak
PAIR_BYTES = 1 << 28  # of sums by bigram, all sites together
TOKENS, FLOATS = 1 << 13, 1 << 24  # of a batch, activations of a site in it


@dataclass(frozen=True)
class Site:
    """What is scored: a layer's codes, or features of them. encode: codes (N, h) -> features (N, width)."""

    name: str
    layer: int
    width: int
    encode: Callable | None = field(default=None, compare=False)
    sae: str | None = None  # where the autoencoder lies


def sites(model, layers="all"):
    """A Site for the codes of each layer; layers: "all", or numbers such as "0,2". UserError for others."""
    n = len(model.blocks)
    words = (
        [str(i) for i in range(n)]
        if layers == "all"
        else [word.strip() for word in layers.split(",")]
    )
    for word in words:
        if not word.isdecimal() or int(word) >= n:
            raise UserError(
                f"layer {word!r} is not there; the model's layers are 0 to {n - 1}, as in "
                "--layers 0."
            )
    return [Site(f"L{i}", i, model.config.n_code) for i in sorted({int(word) for word in words})]


def untrained(model, meta, seed=0):
    """(model, meta) of the same architecture with fresh weights, on the same device: for init_r."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = LM(model.config)
    return fresh.to(model.tokens.weight.device).eval(), {
        **meta,
        "sha256": None,
        "training": {"step": 0, "settings": {"seed": seed}},
    }


def kind_of(config):
    """crate, gpt2 or crate+ for a Config that is such a preset but for its size, else other."""
    return next(
        (
            kind
            for kind, words in KINDS.items()
            if all(getattr(config, name) == value for name, value in words.items())
        ),
        "other",
    )


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
    log=print,
):
    """Write the record of `sites` over about `tokens` tokens of a split to the folder `out`; returns it.

    meta: as checkpoint.load gives it; path, command: for the header. dedup: top windows hold at most one of a
    document (the paper's code does not dedup). dtype: of the model's products (see machine.choose_dtype);
    everything is counted in float32, powers in float64. The files are replaced all together or not at all.
    Raises UserError when there are too few documents or windows, too little memory, no room on the disk.
    """
    began, device, config = time.monotonic(), model.tokens.weight.device, model.config
    V, widest, T = config.vocab_size, max(site.width for site in sites), config.block_size
    pairs = PAIR_BYTES // 4 // sum(site.width for site in sites)
    parts = Parts(corpus, split, load_tokenizer(meta["tokenizer"]["spec"]).eot, T, seed, tokens)
    counts, seen, bigrams = parts.survey(V, pairs)
    _check(counts, corpus, split, T)
    _check_memory(sites, V, len(bigrams), device)
    dtype, reason = machine.choose_dtype(device, dtype)
    control = "" if meta.get("sha256") else " of an untrained model, the control"
    log(
        f"record    {len(sites)} sites{control}, {sum(counts['tokens'].values()):,} tokens; products in "
        f"{str(dtype).removeprefix('torch.')}: {reason}"
    )
    shared = Shared(
        seen,
        bigrams,
        V,
        {part: (UNIFORM[part], counts["windows"][part]) for part in PARTS},
        seed,
        device,
    )
    tallies = {
        site.name: _SiteTally(site, V, len(bigrams), shared, dedup, device) for site in sites
    }
    done, told, total = 0, time.monotonic(), sum(counts["tokens"].values())
    for part in PARTS:
        for chunks in parts.batches(part, max(T, min(TOKENS, FLOATS // widest))):
            batch = shared.batch(part, chunks)
            _run(model, batch, sites, tallies, part, dtype)
            done += len(batch.token)
            if time.monotonic() - told > 5 or done == total:
                told, rate = time.monotonic(), done / (time.monotonic() - began)
                left = round((total - done) / rate)
                log(
                    f"record    {done:,} of {total:,} tokens  {rate:,.0f} tokens/s  "
                    f"ETA {left // 60}:{left % 60:02d}"
                )
    header = {
        "schema": SCHEMA,
        "command": command,
        "machine": machine.describe(device),
        "seed": seed,
        "checkpoint": {
            "path": str(path),
            "sha256": meta.get("sha256"),
            "kind": kind_of(config),
            "config": to_dict(config),
            "training": meta.get("training", {}),
        },
        "corpus": corpus.meta,
        "split": split,
        "tokens": counts["tokens"],
        "documents": counts["documents"],
        "windows": counts["windows"],
        "window": WINDOW,
        "dedup": dedup,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": round(time.monotonic() - began, 1),
        "sites": [
            {"name": s.name, "layer": s.layer, "width": s.width, "sae": s.sae} for s in sites
        ],
    }
    arrays = {
        "shared": shared.results(),
        **{name: tally.results() for name, tally in tallies.items()},
    }
    write(Path(out), header, arrays)
    return load(out)


@torch.no_grad()
def _run(model, batch, sites, tallies, part, dtype):
    """One batch through the model; each site takes its activations as they pass."""

    def hook(site):
        def see(module, inputs, codes):
            with torch.autocast(codes.device.type, enabled=False):
                x = codes.float()
                if site.encode is not None:
                    x = site.encode(x.flatten(0, 1)).float().unflatten(0, x.shape[:2])
                tallies[site.name].add(x.contiguous(), batch, part)

        return see

    with ExitStack() as stack:
        for site in sites:
            handle = model.blocks[site.layer].sparsifier.code.register_forward_hook(hook(site))
            stack.callback(handle.remove)
        with torch.autocast(batch.ids.device.type, dtype, enabled=dtype != torch.float32):
            model.trunk(batch.ids)


class _SiteTally:
    """All that is kept of one site: a Tally, the Top of each part, activations in the uniform windows."""

    def __init__(self, site, V, P, shared, dedup, device):
        self.tally = Tally(site.width, V, P, device)
        self.top = {part: Top(site.width, TOP, dedup, device) for part in PARTS}
        self.uniform = {
            part: torch.zeros(
                len(shared.tokens[part]), WINDOW, site.width, dtype=torch.float16, device=device
            )
            for part in PARTS
        }

    def add(self, x, batch, part):
        """x (R, C, width) float32."""
        self.tally.add(x, batch, part == "fit")
        self.top[part].offer(x, batch)
        for slot, row, start in batch.drawn:
            self.uniform[part][slot] = half(x[row, start : start + WINDOW])

    def results(self):
        out = self.tally.results()
        for part in PARTS:
            out |= self.top[part].results(part)
            out[f"uniform_{part}_acts"] = self.uniform[part].cpu().numpy()
        return out


def _check(counts, corpus, split, T):
    """UserError unless both parts have windows."""
    of = f"the {split} split of {corpus.meta['source']['name']} ({corpus.n_tokens[split]:,} tokens)"
    if T < WINDOW:
        raise UserError(
            f"the model's context of {T} tokens is shorter than a window of {WINDOW}; train one "
            f"with --block-size {WINDOW} or more."
        )
    for part in PARTS:
        if not counts["windows"][part]:
            raise UserError(
                f"{of} gives {counts['documents'][part]} documents to the part {part!r}, none of "
                f"which has {WINDOW} tokens; give more text with --data, or more --tokens."
            )


def _check_memory(sites, V, P, device):
    """UserError if what is kept would fill the memory."""
    kept = (
        4 * V + 4 * P + 2 * WINDOW * sum(UNIFORM.values()) + 2 * TOP * (6 * WINDOW + 22) + 8 * BINS
    )
    need, have = kept * sum(site.width for site in sites), machine.total_memory(device)
    if have and need > 0.8 * have:
        raise UserError(
            f"{len(sites)} sites need about {need / 1e9:.0f} GB of memory, {device} has "
            f"{have / 1e9:.0f}; record fewer layers at a time, as in --layers 0."
        )
