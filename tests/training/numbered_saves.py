"""Checkpoints of a tiny model, each of which carries the number of its save in all its files."""

import hashlib
import json
from functools import cache
from pathlib import Path

import torch

from crate_mini.model import LM, preset
from crate_mini.training import checkpoint

TINY = dict(n_embd=8, n_head=2, vocab_size=23, block_size=6)
IDS = torch.arange(12).view(2, 6)


@cache
def trained(**changes):
    """A model and its optimizer after one step."""
    lm = LM(preset("1L", **{**TINY, **changes}))
    optimizer = torch.optim.AdamW(lm.parameters(), lr=0.01)
    lm(IDS, IDS).backward()
    optimizer.step()
    return lm, optimizer


def save(path, step=1, resume=True, **changes):
    """Save a model of which one weight is filled with `step`; returns it and its resume state."""
    lm, optimizer = trained(**changes)
    with torch.no_grad():
        lm.positions.weight.fill_(step)
    state = {"step": step, "optimizer": optimizer.state_dict()} if resume else None
    checkpoint.save(
        path,
        lm,
        tokenizer={"spec": "bytes", "hash": "abc"},
        resume=state,
        training={"step": step, "val_loss": 0.1 + 0.2, "best": float("inf")},
    )
    return lm, state


def saved_step(path):
    """The number of the save that a checkpoint is of."""
    return checkpoint.load(path)[1]["training"]["step"]


def holds(path, step):
    """Whether a checkpoint is whole and all its files are of the save `step`."""
    lm, meta = checkpoint.load(path)
    meta_again, state, weights = checkpoint.load_resume(path)
    steps = {
        meta["training"]["step"],
        state["step"],
        int(lm.positions.weight[0, 0]),
        int(weights["positions.weight"][-1, -1]),
    }
    return equal(meta, meta_again) and steps == {step}


def edit(path, seal=True, **changes):
    """Rewrite config.json, with a fitting sha256 if `seal`: an attacker, or a future version."""
    config = Path(path, "config.json")
    meta = {**json.loads(config.read_bytes()), **changes}
    if seal:
        meta["sha256"] = checkpoint._digest(meta)
    config.write_text(json.dumps(meta))


def replace_data(path, kind, content):
    """Replace the data file of a kind by an object that torch.save writes, with fitting hashes."""
    files = json.loads(Path(path, "config.json").read_bytes())["files"]
    file = Path(path, files[kind]["name"])
    torch.save(content, file)
    files[kind]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    edit(path, files=files)


def equal(a, b):
    """Whether nested containers are equal, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b
