"""Where results come from and go: a checkpoint, text it has not seen, JSON that says how it was made."""

import json
import shlex
import sys
from pathlib import Path

from crate_mini import UserError, atomic_write
from crate_mini.data import batches as data
from crate_mini.training import checkpoint
from crate_mini.training import device as machine


def loaded(ckpt, device="auto", tokenizer=None):
    """(model, meta, tokenizer) of a checkpoint; `tokenizer`, if given, wins over what it names."""
    model, meta = checkpoint.load(ckpt, machine.choose_device(device))
    tokenizer = data.load_tokenizer(tokenizer or meta["tokenizer"]["spec"])
    checkpoint.check_tokenizer(meta, tokenizer)
    return model, meta, tokenizer


def held_out(ckpt, meta, tokenizer, source=None, val_fraction=None):
    """The Corpus whose "val" split the model has not seen: its own, or `source`, cut as in training.

    Raises UserError when neither the checkpoint nor the caller says what text.
    """
    trained = meta["training"].get("settings", {})
    chosen = source or trained.get("data")
    if chosen is None:
        raise UserError(
            f"{ckpt} does not say what text it has seen; give one, like --data mytext.txt."
        )
    share = trained.get("val_fraction", 0.1) if val_fraction is None else val_fraction
    corpus = data.open_corpus(chosen, tokenizer, val_fraction=share)
    if source is None and corpus.meta["text_sha256"] != meta["training"]["corpus"]["text_sha256"]:
        print(
            f"note      {chosen} is not the text that {ckpt} has seen; it may have seen some of this"
        )
    return corpus


def folder(ckpt, out=None):
    """Where results of a checkpoint go: `out`, else the folder `interpret` beside it."""
    return Path(out) if out else Path(ckpt).resolve().parent / "interpret"


def command(script):
    """The command that is running, as one can type it again."""
    return shlex.join(["python", script, *sys.argv[1:]])


def header(script, ckpt, meta, model, **more):
    """What every result carries: command, machine, and the checkpoint's hash, shape and training."""
    return {
        "schema": 1,
        "command": command(script),
        **more,
        "machine": machine.describe(model.tokens.weight.device),
        "checkpoint": {
            "path": str(ckpt),
            "sha256": meta.get("sha256"),
            "config": meta["config"],
            "training": meta["training"],
        },
    }


def write_json(path, result):
    """Write a result as JSON, in one instant; numbers in it must be finite. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(json.dumps(result, indent=1, allow_nan=False).encode() + b"\n")
    return path
