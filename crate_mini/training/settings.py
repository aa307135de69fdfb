"""The settings of train.py, and the start of a run.

`parse` turns the command line, a --config file and a checkpoint into the Settings of a run, the
Config of its model, and the weights and state to start from.
"""

import argparse
import math
import re
import shlex
from dataclasses import dataclass, fields, replace
from pathlib import Path

from crate_mini import UserError, cli
from crate_mini.cli import setting
from crate_mini.console import results, terminal
from crate_mini.data.tokenizer import load_tokenizer
from crate_mini.model import KINDS, SIZES, Config, preset
from crate_mini.training import checkpoint
from crate_mini.training.processes import rank_and_world

DESCRIPTION = """Train a CRATE language model or its GPT-2 twin.

With --task classify, fine-tune a classifier instead; see `train.py --task classify --help`."""
# Config fields that --model and --preset set, unless the field's flag is given.
KIND_FIELDS = {name for kind in KINDS.values() for name in kind}
SIZE_FIELDS = {name for size in SIZES.values() for name in size}
MODEL_DEFAULTS = {
    **dict.fromkeys(KIND_FIELDS, "set by --model"),
    **dict.fromkeys(SIZE_FIELDS, "set by --preset"),
    "vocab_size": "the tokenizer's ids, rounded up to a multiple of 64",
    "block_size": "256 for 1L 2L 3L, 1024 for S B",
}
FOREIGN_FIELDS = ("n_head", "activation", "block_size")  # flags that go with foreign weights
LENGTHS = ("train_steps", "tokens", "epochs")  # settings of which each sets a run's length
ISTA_FIELDS = (
    "ista_steps",
    "eta",
    "lam",
    "separate_decoder",
    "learned_lam",
    "unit_norm",
    "debias",
)


@dataclass
class Settings:
    """How to train; model.Config is the model to train.

    The defaults suit the default model on two CPU cores.
    """

    model: str = setting(
        "crate", "crate is the paper's, crate+ our best, gpt2 the twin", choices=tuple(KINDS)
    )
    preset: str = setting("3L", "a model size from the paper", choices=tuple(SIZES))
    data: str = setting(
        "pydocs", "pydocs, a named corpus, or a file or folder of .txt .jsonl .csv .parquet .bin"
    )
    text_field: str | None = setting(
        None,
        "field to read in the rows of .jsonl .json .csv .parquet",
        shown="text, else content, else the only one with text",
    )
    tokenizer: str = setting(
        "pydocs:4095", "pydocs | gpt2 | bytes | a file of ranks; NAME:N keeps the first N ranks"
    )
    init: str | None = setting(
        None, "start from these weights: a checkpoint, or a file or folder of another project"
    )
    out: str | None = setting(None, "folder of the run", shown="out/MODEL-PRESET")
    overwrite: bool = setting(False, "replace the run that --out already holds")
    seed: int = setting(1337, "seed of the initial weights, the batches and the sample")
    train_steps: int = setting(1000, "optimizer steps", low=1)
    tokens: str | None = setting(
        None, "instead of --train-steps: the tokens to train on, like 65M or 1.5B"
    )
    epochs: float | None = setting(
        None, "instead of --train-steps: how often to go through the text", above=0
    )
    batch_size: int = setting(16, "sequences per step, over all processes", low=1)
    micro_batch: int = setting(
        16, "sequences in one forward pass; gradients accumulate over the batch", low=1
    )
    lr: float = setting(3e-3, "peak learning rate", above=0)
    min_lr: float | None = setting(
        None, "learning rate at the end of the cosine", shown="a tenth of --lr"
    )
    warmup: int = setting(
        250, "steps of linear warm-up; CRATE needs many, because eta |D|^2 starts near 2"
    )
    top_k_anneal: float = setting(
        0.5,
        "share of the run in which the codes kept per token halve step by step down to --top-k",
        high=1,
    )
    weight_decay: float = setting(
        0.1, "weight decay of AdamW, on tensors of two or more dimensions"
    )
    beta1: float = setting(0.9, "AdamW's decay rate for the gradient", above=0, below=1)
    beta2: float = setting(0.95, "AdamW's decay rate for the squared gradient", above=0, below=1)
    clip: float = setting(1.0, "clip the gradient norm to this; 0 turns clipping off")
    eval_every: int = setting(
        100, "steps between validations, each followed by a checkpoint; 0: only at the end"
    )
    eval_tokens: int = setting(
        65536, "tokens of each validation except the last, which takes the whole split", low=1
    )
    save_every: int = setting(0, "steps between additional checkpoints; 0: none")
    keep_every: int = setting(
        0,
        "steps between checkpoints that stay, as step-000100 and so on: weights for a history of "
        "learning; 0: none",
    )
    log: str | None = setting(
        None,
        "send the rows of log.csv there too; needs the package of that name",
        choices=("tensorboard", "wandb"),
    )
    log_every: int = setting(10, "steps between rows of log.csv and lines in a pipe", low=1)
    log_sparsity: bool = setting(
        False, "also measure the density, the share of nonzero codes, at each validation"
    )
    on_nonfinite: str = setting(
        "stop",
        "if a loss or gradient is not finite, end the run or skip the step",
        choices=("stop", "skip"),
    )
    device: str = setting("auto", "auto | cpu | cuda | cuda:N | mps")
    dtype: str = setting(
        "auto",
        "dtype of the matrix products; weights stay float32",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    compile: str = setting("auto", "whether to use torch.compile", choices=("auto", "on", "off"))
    val_fraction: float = setting(
        0.1, "share of the documents held out for validation", above=0, below=1
    )

    def check(self):
        """Raise UserError for settings that no run can use."""
        cli.check(self)
        if self.tokens:
            from crate_mini.training import length  # only then

            length.count(self.tokens)
        if self.log:
            from crate_mini.training import loggers  # only then

            loggers.require(self.log)
        if self.min_lr is not None and self.min_lr > self.lr:
            raise UserError(
                f"--min-lr {self.min_lr}, the cosine's end, is above its peak, --lr {self.lr}; "
                f"leave it out or try {self.lr / 10:g}."
            )

    def lr_at(self, step):
        """Learning rate of a step: linear warm-up, then a cosine to min_lr at the last step."""
        low = self.lr / 10 if self.min_lr is None else self.min_lr
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.train_steps - 1 - self.warmup)
        return low + 0.5 * (self.lr - low) * (1 + math.cos(math.pi * min(1.0, progress)))

    def top_k_at(self, step, top_k, n_code):
        """Codes kept per token at a training step, 0 for all: n_code at first, then half, ..."""
        if top_k == 0:
            return 0
        halvings = math.ceil(math.log2(n_code / top_k))
        end = self.top_k_anneal * self.train_steps
        if step >= end:
            return top_k
        return n_code >> int(halvings * step / end)


# ---- from the command line to a run --------------------------------------------------------------


def parse(argv=None):
    """(Settings, Config, start) of a command line, by default this process's.

    start: {} for new weights, else {"weights", "meta" (of their checkpoint)} and, for a resume,
    "state". Raises UserError for a line that cannot be run.
    """
    given, folder = read_flags(argv)
    lengths = [name for name in LENGTHS if given.get(name) is not None]
    if len(lengths) > 1:
        raise UserError(
            f"{' and '.join(map(cli.flag_name, lengths))} both set the length of the run; give one."
        )
    changes = {}  # fields of the model's Config
    for f in fields(Config):
        if f.name in given:
            changes[f.name] = given.pop(f.name)
    if folder:
        return resume(folder, given, changes)
    s = Settings(**given)
    s.check()
    s.out = s.out or default_out(s)
    if s.init:
        config, start = from_weights(s, given, changes)
    else:
        config, start = new_model(s, changes), {}
    return s, config, start


def split_task(words):
    """(task, the other words) of a command line with --task lm, the default, or classify."""
    task, others = "lm", []
    words = iter(words)
    for word in words:
        name, equals, value = word.partition("=")
        if name == "--task":
            task = value if equals else next(words, "")
        else:
            others.append(word)
    if task not in ("lm", "classify"):
        raise UserError(f"--task {task!r} is unknown; choose lm, a language model, or classify.")
    return task, others


def read_flags(argv):
    """({setting: value}, folder of --resume or None); flags win over a --config file."""
    parser = terminal.Parser(prog="train.py", description=DESCRIPTION)
    parser.add_argument("--config", help="a JSON file of settings by name; flags override it")
    parser.add_argument("--resume", metavar="FOLDER", help="continue the run in this folder")
    terminal.add_flags(parser, Settings, "training")
    terminal.add_flags(parser, Config, "model", MODEL_DEFAULTS)
    steps = dict(dest="train_steps", type=int, default=argparse.SUPPRESS, metavar="INT")
    parser.add_argument("--steps", help="the same as --train-steps", **steps)
    given = vars(parser.parse_args(argv))
    config_file = given.pop("config")
    folder = given.pop("resume")
    if "" in (config_file, folder):
        raise UserError("--config '' or --resume '' is empty; leave it out or give a name.")
    if config_file:
        known = sorted(f.name for f in (*fields(Settings), *fields(Config)))
        settings = results.read_json(config_file, known, 'settings like {"lr": 0.001}')
        given = {**settings, **given}
    return given, folder


def from_weights(s, given, changes):
    """(Config, start) for the weights of --init; s.tokenizer becomes theirs unless it was given."""
    given_shape = {name: changes[name] for name in FOREIGN_FIELDS if name in changes}
    try:
        model, meta = checkpoint.load(s.init, log=say_once, **given_shape)
    except UserError as error:
        raise in_flags(error) from None
    kind = {name: given[name] for name in ("model", "preset") if name in given}
    check_shape({**changes, **kind}, model.config, s.init)
    s.tokenizer = checkpoint.tokenizer_spec(s.init, meta, given.get("tokenizer"))
    return model.config, {"weights": model.state_dict(), "meta": meta}


def new_model(s, changes):
    """Config of a new model. Raises UserError for a flag that contradicts another."""
    n_ids = load_tokenizer(s.tokenizer).vocab_size
    config = new_config(s, n_ids, changes)
    if config.vocab_size < n_ids:
        raise UserError(
            f"--vocab-size {config.vocab_size} is below the {n_ids} ids of --tokenizer "
            f"{s.tokenizer}; leave it out, it follows the tokenizer."
        )
    if s.top_k_anneal != Settings.top_k_anneal and not config.top_k:
        raise UserError(
            f"--top-k-anneal {s.top_k_anneal} has no effect without --top-k; leave it out."
        )
    for name, reason in unused(config).items():
        default = getattr(Config, name)
        if changes.get(name, default) != default:
            flag = shlex.join(flags({name: changes[name]}))
            raise UserError(f"{flag} has no effect with {reason}; leave it out.")
    return config


def new_config(s, n_ids, changes=()):
    """Config for --model, --preset and a tokenizer of n_ids ids, with single fields changed."""
    size = {
        "vocab_size": math.ceil(n_ids / 64) * 64,
        "block_size": 256 if s.preset.endswith("L") else 1024,
    }
    try:
        return preset(s.preset, s.model, **{**size, **dict(changes)})
    except UserError as error:
        raise in_flags(error) from None


def say_once(line):
    """Print a line in the first process of a run only."""
    if rank_and_world()[0] == 0:
        print(line)


def in_flags(error):
    """An error about fields of a Config as one about flags."""
    names = [f.name for f in fields(Config)]
    message = re.sub(rf"\b({'|'.join(names)})=", as_flag, str(error))
    # The error names the defaults of Config, which are not those of this command.
    return UserError(re.sub(r" for the default.*$", ".", message))


def flags(values):
    """{field: value} as a list of words of a command line."""
    words = []
    for name, value in values.items():
        flag = cli.flag_name(name)
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += terminal.flag_words(flag, value)
    return words


def as_flag(match):
    """--n-head for a match of n_head= in an error about a Config."""
    return f"{cli.flag_name(match[1])} "


def unused(config):
    """{field: reason} of the Config fields that this model does not use."""
    ista = config.sparsifier == "ista"
    names = ("activation",) if ista else ISTA_FIELDS
    reasons = dict.fromkeys(names, f"--sparsifier {config.sparsifier}")
    if config.attention != "mssa":
        reasons["query_rank"] = f"--attention {config.attention}"
    return reasons


def resume(folder, given, changes):
    """(Settings, Config, start) of the run in `folder`, with single settings changed."""
    folder = run_folder(folder)
    last = Path(folder, "last")
    meta, state, weights = checkpoint.load_resume(last)
    config = checkpoint.build(meta["config"], weights, last).config
    old = meta["training"].get("settings", {})
    known = {f.name for f in fields(Settings)}
    complete = old.keys() <= known and {"model", "preset"} <= old.keys()
    if not complete or not isinstance(old.get("batch_size"), int) or not is_state(state):
        raise UserError(
            f"{last} was not written by this version's train.py, so it cannot be resumed; start a "
            f"new run from its weights: {terminal.typable(*terminal.flag_words('--init', last))}."
        )
    for name in ("init", "out", "overwrite"):
        if given.get(name):
            raise UserError(
                f"--{name} does not go with --resume, which continues the run in {folder}."
            )
    for name in ("model", "preset"):
        value = given.get(name, old[name])
        if value != old[name]:
            raise UserError(
                f"--{name} {value} differs from the {old[name]} of {folder}; leave it out."
            )
    check_shape(changes, config, folder)
    if any(name in given for name in LENGTHS):
        old |= dict.fromkeys(LENGTHS[1:])  # the new length takes the place of the old
    s = Settings(**{**old, **given, "out": folder})
    s.check()
    finished = "val_loss" in meta["training"]  # else it was killed after the last step
    later = any(name in given for name in LENGTHS[1:])  # then length.set_steps decides
    is_over = state["step"] > s.train_steps or (state["step"] == s.train_steps and finished)
    if is_over and not later:
        raise UserError(
            f"the run in {folder} has done all its {state['step']} steps; "
            f"add --train-steps {2 * state['step']} to continue."
        )
    # Older checkpoints do not count tokens.
    state.setdefault("tokens", state["step"] * old["batch_size"] * config.block_size)
    return s, config, {"weights": weights, "meta": meta, "state": state}


def run_folder(folder):
    """The folder of the run to resume, if `folder` is that or `last` in it."""
    path = Path(folder)
    if not (path / "config.json").exists() or (path / "last" / "config.json").exists():
        return folder
    run = path.parent if path.name else path.resolve().parent  # "." has no name
    if path.resolve().name == "last":
        return str(run)
    hint = "."
    if (run / "last" / "config.json").exists():
        hint = f", here {terminal.typable(*terminal.flag_words('--resume', run))}."
    raise UserError(
        f"--resume {folder} is a single checkpoint; a run resumes from the folder of the run, "
        f"which holds `last`{hint}"
    )


def is_state(state):
    """Whether this is what a resume restores: see Trainer.save."""
    kinds = {"step": int, "best": float, "skipped": int, "optimizer": dict}
    if not isinstance(state, dict):
        return False
    fits = [isinstance(state.get(name), kind) for name, kind in kinds.items()]
    log = state.get("log", {"bytes": 0, "sha256": ""})  # older ones have neither log nor tokens
    fits += [isinstance(state.get("scaler", {}), dict)]  # and only those in float16 have this
    fits += [isinstance(log, dict) and log.keys() == {"bytes", "sha256"}]
    fits += [isinstance(state.get("tokens", 0), int)]
    return all(fits) and state["step"] >= 0 and isinstance(log["bytes"], int)


def check_shape(changes, config, source):
    """Raise UserError for a flag that contradicts the weights of `source`."""
    for name, value in changes.items():
        old = getattr(config, name, "weights")
        if value != old:
            raise UserError(
                f"{cli.flag_name(name)} {value} differs from the {old} of {source}; leave it out, "
                "or start from new weights."
            )


def default_out(s):
    """Folder of a run without --out."""
    if s.init:
        return f"out/init-{Path(s.init).resolve().parent.name}"
    return f"out/{s.model}-{s.preset}"


# ---- the run to compare with ---------------------------------------------------------------------


def twin(s, config, n_ids):
    """Flags of the run to compare this one with: the other kind of model, all else equal.

    n_ids: vocab_size of the tokenizer.
    """
    other = replace(s, model="crate" if s.model == "gpt2" else "gpt2")
    other.out = None if s.out == default_out(s) else f"{s.out}-{other.model}"
    changed = {}
    for f in fields(s):
        value = getattr(other, f.name)
        derived = f.name == "train_steps" and (s.tokens or s.epochs)
        if f.name != "overwrite" and value != f.default and not derived:
            changed[f.name] = value
    usual = new_config(s, n_ids)
    not_shared = KIND_FIELDS | unused(new_config(other, n_ids)).keys()
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name not in not_shared and value != getattr(usual, f.name):
            changed[f.name] = value
    return flags(changed)
