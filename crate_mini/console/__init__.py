"""The side of a script that its user sees: commands, errors, progress.

Here only what a script needs before all other imports, which take seconds: an answer to Ctrl-C.
"""

import os
import signal
import sys
import threading
from contextlib import contextmanager

INTERRUPTED = "\ninterrupted; run the same command to start again."


@contextmanager
def signals(handler):
    """Call handler(number, frame) for SIGINT and SIGTERM that arrive while the block runs.

    In a thread other than the main one, where Python allows no handlers, they act as before.
    """
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, handler) or signal.SIG_DFL
    try:
        yield
    finally:
        for number, old_handler in previous.items():
            signal.signal(number, old_handler)


@contextmanager
def interruptible_imports(name):
    """A block of a script's imports, in which Ctrl-C ends it with one line; name: its __name__.

    Raised within `import torch`, KeyboardInterrupt would end in a traceback or be swallowed. For
    `--help` alone, PyTorch is not imported.
    """

    def end(number, frame):
        os.write(2, f"{INTERRUPTED}\n".encode())
        os._exit(128 + number)

    if name != "__main__":
        yield
        return
    prepare_help(sys.argv[1:])
    with signals(end):
        yield


def prepare_help(words):
    """Let what is imported from now on load no PyTorch, if a command's words ask for its help."""
    if "-h" in words or "--help" in words:
        from crate_mini.console import stand_ins  # only then

        if stand_ins.asks_for_help(words):
            stand_ins.install()
