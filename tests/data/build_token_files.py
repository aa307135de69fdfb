"""Build token files in small parts, and send this process a signal at one of its file operations.

    python build_token_files.py SOURCE FOLDER OPERATION SIGNAL [LARGEST_FILE]

OPERATION: the number of the os.fsync or os.replace before which the signal comes; 0 for none.
LARGEST_FILE: bytes at which the kernel refuses to let a file grow, as a full disk would.
"""

import os
import resource
import signal
import sys
from pathlib import Path

from crate_mini.console import terminal
from crate_mini.data import sources, token_files
from crate_mini.data.tokenizer import load_tokenizer

operations = 0


def counted(function, fatal, number):
    """The function, preceded by signal `number` on the call that makes operation `fatal`."""

    def call(*args):
        global operations
        operations += 1
        if operations == fatal:
            os.kill(os.getpid(), number)
        return function(*args)

    return call


def main():
    source, folder = sys.argv[1:3]
    fatal, number = map(int, sys.argv[3:5])
    if len(sys.argv) > 5:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limit = int(sys.argv[5])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    token_files.PART = 3000
    token_files.BATCH = 1000
    os.replace = counted(os.replace, fatal, number)
    os.fsync = counted(os.fsync, fatal, number)
    # A background job of a shell starts with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    identity = {"format": 1, "source": sources.describe(source), "val_fraction": 0.1}
    token_files.prepare(Path(folder), identity, source, load_tokenizer("bytes"), 1, print)


if __name__ == "__main__":
    terminal.run(main)
