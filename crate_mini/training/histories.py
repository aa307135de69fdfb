"""Several checkpoints of one run, such as those of train.py's --keep-every, in order of step."""

from pathlib import Path

from crate_mini import UserError
from crate_mini.training import checkpoint


def each(ckpts, device="auto", tokenizer=None):
    """Yield (step, path, model, meta, Tokenizer) of each checkpoint, by step.

    Raises UserError unless all have the same Config and tokenizer, and different steps.
    """
    steps = {}
    for path in ckpts:
        step = checkpoint.read_meta(Path(path))["training"].get("step")
        if not isinstance(step, int) or step in steps:
            other = f", as {steps[step]} has" if isinstance(step, int) else ""
            raise UserError(
                f"{path} has step {step}{other}; give checkpoints of different steps of one run, "
                "like out/run/step-*."
            )
        steps[step] = path
    first = None
    for step, path in sorted(steps.items()):
        model, meta, its_tokenizer = checkpoint.open_model(path, device, tokenizer)
        first = first or (path, meta)
        if meta["config"] != first[1]["config"] or meta["tokenizer"] != first[1]["tokenizer"]:
            raise UserError(
                f"{path} and {first[0]} are models of different shapes or tokenizers; give "
                "checkpoints of one run, like out/run/step-*."
            )
        yield step, path, model, meta, its_tokenizer
