"""Saves that are killed or fail midway, run as `interrupted_saves.py TEST FOLDER`.

They need a separate process, because they fork, kill and limit it. Each prints a number for the
test in test_checkpoint.py that starts it.
"""

import os
import random
import signal
import sys
import time

import torch
from numbered_saves import holds, save, saved_step, trained

from crate_mini import UserError
from crate_mini.training import checkpoint

PARENT = os.getpid()


def child(work, *args):
    """The pid of a forked process that does this work: exit code 0, or 1 with the error printed."""
    pid = os.fork()
    if pid == 0:
        try:
            work(*args)
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
            os._exit(1)
        os._exit(0)
    return pid


def end_of(pid):
    """The exit code of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def keep_saving(path):
    """Save on and on, but not beyond a parent that has failed."""
    step = saved_step(path)
    while os.getppid() == PARENT:
        step += 1
        save(path, step)


def has_debris(path):
    return len(os.listdir(path)) > 3


def kill_at_random_moments(path):
    """Print how many of 20 kills hit a save."""
    draw, hits = random.Random(0), 0
    for _ in range(20):
        before = saved_step(path)
        pid = child(keep_saving, path)
        while saved_step(path) == before:  # a concurrent reader: files it is to open may vanish
            time.sleep(0.001)
        time.sleep(draw.random() * 0.03)
        kill(pid)
        hits += has_debris(path)
        step = saved_step(path)
        assert holds(path, step) and step > before
    save(path, 10**6)
    assert holds(path, 10**6) and not has_debris(path)
    print(hits)


def save_until_event(path, n):
    """Save number n, and die right before its nth write, fsync, rename or removal."""
    events = 0

    def mortal(call):
        def counting(*args, **kwargs):
            nonlocal events
            events += 1
            if events == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return counting

    checkpoint._HashingFile.write = mortal(checkpoint._HashingFile.write)
    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, mortal(getattr(os, name)))
    save(path, n)


def kill_at_every_event(path):
    """Print the number of events in a save."""
    last = n = 0
    code = None
    while code != 0:  # until a save has fewer than n events and ends well
        n += 1
        code = end_of(child(save_until_event, path, n))
        assert code in (0, -signal.SIGKILL), code
        step = saved_step(path)
        assert step in (last, n) and holds(path, step)
        last = step
    assert last == n and not has_debris(path)
    print(n)


def read_during_saves(path):
    """Print the number of checkpoints read in two seconds."""
    pid = child(keep_saving, path)
    steps, end = [], time.monotonic() + 2
    while time.monotonic() < end:
        meta, state, weights = checkpoint.load_resume(path)
        steps.append(meta["training"]["step"])
        assert state["step"] == steps[-1] == int(weights["positions.weight"][0, 0])
    kill(pid)
    assert steps == sorted(steps) and steps[-1] > steps[0], steps
    print(len(steps))


def save_in_limit(path, limit):
    """Save number 5 where no file may be longer than `limit` bytes; exit code 7 if it cannot."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        save(path, 5, vocab_size=9000)
    except UserError as error:
        assert "File too large" in str(error), error
        os._exit(7)


def limit_the_disk(path):
    """Limit file sizes so that torch's zip writer fails midway; print the largest file's size."""
    # Far more than a file's buffer, so that the limit strikes within a write.
    save(path, 0, vocab_size=9000)
    largest = max(os.path.getsize(os.path.join(path, name)) for name in os.listdir(path))
    for limit in (0, 1, 100, 700, 3000, largest // 2, largest - 1):
        assert end_of(child(save_in_limit, path, limit)) == 7, limit
        assert holds(path, 0) and not has_debris(path)
    assert end_of(child(save_in_limit, path, largest + 1000)) == 0 and holds(path, 5)
    print(largest)


if __name__ == "__main__":
    torch.set_num_threads(1)
    trained()[1].state.clear()  # small files: what matters is how many events a save has
    test, folder = sys.argv[1:]
    save(folder, 0)
    globals()[test](folder)
