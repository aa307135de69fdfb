"""Compare training runs: `python -m crate_mini.compare out/a out/b`.

Prints what differs between their settings, and their results; draws their losses over one another.
"""

import sys

from crate_mini.console import terminal

HERE = "crate_mini.compare.command"


def main():
    return terminal.run_command("-m crate_mini.compare", HERE, sys.argv[1:], __doc__)


if __name__ == "__main__":
    terminal.run(main)
