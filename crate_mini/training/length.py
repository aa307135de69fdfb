"""The length of a run in tokens or epochs: --tokens 65M, --epochs 2."""

import math
import re

from crate_mini import UserError

UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
COUNT = re.compile(r"(\d{1,12}(?:[_,]\d{3}){0,3}(?:\.\d{1,9})?) ?([kmbg]?)", re.IGNORECASE)
MOST_STEPS = 2**31 - 1  # what --train-steps takes


def count(text):
    """The number that a text like 65M, 1.5B, 4_096_000 or 300k names. Raises UserError."""
    match = COUNT.fullmatch(str(text).strip())
    number = 0
    if match:
        number = round(float(re.sub("[_,]", "", match[1])) * UNITS[match[2].lower()])
    if number < 1:
        raise UserError(
            f"--tokens {text!r} is not a number of tokens; give one like 65M, 1.5B or 4096000."
        )
    return number


def set_steps(trainer):
    """Set s.train_steps of a Trainer from --tokens or --epochs, and print the arithmetic.

    Raises UserError if a run that is resumed with a new length has already done as many steps.
    """
    s, config = trainer.s, trainer.config
    if s.tokens:
        wanted = count(s.tokens)
        origin = f"--tokens {s.tokens}: {wanted:,}"
    else:
        n_tokens = trainer.corpus.n_tokens["train"]
        wanted = s.epochs * n_tokens
        origin = f"--epochs {s.epochs:g}: {s.epochs:g} x {n_tokens:,}"
    a_step = s.batch_size * config.block_size
    steps = max(1, math.ceil(wanted / a_step))
    if steps > MOST_STEPS:
        raise UserError(
            f"{origin} tokens are {steps:,} steps, more than {MOST_STEPS:,}; give less."
        )
    if trainer.step > steps or trainer.step == steps != s.train_steps:
        raise UserError(
            f"the run in {s.out} has done {trainer.step} steps, and {origin} tokens are {steps}; "
            "give more."
        )
    s.train_steps = steps
    trainer.say(
        f"length    {origin} tokens / ({s.batch_size} x {config.block_size} a step) = {steps:,} "
        f"steps of {a_step:,} tokens, rounded up"
    )
