"""Reviews whose words give their class away, a classifier of them, and a finished run of concepts.

What takes seconds to make is made once for all test modules and processes, in pytest's temporary
folder `root`, which is tmp_path_factory.getbasetemp().
"""

import fcntl
import json
import pickle
from functools import wraps

import numpy as np
import torch

from crate_mini import model
from crate_mini.concepts import command, finetune
from crate_mini.data.tokenizer import load_tokenizer
from crate_mini.training import checkpoint

SPEC = "pydocs:511"
EVIL = "<script>alert(1)</script>"
GOOD = ["fine", "lovely", "warm", "clever", "bright"]
BAD = ["dull", "awful", "cold", "stupid", "grey"]
FILLER = ["the", "a", "film", "plot", "actor", "scene", "of", "and", "it", EVIL]


def reviews(n, seed=0, filler=FILLER):
    """n rows {"text", "label"}: eight words of filler and three of the class, shuffled."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        words = [*rng.choice(filler, 8), *rng.choice((BAD, GOOD)[i % 2], 3)]
        rows.append({"text": " ".join(rng.permutation(words)), "label": i % 2})
    return rows


def write(path, rows):
    """Write rows as .jsonl; returns the path."""
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def once(make):
    """make(root), made by the first process that asks and kept in a file for the others."""

    @wraps(make)
    def keep(root):
        folder = root / "planted_reviews"
        folder.mkdir(exist_ok=True)
        result = folder / f"{make.__name__}.pickle"
        with open(folder / f"{make.__name__}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not result.exists():
                result.write_bytes(pickle.dumps(make(root)))
        return pickle.loads(result.read_bytes())

    return keep


@once
def base(root):
    """The folder of an untrained CRATE of two layers with the embedded tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = model.LM(model.preset("2L", n_embd=32, block_size=64, vocab_size=512))
    folder = root / "planted_reviews" / "base" / "last"
    tokenizer = {"spec": SPEC, "hash": load_tokenizer(SPEC).hash}
    checkpoint.save(folder, lm, tokenizer=tokenizer, training={"step": 0})
    return folder


@once
def trained(root):
    """(settings, facts) of a classifier of planted reviews; the name of one class holds markup."""
    folder = root / "planted_reviews" / "classifier"
    folder.mkdir(parents=True)
    settings = finetune.Settings(
        init=str(base(root)),
        data=str(write(folder / "reviews.jsonl", reviews(260))),
        names="bad<b>,good",
        length=40,
        epochs=6,
        lr=3e-3,
        device="cpu",
        out=str(folder / "run"),
    )
    return settings, finetune.finetune(settings, log=silent)


@once
def finished_run(root):
    """(settings, checkpoint) of a finished run of `interpret.py concepts` on that classifier."""
    ckpt = f"{trained(root)[0].out}/last"
    settings = command.Settings(
        k=12,
        seeds="0,1",
        epochs=3,
        nodes=4,
        whole=45,
        methods="clvq,kmeans",
        shown=5,
        device="cpu",
        out=str(root / "planted_reviews" / "concepts"),
    )
    command.run(settings, ckpt)
    return settings, ckpt


def silent(line):
    """A log that keeps nothing."""
