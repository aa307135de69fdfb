"""crate_mini: the smallest complete laboratory for white-box language models."""

import os
from contextlib import contextmanager
from pathlib import Path

__version__ = "0.1.0"


class UserError(Exception):
    """Bad input, in one sentence: the setting, its value, what was expected, a command that works.

    Scripts print the sentence and exit with code 2; nothing else in the package catches it.
    """


@contextmanager
def atomic_write(path):
    """A binary file that replaces `path` when the block ends without an exception.

    Raises UserError when the folder cannot be written or the disk is full, and leaves nothing
    behind.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"Cannot write {path}: {error.strerror or error}; make room or choose another folder."
        ) from None
    finally:
        if temporary.exists():
            temporary.unlink()


def load(checkpoint, **options):
    """A lab.Lab: the model of a checkpoint folder, ready to inspect, steer and generate."""
    from crate_mini.lab import Lab

    return Lab(checkpoint, **options)
