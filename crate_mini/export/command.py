"""The command `python -m crate_mini.export`."""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from crate_mini import UserError
from crate_mini.cli import setting
from crate_mini.console import results
from crate_mini.console.terminal import Command
from crate_mini.data.tokenizer import load_tokenizer
from crate_mini.export import folders
from crate_mini.sae import autoencoder
from crate_mini.training import checkpoint


@dataclass
class Settings:
    """Write a checkpoint, or an autoencoder of it, in the files of another tool."""

    to: str = setting("safetensors", "the format", choices=tuple(folders.WRITERS))
    sae: str | None = setting(None, "with --to saelens: a file of interpret.py sae")
    tokenizer: str | None = checkpoint.tokenizer_setting()
    out: str | None = setting(None, "folder to write", shown="export-FORMAT next to the checkpoint")


def run(settings, ckpt):
    """Write the folder, print its files and how to open them."""
    if (settings.sae is not None) != (settings.to == "saelens"):
        raise UserError(
            f"--to {settings.to} with --sae {settings.sae} does not fit: an autoencoder is written "
            "with --to saelens --sae FILE, a model with any other format and without --sae."
        )
    model, meta = checkpoint.load(ckpt)
    if settings.tokenizer:
        checkpoint.open_tokenizer(ckpt, meta, settings.tokenizer)
    out = Path(settings.out or Path(ckpt).resolve().parent / f"export-{settings.to}")
    check_folder(out)
    if settings.sae:
        sae, facts = autoencoder.load(settings.sae, model)
    tokenizer = tokenizer_of(meta)
    checkpoint.make_folder(out)
    try:
        if settings.sae:
            files, usage = folders.saelens(out, sae, facts, model)
        else:
            files, usage = folders.WRITERS[settings.to](out, model, meta, tokenizer)
    except UserError:
        with suppress(OSError):  # it holds something
            out.rmdir()
        raise
    print(f"files     {', '.join(str(out / name) for name in files)}\nopen      {usage}")


def check_folder(out):
    """Raise UserError for a folder that holds a checkpoint of ours, which would be hidden."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is not a folder; give the name of one.")
    config = out / "config.json"
    content = None
    with suppress(OSError, ValueError, RecursionError):  # none, or not JSON: no checkpoint of ours
        content = json.loads(results.read_bytes(config).decode(errors="replace"))
    if isinstance(content, dict) and "format" in content:  # an export keeps it one level deeper
        raise UserError(f"--out {out} holds a checkpoint; give another folder, like {out}-export.")


def tokenizer_of(meta):
    """The Tokenizer that a checkpoint names; None if it names none."""
    spec = meta["tokenizer"].get("spec")
    return load_tokenizer(spec) if spec else None


COMMAND = Command(Settings, run)
