"""crate_mini: the smallest complete laboratory for white-box language models."""

__version__ = "0.1.0"


class UserError(Exception):
    """Bad input, in one sentence: the setting, its value, what was expected, a command that works.

    Scripts print the sentence and exit with code 2, notebooks show it.
    """

    def _render_traceback_(self):  # IPython calls this
        return [f"error: {self}"]


def load(checkpoint, **options):
    """A lab.Lab: the model of a checkpoint folder, ready to inspect, steer and generate."""
    from crate_mini.lab import Lab

    return Lab(checkpoint, **options)


def train(**settings):
    """A lab.Lab of a model trained now, with the settings of train.py by name, like lr=1e-3."""
    from crate_mini.lab import train

    return train(**settings)
