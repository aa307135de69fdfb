"""crate_mini: the smallest complete laboratory for white-box language models."""

__version__ = "0.1.0"


class UserError(Exception):
    """Bad input, told in one sentence: what, its value, what was expected, a command that works.

    Scripts print the sentence and exit with code 2; nothing else in the package catches it.
    """
