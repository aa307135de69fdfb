"""How a model is trained: every setting of train.py with its default and, as its comment, its help text.

`parse` makes of the command line, a --config file and a checkpoint: settings, a model's shape, and a state.
"""

import math
import shlex
from dataclasses import dataclass, fields, replace
from pathlib import Path

from crate_mini import UserError, cli
from crate_mini.data import batches as data
from crate_mini.model import KINDS, SIZES, Config, preset
from crate_mini.training import checkpoint

POSITIVE = ("train_steps", "batch_size", "micro_batch", "log_every", "eval_tokens")
SHARES = ("beta1", "beta2", "val_fraction")
OF_KIND = {name for kind in KINDS.values() for name in kind}  # what --model decides
HELP = {
    "vocab_size": "rows of the embedding (default the tokenizer's ids, rounded up to a multiple of 64)",
    "block_size": "T, the longest context (default 256 for 1L 2L 3L, 1024 for S B)",
}
DEFAULTS = {
    **dict.fromkeys(OF_KIND, "as --model says"),
    **dict.fromkeys(SIZES["S"], "as --preset says"),
    "min_lr": "lr / 10",
    "out": "out/MODEL-PRESET",
}


@dataclass
class Settings:
    """How to train; what to train is model.Config. The defaults suit the default model on two CPU cores."""

    model: str = "crate"  # crate | gpt2 (the twin) | crate+ (crate with three variants on)
    preset: str = "3L"  # 1L | 2L | 3L | S | B: layers, heads and width of the paper's models
    data: str = "pydocs"  # pydocs, a named corpus, a file or folder (.txt .jsonl .parquet .bin)
    tokenizer: str = (
        "pydocs:4095"  # pydocs | gpt2 | bytes | a file of ranks; NAME:N keeps the first N ranks
    )
    init: str | None = None  # start from the weights of this checkpoint, ours or foreign
    out: str | None = None  # folder of the run
    overwrite: bool = False  # replace the run that --out already holds
    seed: int = 1337  # of the initial weights, the batches and the sample
    train_steps: int = 1000  # optimizer steps
    batch_size: int = 16  # sequences of a step, over all processes and micro-batches
    micro_batch: int = (
        16  # sequences a process holds at a time; the rest of its share is accumulated
    )
    lr: float = 3e-3  # peak learning rate
    min_lr: float | None = None  # learning rate at the end of the cosine
    warmup: int = 250  # steps of linear warm-up; CRATE needs a long one (eta |D|^2 starts near 2)
    weight_decay: float = 0.1  # on every tensor of two or more dimensions, as in the paper
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    clip: float = 1.0  # largest gradient norm; 0 switches clipping off
    eval_every: int = 100  # steps between validations, each with a checkpoint; 0 only at the end
    eval_tokens: int = 65536  # tokens of such a validation; the one at the end takes all
    save_every: int = 0  # steps between further checkpoints; 0 none
    log_every: int = 10  # steps between lines in a pipe and rows of log.csv
    log_sparsity: bool = False  # add the share of non-zero codes (density) to every validation
    on_nonfinite: str = (
        "stop"  # stop | skip: what to do with a step whose loss or gradient is not finite
    )
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps
    dtype: str = "auto"  # auto | bfloat16 | float32: of the products; weights stay float32
    compile: str = "auto"  # auto | on | off: torch.compile
    val_fraction: float = 0.1  # share of documents held out for validation

    def check(self):
        """Raise UserError for a value that no run can have."""
        for f in fields(self):
            value, kind, flag = (
                getattr(self, f.name),
                cli.kind_of(f),
                "--" + f.name.replace("_", "-"),
            )
            if value is None and f.default is None:
                continue
            allowed = (int, float) if kind is float else kind
            like = {float: 1e-4, str: "a name"}[kind] if f.default is None else f.default
            if not isinstance(value, allowed) or isinstance(value, bool) != (kind is bool):
                raise UserError(f"{flag} {value!r} is not of type {kind.__name__}, like {like!r}.")
            if kind in (int, float) and not 0 <= value < 2**31:
                raise UserError(f"{flag} {value} must lie in 0 to 2147483647, for example {like}.")
            if kind is str and (not value or "\0" in value):
                what = "holds a zero byte, which no name can" if value else "is empty"
                raise UserError(f"{flag} {value!r} {what}; leave it out or try {like}.")
            if f.name in POSITIVE and value < 1:
                raise UserError(f"{flag} {value} must be at least 1, for example {like}.")
            if f.name in SHARES and not 0 < value < 1:
                raise UserError(f"{flag} {value} must be above 0 and below 1, for example {like}.")
        if self.on_nonfinite not in ("stop", "skip"):
            raise UserError(
                f"--on-nonfinite {self.on_nonfinite!r} is unknown; choose stop or skip."
            )
        if not self.lr:
            raise UserError(f"--lr {self.lr} learns nothing; leave it out or try {Settings.lr}.")
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
        share = (step - self.warmup) / max(1, self.train_steps - 1 - self.warmup)
        return low + 0.5 * (self.lr - low) * (1 + math.cos(math.pi * min(1.0, share)))


def new_config(s, ids, changes=()):
    """Config of a new model, for a tokenizer of so many ids: --model and --preset, single fields changed."""
    size = {"vocab_size": -(-ids // 64) * 64, "block_size": 256 if s.preset.endswith("L") else 1024}
    try:
        return preset(s.preset, s.model, **{**size, **dict(changes)})
    except UserError as error:
        names = {"preset", "model", *(f.name for f in fields(Config))}
        raise UserError(cli.as_flags(str(error), names)) from None


def idle(config):
    """{field: why} of the settings that change nothing in this model, such as ISTA's in one with an MLP."""
    names = (
        {"activation"}
        if config.sparsifier == "ista"
        else {"ista_steps", "eta", "lam", "separate_decoder", "learned_lam", "unit_norm"}
    )
    found = dict.fromkeys(names, f"--sparsifier {config.sparsifier}")
    return found if config.attention == "mssa" else {**found, "query_rank": "--attention mhsa"}


def twin(s, config, ids):
    """Flags of the run to compare this one with: the other kind of model, all other settings as here."""
    other = replace(s, model="crate" if s.model == "gpt2" else "gpt2")
    other.out = None if s.out == default_out(s) else f"{s.out}-{other.model}"
    changed = {
        f.name: getattr(other, f.name)
        for f in fields(s)
        if f.name != "overwrite" and getattr(other, f.name) != f.default
    }
    usual, ours = new_config(s, ids), OF_KIND | idle(new_config(other, ids)).keys()
    changed |= {
        f.name: getattr(config, f.name)
        for f in fields(config)
        if f.name not in ours and getattr(config, f.name) != getattr(usual, f.name)
    }
    return cli.flags(changed)


def default_out(s):
    """Where a run goes that was not told where."""
    if s.init:
        return f"out/init-{Path(s.init).resolve().parent.name}"
    return f"out/{s.model}-{s.preset}"


def parse(argv=None):
    """Command line, --config file and checkpoint -> (Settings, Config, what else a run starts from)."""
    parser = cli.Parser(
        prog="train.py",
        description="Train a CRATE language model or its GPT-2 twin; "
        "with --task classify a classifier, see `train.py --task classify --help`.",
    )
    parser.add_argument("--config", help="a JSON file of settings by name; flags win over it")
    parser.add_argument(
        "--resume", metavar="FOLDER", help="go on with the run in this folder, exactly"
    )
    cli.add_fields(parser, Settings, "training", defaults=DEFAULTS)
    cli.add_fields(parser, Config, "model", HELP, DEFAULTS)
    flags = vars(parser.parse_args(argv))
    config_file, resumed = flags.pop("config"), flags.pop("resume")
    training, shape = {f.name for f in fields(Settings)}, {f.name for f in fields(Config)}
    given = {
        **(
            cli.read_json(config_file, sorted(training | shape), 'settings like {"lr": 0.001}')
            if config_file
            else {}
        ),
        **flags,
    }
    changes = {name: value for name, value in given.items() if name in shape}
    given = {name: value for name, value in given.items() if name in training}
    if "" in (config_file, resumed):
        raise UserError("--config '' or --resume '' is empty; leave it out or give a name.")
    if resumed:
        return resume(resumed, given, changes)
    s = Settings(**given)
    s.check()
    start = {}
    s.out = s.out or default_out(s)
    if s.init:
        lm, meta = checkpoint.load(s.init)
        config, start = lm.config, {"weights": lm.state_dict(), "meta": meta}
        refuse(
            {**changes, **{k: given[k] for k in ("model", "preset") if k in given}}, config, s.init
        )
        s.tokenizer = given.get("tokenizer", meta["tokenizer"]["spec"])
    else:
        ids = data.load_tokenizer(s.tokenizer).vocab_size
        config = new_config(s, ids, changes)
        if config.vocab_size < ids:
            raise UserError(
                f"--vocab-size {config.vocab_size} is below the {ids} ids of --tokenizer "
                f"{s.tokenizer}; leave it out, it follows the tokenizer."
            )
        for name, why in idle(config).items():
            if changes.get(name, getattr(Config, name)) != getattr(Config, name):
                raise UserError(
                    f"{shlex.join(cli.flags({name: changes[name]}))} does nothing beside {why}; "
                    "leave it out."
                )
    if not s.overwrite and Path(s.out, "last", "config.json").exists():
        raise UserError(
            f"{s.out} already holds a run; go on with --resume {s.out}, choose another --out, or "
            "replace it with --overwrite."
        )
    return s, config, start


def resume(folder, given, changes):
    """Settings, Config and state of the run in `folder`, with single settings changed."""
    if Path(folder).name == "last" and Path(folder, "config.json").exists():
        folder = str(Path(folder).parent)
    meta, state, weights = checkpoint.load_resume(Path(folder, "last"))
    old, config = meta["training"]["settings"], Config(**meta["config"])
    for name in ("init", "out", "overwrite"):
        if given.get(name):
            raise UserError(
                f"--{name} does not go with --resume, which continues the run in {folder}."
            )
    for name in ("model", "preset"):
        if given.get(name, old[name]) != old[name]:
            raise UserError(
                f"--{name} {given[name]} differs from the {old[name]} of {folder}; leave it out."
            )
    refuse(changes, config, folder)
    s = Settings(**{**old, **given, "out": folder})
    s.check()
    finished = "val_loss" in meta["training"]  # else it was killed on the last step
    if state["step"] > s.train_steps or state["step"] == s.train_steps and finished:
        raise UserError(
            f"the run in {folder} has done all its {state['step']} steps; "
            f"add --train-steps {2 * state['step']} to go on."
        )
    return s, config, {"weights": weights, "meta": meta, "state": state}


def refuse(changes, config, place):
    """Weights that exist have their shape: raise UserError for a flag that says otherwise."""
    for name, value in changes.items():
        old = getattr(config, name, "weights")
        if value != old:
            raise UserError(
                f"--{name.replace('_', '-')} {value} differs from the {old} of {place}; leave it "
                "out, or start from new weights."
            )
