"""Checkpoints: a folder with weights, a JSON that people can read, and what an exact resume needs.

    config.json    the model's Config, tokenizer, training facts, versions; names and sha256 of the others
    weights-N.pt   the state_dict alone
    resume-N.pt    optimizer state and the like; only in checkpoints that training can go on from

A checkpoint is replaced in one instant, whatever kills the writer: the data files get a new number N and are
on the disk before config.json, which alone says what counts, is renamed over its predecessor. Every file is
checked against its sha256 before use, and .pt files load with weights_only=True, so that none can run code.
Checkpoints of other projects come in through foreign.py.
"""

import hashlib
import json
import os
import re
from contextlib import suppress
from pathlib import Path

import torch

from crate_mini import UserError, __version__, atomic_write, cli
from crate_mini.model import LM, Config, to_dict
from crate_mini.training.foreign_weights import fingerprint, import_foreign, is_foreign

FORMAT = 1
# Tokenizer.hash of GPT-2's ranks, which released models were trained with
GPT2_TOKENIZER = "f6f7c3d6d682894818f9dab9e062428d232232b17a0f696e11a81e630c1a9e1e"
DATA = re.compile(r"(?:weights|resume)-(\d+)\.pt")  # and, with match, what atomic_write left of one


def save(path, model, *, tokenizer, training, resume=None):
    """Make folder `path` the checkpoint of the LM `model`; what was there is replaced whole, or kept whole.

    tokenizer {"spec", "hash", ..} and training {"step", ..} are JSON-able and come back in load's meta;
    resume is nested dicts, lists, tensors and numbers. Raises UserError when the folder or the disk refuses.
    """
    folder = Path(path)
    meta = {
        "format": FORMAT,
        "crate_mini": __version__,
        "torch": str(torch.__version__),
        "config": to_dict(model.config),
        "tokenizer": tokenizer,
        "training": training,
        "files": {},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(m[1]) for m in map(DATA.match, os.listdir(folder)) if m), default=0)
        for kind, content in (("weights", model.state_dict()), ("resume", resume)):
            if content is not None:
                name = f"{kind}-{number}.pt"
                meta["files"][kind] = {
                    "name": name,
                    "sha256": write_tensors(folder / name, content),
                }
        meta["sha256"] = _digest(meta)
        _sync(
            folder
        )  # the data files must have survived a power cut before config.json relies on them
        with atomic_write(folder / "config.json") as file:
            file.write(json.dumps(meta, indent=2).encode() + b"\n")
        _sync(folder)
    except OSError as error:
        raise UserError(
            f"Cannot save a checkpoint in {folder}: {error.strerror or error}; make room or "
            "choose another folder."
        ) from None
    finally:
        _sweep(folder)


def load(path, device="cpu"):
    """(model in eval mode, meta) of the checkpoint folder `path`, or of a foreign file (see foreign.py).

    meta is config.json as a dict. Raises UserError for what is missing, damaged, or of another format.
    """
    path = Path(path)
    if is_foreign(path):  # the tokenizer of all published CRATE-LM and GPT-2 models is GPT-2's
        model = import_foreign(path)
        meta = {
            "config": to_dict(model.config),
            "training": {},
            "sha256": fingerprint(model),
            "tokenizer": {"spec": "gpt2", "hash": GPT2_TOKENIZER},
        }
        return model.to(device), meta
    meta, weights = _read(path, "weights")
    return _build(meta["config"], weights, path).to(device), meta


def load_resume(path):
    """(meta, what save got as `resume`, state_dict) of the checkpoint folder `path`, tensors on the CPU."""
    return _read(Path(path), "resume", "weights")


def check_tokenizer(meta, tokenizer):
    """Raise UserError unless `tokenizer` (name, vocab_size, hash) is what the model of `meta` has seen."""
    known, ids = meta["tokenizer"], meta["config"]["vocab_size"]
    if tokenizer.vocab_size > ids or known.get("hash") not in (None, tokenizer.hash):
        raise UserError(
            f"Tokenizer {tokenizer.name} ({tokenizer.vocab_size} ids) is not the one the model "
            f"({ids} ids) was trained with; use --tokenizer {known.get('spec')}."
        )


class _Sink:
    """A file for torch.save that hashes what goes through.

    It keeps a failed write to be raised after: torch's zip writer would bury it under its own error.
    """

    def __init__(self, file):
        self.file, self.flush, self.sha256, self.error = file, file.flush, hashlib.sha256(), None

    def write(self, data):
        self.sha256.update(data)
        try:
            if self.error is None:
                self.file.write(data)
        except OSError as error:
            self.error = error
        return len(data)


def write_tensors(path, content):
    """Write nested dicts, lists, tensors and numbers to a file, in one instant; returns its sha256."""
    with atomic_write(path) as file:
        sink = _Sink(file)
        torch.save(content, sink)
        if sink.error:
            raise sink.error
    return sink.sha256.hexdigest()


def _sync(folder):
    """Put the folder's list of names on the disk; Windows has no such call."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sweep(folder):
    """Remove what config.json does not name: the previous checkpoint, and leftovers of a save cut off."""
    with suppress(OSError, UserError):
        meta = _meta(folder) if (folder / "config.json").exists() else {"files": {}}
        keep = {file["name"] for file in meta["files"].values()}
        for name in os.listdir(folder):
            if (
                DATA.match(name)
                and name not in keep
                or re.fullmatch(r"config\.json\.\d+\.tmp", name)
            ):
                (folder / name).unlink()


def _digest(meta):
    """sha256 of all other entries: config.json vouches for itself too."""
    rest = {name: value for name, value in meta.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _meta(folder):
    path = folder / "config.json"
    try:
        meta = json.loads(path.read_bytes())
        version = meta["format"]
    except OSError as error:
        raise UserError(
            f"No checkpoint in {folder}{cli.nearest_folder(folder, 'config.json')}: "
            f"{error.strerror}; expected a folder that train.py has written, such as "
            "out/crate-3L/last."
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{path} is damaged or not from crate_mini; use another checkpoint."
        ) from None
    if version != FORMAT:
        raise UserError(
            f"{path} has format {version!r}, crate_mini {__version__} reads {FORMAT}; use the "
            f"version that wrote it, {meta.get('crate_mini')}."
        )
    if meta.get("sha256") != _digest(meta):
        raise UserError(
            f"{path} is damaged or was edited, its sha256 does not fit; use another checkpoint."
        )
    return meta


def _read(folder, *kinds):
    """[meta, content of each kind]. A save may take the files away meanwhile; then there is a newer JSON."""
    meta = _meta(folder)
    try:
        found = [meta["files"][kind] for kind in kinds]
        return [meta, *(read_tensors(folder / file["name"], file["sha256"]) for file in found)]
    except KeyError:
        raise UserError(
            f"{folder} holds weights only, so training cannot go on from it; resume from last, "
            "not from best."
        ) from None
    except FileNotFoundError as error:
        if _meta(folder)["sha256"] == meta["sha256"]:
            raise UserError(f"{error.filename} is missing; use another checkpoint.") from None
        return _read(folder, *kinds)
    except OSError as error:
        raise UserError(
            f"Cannot read {error.filename}: {error.strerror}; use another checkpoint."
        ) from None


def read_tensors(path, sha256):
    """What write_tensors wrote; raises UserError when the file is not what had this sha256, else OSError."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        if digest.hexdigest() != sha256:
            raise UserError(f"{path} is damaged, its sha256 does not fit; use another checkpoint.")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


def _build(config, weights, source):
    """LM(Config(**config)) around `weights`; on the meta device, where init costs no time or randomness."""
    try:
        with torch.device("meta"):
            model = LM(Config(**config))
        model.load_state_dict(weights, assign=True)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[-1].strip().rstrip(".")
        raise UserError(
            f"{source}: weights and config do not fit ({reason}); use another one."
        ) from None
    return model.eval()
