"""How a model is trained: every setting of train.py with its default and, as its comment, its help text."""

import math
from dataclasses import dataclass, fields

from crate_mini import UserError, cli

POSITIVE = ("train_steps", "batch_size", "micro_batch", "log_every", "eval_tokens")
SHARES = ("beta1", "beta2", "val_fraction")


@dataclass
class Settings:
    """How to train; what to train is model.Config. The defaults suit the default model on two CPU cores."""
    model: str = "crate"         # crate | gpt2 (the twin) | crate+ (crate with three variants on)
    preset: str = "3L"           # 1L | 2L | 3L | S | B: layers, heads and width of the paper's models
    data: str = "pydocs"         # pydocs, a named corpus, a file or folder (.txt .jsonl .parquet .bin)
    tokenizer: str = "pydocs:4095"  # pydocs | gpt2 | bytes | a file of ranks; NAME:N keeps the first N ranks
    init: str | None = None      # start from the weights of this checkpoint, ours or foreign
    out: str | None = None       # folder of the run (default out/MODEL-PRESET)
    overwrite: bool = False      # replace the run that --out already holds
    seed: int = 1337             # of the initial weights, the batches and the sample
    train_steps: int = 700       # optimizer steps
    batch_size: int = 16         # sequences of a step, over all processes and micro-batches
    micro_batch: int = 16        # sequences a process holds at a time; the rest of its share is accumulated
    lr: float = 2e-3             # peak learning rate
    min_lr: float | None = None  # at the end of the cosine (default lr / 10)
    warmup: int = 150            # steps of linear warm-up; CRATE needs a long one (eta |D|^2 starts near 2)
    weight_decay: float = 0.1    # on every tensor of two or more dimensions, as in the paper
    beta1: float = 0.9           # AdamW
    beta2: float = 0.95          # AdamW
    clip: float = 1.0            # largest gradient norm; 0 switches clipping off
    eval_every: int = 100        # steps between validations, each with a checkpoint; 0 only at the end
    eval_tokens: int = 65536     # tokens of such a validation; the one at the end takes all
    save_every: int = 0          # steps between further checkpoints; 0 none
    log_every: int = 10          # steps between lines in a pipe and rows of log.csv
    log_sparsity: bool = False   # add the share of non-zero codes (density) to every validation
    on_nonfinite: str = "stop"   # stop | skip: what to do with a step whose loss or gradient is not finite
    device: str = "auto"         # auto | cpu | cuda | cuda:N | mps
    dtype: str = "auto"          # auto | bfloat16 | float32: of the products; weights stay float32
    compile: str = "auto"        # auto | on | off: torch.compile
    val_fraction: float = 0.1    # share of documents held out for validation

    def check(self):
        """Raise UserError for a value that no run can have."""
        for f in fields(self):
            value, kind, flag = getattr(self, f.name), cli.kind_of(f), "--" + f.name.replace("_", "-")
            if value is not None and not isinstance(value, (int, float) if kind is float else kind):
                raise UserError(f"{flag} {value!r} is not of type {kind.__name__}, like {f.default!r}.")
            if kind in (int, float) and value is not None and not 0 <= value < 2 ** 31:
                raise UserError(f"{flag} {value} must lie in 0 to 2147483647, for example {f.default}.")
            if f.name in POSITIVE and value < 1:
                raise UserError(f"{flag} {value} must be at least 1, for example {f.default}.")
            if f.name in SHARES and value >= 1:
                raise UserError(f"{flag} {value} must be below 1, for example {f.default}.")
        if self.on_nonfinite not in ("stop", "skip"):
            raise UserError(f"--on-nonfinite {self.on_nonfinite!r} is unknown; choose stop or skip.")

    def lr_at(self, step):
        """Learning rate of a step: linear warm-up, then a cosine to min_lr at the last step."""
        low = self.lr / 10 if self.min_lr is None else self.min_lr
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        share = (step - self.warmup) / max(1, self.train_steps - 1 - self.warmup)
        return low + 0.5 * (self.lr - low) * (1 + math.cos(math.pi * min(1.0, share)))
