"""A small model, its documents, their record, and the same by brute force: for tests of records."""

import tempfile
from functools import cache

import numpy as np
import torch

from crate_mini.data.batches import Corpus
from crate_mini.data.tokenizer import load_tokenizer
from crate_mini.model import LM, preset
from crate_mini.neurons.documents import PARTS, WINDOW, FitScoreSplit
from crate_mini.neurons.record import record, sites

BYTES = load_tokenizer("bytes")
META = {"tokenizer": {"spec": "bytes"}, "training": {"step": 7}, "sha256": "of a test"}
T = 160  # context: a chunk has two windows and a remainder
H = 64  # neurons of a layer
FOLDERS = []  # of the records, which exist until Python exits
WORDS = ["the", "cat", "sat", "on", "a", "mat", "<b>", "wörd", "12", "\n"]


class Ids:
    """A corpus of given ids, with what recording needs of a Corpus."""

    meta = {"source": {"name": "ids"}}
    blocks = Corpus.blocks

    def __init__(self, ids):
        self.ids = np.asarray(ids)
        self.n_tokens = {"val": len(ids)}
        self.streams = {"val": self}

    def read(self, start, count):
        return self.ids[start : start + count].astype(np.int64)


def random_text(rng, n):
    """About n characters, in words of which bigrams repeat."""
    return " ".join(rng.choice(WORDS, n // 3 + 1))[: max(1, n)]


def no_log(line):
    pass


@cache
def world(kind="crate"):
    """(model, corpus): two layers of 64 neurons, 90 documents of 1 to 900 characters."""
    torch.manual_seed(0)
    config = preset("1L", kind, vocab_size=257, block_size=T, n_layer=2, n_head=2, n_embd=16)
    model = LM(config).eval()
    for p in model.parameters():  # livelier than at initialisation
        p.data.mul_(1.5)
    rng = np.random.default_rng(0)
    texts = [random_text(rng, int(n)) for n in rng.integers(1, 900, 90)]
    ids = np.concatenate([[*text.encode(), BYTES.eot] for text in texts])
    return model, Ids(ids)


def make_record(out, model=None, meta=META, corpus=None, chosen=None, layers="all", **changes):
    """The Record of a model over a corpus, both the world's by default, in float32.

    chosen: the sites, by default the codes of `layers`.
    """
    model = model or world()[0]
    corpus = corpus or world()[1]
    chosen = chosen or sites(model, layers)
    settings = {"dtype": "float32", "log": no_log, **changes}
    return record(model, meta, chosen, corpus, out, **settings)


@cache
def recorded(**changes):
    """The Record of the world, made once for each set of arguments."""
    folder = tempfile.TemporaryDirectory()
    FOLDERS.append(folder)
    return make_record(folder.name, **changes)


@cache
def truth(seed=0):
    """{part: [(document, ids (n,), acts (n, 2, 64)) of each chunk]}, by brute force."""
    model, corpus = world()
    chunks = {part: [] for part in PARTS}
    for number, ids, part in FitScoreSplit(corpus, "val", BYTES.eot, T, seed, 1e6).documents():
        for start in range(0, len(ids), T):
            chunk = torch.from_numpy(ids[start : start + T])
            with torch.no_grad():
                codes = model.trunk(chunk[None])[1]
            acts = torch.stack(codes, 2)[0].numpy()
            chunks[part].append((number, chunk.numpy(), acts))
    return chunks


def windows(part, layer, seed=0):
    """[(document, 65 tokens, acts (64, 64))] of all windows of a part, by brute force."""
    cut = []
    for document, ids, acts in truth(seed)[part]:
        padded = np.append(-1, ids)
        for start in range(0, len(ids) - WINDOW + 1, WINDOW):
            tokens = padded[start : start + WINDOW + 1]
            cut.append((document, tokens, acts[start : start + WINDOW, layer]))
    return cut
