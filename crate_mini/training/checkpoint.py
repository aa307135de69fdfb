"""Checkpoints: a folder with weights, a readable JSON, and the state for an exact resume.

    config.json    Config, tokenizer, training facts, versions; name and sha256 of each other file
    weights-N.pt   the state_dict alone
    resume-N.pt    optimizer state and the like; only in checkpoints that a run can resume from

A save is atomic, whatever kills the writer: the data files get a new number N and are on the disk
before config.json, which names the files that count, is renamed over its predecessor. Every file is
verified by its sha256 before use, and .pt files load with weights_only=True, so that none of them
can run code. Checkpoints of other projects come in through import_weights.py.
"""

import errno
import hashlib
import json
import math
import os
import pickle
import re
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from crate_mini import UserError, __version__, cli
from crate_mini.cli import setting
from crate_mini.console import results
from crate_mini.console.results import atomic_write
from crate_mini.data.batches import open_corpus
from crate_mini.data.tokenizer import load_tokenizer
from crate_mini.model import LM, Config
from crate_mini.training.device import choose_device, machine

FORMAT = 1
# Tokenizer.hash of GPT-2's ranks, which the released models were trained with.
GPT2_TOKENIZER = "f6f7c3d6d682894818f9dab9e062428d232232b17a0f696e11a81e630c1a9e1e"
GPT2_ROWS = range(50257, 50305)  # of an embedding: its ids, rounded up to at most a multiple of 64
FEWEST_IDS = 257  # of any Tokenizer here: the bytes and <|endoftext|>
# Names of data files; `match` also accepts the temporary files of an interrupted atomic_write.
DATA_FILE = re.compile(r"(?:weights|resume)-(\d+)\.pt")
TEMPORARY_CONFIG = re.compile(r"config\.json\.\d+\.tmp")
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)  # file systems that cannot
WRAPPERS = ("_orig_mod", "module")  # attributes of torch.compile, DataParallel
WRAPPED = re.compile(r"(?<![^.])(?:_orig_mod|module)\.")  # the same in the names of weights


# ---- save and load -------------------------------------------------------------------------------


def save(path, model, *, tokenizer, training, resume=None):
    """Save the LM `model` in the folder `path`, atomically replacing a checkpoint there.

    model may be wrapped by torch.compile, DataParallel and the like. tokenizer {"spec", "hash", ..}
    and training {"step", ..} are JSON-able and come back in load's meta. resume: nested dicts,
    lists, tensors and numbers, for load_resume. Raises UserError if the folder cannot be written or
    the disk is full.
    """
    folder = Path(path)
    model = unwrapped(model)
    weights = {WRAPPED.sub("", name): w for name, w in model.state_dict().items()}
    meta = {
        "format": FORMAT,
        "crate_mini": __version__,
        "torch": str(torch.__version__),
        "config": asdict(model.config),
        "tokenizer": tokenizer,
        "training": training,
        "files": {},
    }
    contents = {"weights": weights}
    if resume is not None:
        contents["resume"] = resume
    try:
        make_folder(folder)
        number = _next_number(folder)
        for kind, content in contents.items():
            name = f"{kind}-{number}.pt"
            sha256 = write_tensors(folder / name, content)
            meta["files"][kind] = {"name": name, "sha256": sha256}
        meta["sha256"] = _digest(meta)
        _sync(folder)  # the data files must survive a power cut before config.json names them
        with atomic_write(folder / "config.json") as file:
            file.write(json.dumps(meta, indent=2).encode() + b"\n")
        _sync(folder)
    except OSError as error:
        raise UserError(
            f"Cannot save a checkpoint in {folder}: {error.strerror or error}; make room or "
            "choose another folder."
        ) from None
    finally:
        _remove_leftovers(folder)


def unwrapped(model):
    """The model inside torch.compile, DataParallel and the like, in whatever order they were."""
    for name in WRAPPERS:
        if hasattr(model, name):
            return unwrapped(getattr(model, name))
    return model


def load(path, device="cpu", log=print, **changes):
    """(model in eval mode, meta) of a checkpoint folder or a file of another project.

    meta: the content of config.json; for another project's file, the entries that can be known.
    log, changes: for another project's file, see import_foreign.
    Raises UserError if anything is missing, damaged or of another format.
    """
    from crate_mini.training.foreign_files import is_foreign
    from crate_mini.training.import_weights import fingerprint, import_foreign

    path = Path(path)
    if is_foreign(path):
        model = import_foreign(path, log, **changes)
        meta = {
            "config": asdict(model.config),
            "training": {},
            "sha256": fingerprint(model),
            "tokenizer": {"spec": None, "hash": None},
        }
        if model.config.vocab_size in GPT2_ROWS:
            meta["tokenizer"] = {"spec": "gpt2", "hash": GPT2_TOKENIZER}
        meta |= getattr(model, "foreign_meta", {})  # what an export of ours tells
        check_finite(model.state_dict(), path)
        return model.to(device), meta
    meta, weights = _read(path, "weights")
    return build(meta["config"], weights, path).to(device), meta


def load_resume(path):
    """(meta, the `resume` given to save, state_dict) of a checkpoint folder, on the CPU."""
    return _read(Path(path), "resume", "weights")


# ---- models with their tokenizer and text --------------------------------------------------------


def device_setting():
    """The setting `device` of a command that opens a checkpoint; so for the four below."""
    return setting("auto", "auto | cpu | cuda | cuda:N")


def data_setting(purpose):
    """purpose: what the command does with the text, like "measure on"."""
    return setting(None, f"text to {purpose}", shown="the checkpoint's held-out text")


def tokenizer_setting():
    return setting(None, "tokenizer, if not the checkpoint's", shown="the checkpoint's")


def val_fraction_setting():
    help = "share of its documents that is held out"
    return setting(None, help, high=1, shown="as in training")


def results_folder_setting():
    return setting(None, "folder of the results", shown="`interpret` next to the checkpoint")


def open_model(ckpt, device="auto", tokenizer=None, log=print):
    """(model, meta, tokenizer) of a checkpoint.

    tokenizer: its specification, if not the one that the checkpoint names. log: as for `load`.
    """
    model, meta = load(ckpt, choose_device(device), log)
    return model, meta, open_tokenizer(ckpt, meta, tokenizer)


def open_tokenizer(ckpt, meta, spec=None):
    """The Tokenizer of a checkpoint: the one that `spec` names, else its own.

    A given spec replaces the one in `meta`, so that whatever opens it again finds the same.
    """
    spec = tokenizer_spec(ckpt, meta, spec)
    tokenizer = load_tokenizer(spec)
    check_tokenizer(meta, tokenizer)
    meta["tokenizer"] = {**meta["tokenizer"], "spec": spec}
    return tokenizer


def tokenizer_spec(ckpt, meta, spec=None):
    """What names the tokenizer of a checkpoint: `spec` if given, else its own.

    Raises UserError if there is none, or if no tokenizer has so few ids.
    """
    n_ids = meta["config"]["vocab_size"]
    spec = spec or meta["tokenizer"]["spec"]
    if n_ids < FEWEST_IDS:
        raise UserError(
            f"{ckpt} has {n_ids} ids, and every tokenizer here has {FEWEST_IDS} or more; its codes "
            "can be computed from Python, but it cannot read or write text here."
        )
    if spec is None:
        raise UserError(
            f"{ckpt} does not name its tokenizer; give the one it was trained with, of at most "
            f"{n_ids} ids: --tokenizer FILE or --tokenizer bytes."
        )
    return spec


def check_tokenizer(meta, tokenizer):
    """Raise UserError unless the model of `meta` was trained with this Tokenizer."""
    trained_with = meta["tokenizer"]
    n_ids = meta["config"]["vocab_size"]
    known = trained_with.get("hash")
    if known is None and tokenizer.vocab_size > n_ids:
        raise UserError(
            f"Tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, the model only {n_ids}; "
            f"give the one it was trained with, or the first {n_ids - 1} ranks of one: --tokenizer "
            f"FILE:{n_ids - 1}."
        )
    if tokenizer.vocab_size > n_ids or known not in (None, tokenizer.hash):
        raise UserError(
            f"Tokenizer {tokenizer.name} ({tokenizer.vocab_size} ids) is not the one the model "
            f"({n_ids} ids) was trained with; use --tokenizer {trained_with.get('spec')}."
        )


def held_out(ckpt, meta, tokenizer, source=None, val_fraction=None, log=print):
    """A Corpus with a "val" split that the model has not seen, split as in training.

    source, val_fraction: another text or share than in training. Raises UserError if no source is
    given and the checkpoint does not name one. log: called with progress and, if the training text
    has changed, with a note.
    """
    settings = meta["training"].get("settings", {})
    chosen = source or settings.get("data")
    if chosen is None:
        raise UserError(
            f"{ckpt} does not name the text it was trained on; give one, like --data mytext.txt."
        )
    if val_fraction is None:
        val_fraction = settings.get("val_fraction", 0.1)
    text_field = settings.get("text_field") if chosen == settings.get("data") else None
    corpus = open_corpus(
        chosen, tokenizer, val_fraction=val_fraction, log=log, text_field=text_field
    )
    trained_on = meta["training"].get("corpus", {}).get("text_sha256")
    if source is None and corpus.meta["text_sha256"] != trained_on:
        log(
            f"note      {chosen} has changed since {ckpt} was trained on it; the model may have "
            "seen parts of the text that is now held out"
        )
    return corpus


def untrained(config, seed):
    """The LM of this Config, in eval mode, as train.py initializes it from this seed.

    The control for a trained model. No global random generator is changed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return LM(config).eval()


def result_header(script, checkpoint, meta, model, **facts):
    """The entries that every result about a checkpoint begins with: command, machine, checkpoint.

    meta: as checkpoint.load returned it with the model. facts: further entries, such as the seed.
    """
    return {
        "schema": 1,
        "command": results.command(script),
        **facts,
        "machine": machine(model.tokens.weight.device),
        "checkpoint": {
            "path": str(checkpoint),
            "sha256": meta.get("sha256"),
            "config": meta["config"],
            "training": meta["training"],
        },
    }


# ---- files ---------------------------------------------------------------------------------------


class _HashingFile:
    """A file for torch.save that hashes the bytes written.

    It keeps the first write error, to be raised later: torch's zip writer would replace it with
    another one.
    """

    def __init__(self, file):
        self.file = file
        self.flush = file.flush
        self.sha256 = hashlib.sha256()
        self.error = None

    def write(self, data):
        self.sha256.update(data)
        try:
            if self.error is None:
                self.file.write(data)
        except OSError as error:
            self.error = error
        return len(data)


def write_tensors(path, content):
    """Write nested dicts, lists, tensors and numbers atomically; returns the file's sha256."""
    with atomic_write(path) as file:
        hashing = _HashingFile(file)
        torch.save(content, hashing)
        if hashing.error:
            raise hashing.error
    return hashing.sha256.hexdigest()


def read_tensors(path, sha256):
    """Read a file of write_tensors. Raises UserError if its sha256 differs, and OSError."""
    with results.open_plain(path) as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        if digest.hexdigest() != sha256:
            raise UserError(f"{path} is damaged, its sha256 does not fit; use another checkpoint.")
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # what fits its sha256 was not damaged, but made by someone
            reason = "is not a file of crate_mini"
            if isinstance(error, pickle.UnpicklingError):
                reason = "would run code when loaded, so it was refused"
            raise UserError(f"{path} {reason}; use another checkpoint.") from None


def _next_number(folder):
    """One more than the highest number of a data file in the folder."""
    matches = [DATA_FILE.match(name) for name in os.listdir(folder)]
    numbers = [int(match[1]) for match in matches if match]
    return 1 + max(numbers, default=0)


def make_folder(folder):
    """Create a folder and its parents, so that their names survive a power cut too."""
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in created:
        with suppress(PermissionError):  # a parent that may be written to but not read
            _sync(path.parent)


def _sync(folder):
    """Flush the folder's directory entries to the disk; Windows has no such call."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in NO_FOLDER_SYNC:
                raise
        finally:
            os.close(handle)


def _remove_leftovers(folder):
    """Remove files that config.json does not name: of the previous checkpoint, of broken saves."""
    with suppress(OSError, UserError):
        named = set()
        if (folder / "config.json").exists():
            named = {file["name"] for file in read_meta(folder)["files"].values()}
        for name in os.listdir(folder):
            old = DATA_FILE.match(name) and name not in named
            if old or TEMPORARY_CONFIG.fullmatch(name):
                (folder / name).unlink()


def _digest(meta):
    """sha256 of all other entries of config.json, which stores it too."""
    entries = {name: value for name, value in meta.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def nearest_folder(folder, holding):
    """' (did you mean X?)' for a folder near `folder` that holds a file of this name, or ''."""
    for root in (folder, *folder.parents[:2]):
        with suppress(OSError):
            files = [*root.glob(f"*/{holding}"), *root.glob(f"*/*/{holding}")]
            folders = [str(path.parent) for path in files if path.parent != folder]
            similarity = 0.0 if root == folder else 0.6
            if match := cli.nearest(str(folder), folders, similarity):
                return match
    return ""


def read_meta(folder):
    """The content of config.json. Raises UserError unless it is intact and of this format."""
    path = folder / "config.json"
    try:
        meta = json.loads(results.read_bytes(path))
        version = meta["format"]
    except OSError as error:
        suggestion = nearest_folder(folder, "config.json")
        raise UserError(
            f"No checkpoint in {folder}{suggestion}: {error.strerror}; expected a folder written "
            "by train.py, such as out/crate-3L/last."
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
    if not _is_well_formed(meta):
        raise UserError(f"{path} was edited: it does not describe a checkpoint; use another one.")
    if meta["training"].get("best_val_loss") == math.inf:  # saved before the first validation
        meta["training"]["best_val_loss"] = None  # result files have no infinity
    return meta


def _is_well_formed(meta):
    """Whether config.json holds the entries that readers rely on, with their types."""
    names = ("config", "tokenizer", "training", "files")
    config, tokenizer, training, files = (meta.get(name) for name in names)
    settings, corpus = {}, {}
    if isinstance(training, dict):
        settings, corpus = training.get("settings", {}), training.get("corpus", {})
    if not all(isinstance(e, dict) for e in (config, tokenizer, training, files, settings, corpus)):
        return False
    for file in files.values():
        if not isinstance(file, dict) or not isinstance(file.get("sha256"), str):
            return False
        if not DATA_FILE.fullmatch(str(file.get("name"))):
            return False
    return (
        isinstance(tokenizer.get("spec"), str)
        and isinstance(settings.get("data"), (str, type(None)))
        and isinstance(settings.get("val_fraction", 0.1), (int, float))
    )


def _read(folder, *kinds):
    """[meta, content of each kind of data file].

    A concurrent save may remove the files first; config.json then names newer ones.
    """
    meta = read_meta(folder)
    try:
        files = [meta["files"][kind] for kind in kinds]
        contents = [read_tensors(folder / file["name"], file["sha256"]) for file in files]
    except KeyError:
        raise UserError(
            f"{folder} holds weights only, which a run cannot resume from; resume from last, not "
            "from best."
        ) from None
    except FileNotFoundError as error:
        if read_meta(folder)["sha256"] == meta["sha256"]:
            raise UserError(f"{error.filename} is missing; use another checkpoint.") from None
        return _read(folder, *kinds)
    except OSError as error:
        raise UserError(
            f"Cannot read {error.filename}: {error.strerror}; use another checkpoint."
        ) from None
    return [meta, *contents]


def build(config, weights, source):
    """The LM of a Config, given as a dict, with these weights; source: where they come from.

    Built on the meta device, where initial weights cost neither time nor random numbers. Raises
    UserError if they do not fit, or if a weight is not finite.
    """
    try:
        with torch.device("meta"):
            model = LM(Config(**config))
        model.load_state_dict(weights, assign=True)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[-1].strip().rstrip(".")
        raise UserError(
            f"{source}: weights and config do not fit ({reason}); use another checkpoint."
        ) from None
    check_finite(weights, source)
    return model.eval()


def check_finite(weights, source):
    """Raise UserError for weights (by name) that are not numbers: all results would be NaN."""
    for name, w in weights.items():
        if not torch.isfinite(w).all():
            raise UserError(
                f"{source} holds weights that are not finite, in {name}: its training diverged; "
                "use an earlier checkpoint, such as the run's `best`."
            )
