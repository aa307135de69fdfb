"""A little world that every test of records shares: a model, documents, its record and the truth."""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch

from crate_mini.data import batches as data
from crate_mini.model import LM, preset
from crate_mini.neurons import record as activations
from crate_mini.neurons.documents import PARTS, WINDOW, part_of
from crate_mini.neurons.record import documents, record

BYTES = data.load_tokenizer("bytes")
META = {"tokenizer": {"spec": "bytes"}, "training": {"step": 7}, "sha256": "of a test"}
T, H = 160, 64  # chunks of two windows and a rest; neurons


class Ids:
    """A corpus of given ids, with all that documents() asks of one."""

    def __init__(self, ids):
        self.ids, self.n_tokens, self.meta = (
            np.asarray(ids),
            {"val": len(ids)},
            {"source": {"name": "ids"}},
        )

    blocks, batch = data.Corpus.blocks, data.Corpus.batch

    def _read(self, split, start, count):
        return self.ids[start : start + count].astype(np.int64)


def text(rng, n):
    """About n bytes in words of which some are frequent, so that bigrams repeat."""
    words = ["the", "cat", "sat", "on", "a", "mat", "<b>", "wörd", "12", "\n"]
    return " ".join(rng.choice(words, n // 3 + 1))[: max(1, n)]


@cache
def world(kind="crate"):
    """(model, corpus): two layers of 64 neurons, 90 documents of 1 to 900 bytes."""
    torch.manual_seed(0)
    config = preset("1L", kind, vocab_size=257, block_size=T, n_layer=2, n_head=2, n_embd=16)
    model, rng = LM(config).eval(), np.random.default_rng(0)
    for p in model.parameters():  # livelier than at initialisation
        p.data.mul_(1.5)
    texts = [text(rng, int(n)) for n in rng.integers(1, 900, 90)]
    ids = np.concatenate([[*t.encode(), BYTES.eot] for t in texts])
    return model, Ids(ids)


def quiet(line):
    pass


@cache
def recorded(**changes):
    """(Record, folder) of the world, made once for each set of arguments."""
    model, corpus = world()
    folder = Path(tempfile.mkdtemp())
    return record(
        model, META, activations.sites(model), corpus, folder, dtype="float32", log=quiet, **changes
    )


@cache
def truth(seed=0):
    """By brute force, one document at a time: {part: [(document, ids, acts (n, 2, 64)) of each chunk]}."""
    model, corpus = world()
    found = {part: [] for part in PARTS}
    for number, ids in documents(corpus, "val", BYTES.eot):
        for start in range(0, len(ids), T):
            chunk = torch.from_numpy(ids[start : start + T])
            with torch.no_grad():
                codes = model.trunk(chunk[None])[1]
            found[part_of(number, seed)].append(
                (number, chunk.numpy(), torch.stack(codes, 2)[0].numpy())
            )
    return found


def windows(part, layer, seed=0):
    """(document, 65 tokens, acts (64, 64)) of all windows of a part."""
    return [
        (
            doc,
            np.append([-1] * (s == 0), ids[max(0, s - 1) : s + WINDOW]),
            acts[s : s + WINDOW, layer],
        )
        for doc, ids, acts in truth(seed)[part]
        for s in range(0, len(ids) - WINDOW + 1, WINDOW)
    ]
