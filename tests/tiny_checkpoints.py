"""Checkpoints with random weights, and what interpret.py leaves next to them."""

import random
from unittest import mock

import torch

from crate_mini import model
from crate_mini.console import results
from crate_mini.data.batches import open_corpus
from crate_mini.data.tokenizer import load_tokenizer
from crate_mini.training import checkpoint

T = 32  # context
H = 128  # codes of a layer
WORDS = ("code", "rate", "step", "sparse", "token", "signal", "head", "prompt")


def write_text(path):
    """700 lines of random words; returns the path."""
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=8)) + ".\n" for _ in range(700)]
    path.write_text("".join(lines))
    return path


def save_checkpoint(folder, text, kind="crate", context=T):
    """A two-layer model of bytes; neuron 3 of layer 0 is dead. Returns the folder."""
    torch.manual_seed(0)
    config = model.preset("2L", kind, vocab_size=320, block_size=context, n_embd=32, n_head=2)
    lm = model.LM(config)
    sparsifier = lm.blocks[0].sparsifier
    with torch.no_grad():
        lm.tokens.weight *= 8
        if kind == "gpt2":
            sparsifier.fc.weight[3].zero_()
        else:
            sparsifier.D[:, 3].zero_()
    tokenizer = load_tokenizer("bytes")
    corpus = open_corpus(str(text), tokenizer, log=mock.Mock())
    training = {
        "step": 0,
        "val_loss": 5.0,
        "settings": {"data": str(text), "val_fraction": 0.1},
        "corpus": corpus.meta,
    }
    facts = {"spec": "bytes", "hash": tokenizer.hash}
    checkpoint.save(folder, lm, tokenizer=facts, training=training)
    return folder


def write_scores(ckpt, sha256=None):
    """Labels of three neurons of layer 0, as interpret.py writes them next to a checkpoint.

    sha256: of another checkpoint that they describe.
    """
    folder = results.folder(ckpt)
    rows = []
    for neuron, letter, share, kind in (
        (5, "s", 0.3, "token"),
        (9, "s", 0.7, "token"),
        (11, ".", 0.5, "suffix"),
    ):
        tokens = [[ord(letter), 1.0, 9, share], [ord("z"), 0.1, 2, 0.1]]
        label = {"tokens": tokens, "class": kind}
        facts = {"site": "L0", "layer": 0, "neuron": neuron, "status": "live", "max": 1.5}
        rows.append({**facts, "label": label})
    results.write_rows(folder / "scores.jsonl", rows)
    sha256 = sha256 or checkpoint.load(ckpt)[1]["sha256"]
    record = {"checkpoint": {"sha256": sha256}, "stamp": "one"}
    results.write_json(folder / "record.json", record)
    results.write_json(folder / "summary.json", {"record": record, "sites": {}})
