"""Copies of log.csv's rows for TensorBoard and Weights & Biases; imported only if asked for."""

import importlib.util
from dataclasses import asdict
from pathlib import Path

from crate_mini import UserError

PROJECT = "crate_mini"  # of Weights & Biases


def require(name):
    """Raise UserError, with the line that installs it, unless the package `name` is there."""
    if importlib.util.find_spec(name) is None:
        raise UserError(
            f"--log {name} needs the package {name}: `pip install {name}`; log.csv is always "
            "written."
        )


def start(trainer):
    """The logger that --log names, of a Trainer: call it with each row, and `close` at the end."""
    kind = {"tensorboard": TensorBoard, "wandb": WandB}[trainer.s.log]
    require(trainer.s.log)
    return kind(trainer)


class TensorBoard:
    """Scalars by step in the folder `tensorboard` of the run."""

    def __init__(self, trainer):
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(trainer.s.out, "tensorboard")
        # What a resumed run repeats is hidden from its first step on.
        self.writer = SummaryWriter(str(folder), purge_step=trainer.step + 1)
        trainer.say(f"log       tensorboard --logdir {folder}")

    def __call__(self, values):
        """values: {name: number} of a row, with "step"."""
        for name, value in values.items():
            if name != "step":
                self.writer.add_scalar(name, value, values["step"])
        self.writer.flush()

    def close(self):
        self.writer.close()


class WandB:
    """A run of the project crate_mini, named after the folder, with all settings."""

    def __init__(self, trainer):
        import wandb

        settings = {**asdict(trainer.s), **asdict(trainer.config)}
        name = Path(trainer.s.out).name
        self.run = wandb.init(project=PROJECT, name=name, dir=trainer.s.out, config=settings)

    def __call__(self, values):
        """values: {name: number} of a row, with "step"."""
        self.run.log(values, step=values["step"])

    def close(self):
        self.run.finish()
