"""Run the files of tests in several processes, forked once everything has been imported.

    run(session, workers)    instead of pytest's own loop over session.items

A worker takes one file after the other. The first worker is the process of pytest itself: it shows
what all of them report, so that output, exit code and plugins are those of a single process. What a
worker that was forked lacks is a terminal: its warnings are lost.
"""

import contextlib
import itertools
import json
import os
import signal
import tempfile
import time
from pathlib import Path

import pytest

TAKEN = 4  # bytes of a number in the queue: a pipe hands these out whole


def can_fork():
    """Whether forking is safe here: the system knows it, and no other thread is running."""
    tasks = Path("/proc/self/task")
    return hasattr(os, "fork") and tasks.exists() and len(list(tasks.iterdir())) == 1


def run(session, workers):
    """Run session.items; raises what pytest's own loop does (Failed, Interrupted)."""
    files = [list(items) for _, items in itertools.groupby(session.items, lambda item: item.path)]
    queue = queue_of(len(files))
    session.config._tmp_path_factory.getbasetemp()  # one folder, which pytest removes in the end
    with contextlib.ExitStack() as stack:
        others = []
        for _ in range(workers - 1):
            reports = stack.enter_context(tempfile.TemporaryFile())
            others.append(stack.enter_context(Worker(session, files, queue, reports)))
        for item, following in in_turn(files, queue):
            run_item(session, item, following)
            for worker in others:
                worker.show(session)
            stop_if_asked(session)
        for worker in others:
            while not worker.show(session):
                stop_if_asked(session)
                time.sleep(0.05)
        stop_if_asked(session)


def run_item(session, item, following):
    session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)


def stop_if_asked(session):
    """As pytest's own loop does after each test."""
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    if session.shouldstop:
        raise session.Interrupted(session.shouldstop)


def queue_of(count):
    """The reading end of a pipe that holds the numbers 0 to count - 1, and then ends."""
    reading, writing = os.pipe()
    os.write(writing, b"".join(number.to_bytes(TAKEN, "little") for number in range(count)))
    os.close(writing)
    return reading


def take(files, queue):
    """The tests of the next file; [] when all files are taken."""
    number = os.read(queue, TAKEN)
    return files[int.from_bytes(number, "little")] if number else []


def in_turn(files, queue):
    """(test, the test after it or None) of this worker.

    A file is taken before the last test of the file before it runs: fixtures of the whole session
    are kept only if pytest knows a following test.
    """
    tests = take(files, queue)
    while tests:
        yield from itertools.pairwise(tests)
        following = take(files, queue)
        yield tests[-1], following[0] if following else None
        tests = following


class Worker:
    """A forked process that runs tests; as a context it ends with the block."""

    def __init__(self, session, files, queue, reports):
        self.reports = reports.fileno()  # a file, since a pipe could fill up: JSON lines
        self.position = 0
        self.last_test = "no test"
        self.exit_code = None
        self.pid = os.fork()
        if self.pid == 0:
            become_worker(session, files, queue, self.reports)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.exit_code is None:
            os.kill(self.pid, signal.SIGTERM)
            os.waitpid(self.pid, 0)

    def show(self, session):
        """Show what has been reported since the last time; returns whether the worker has ended.

        Raises pytest.exit.Exception if it was ended by something else than its last test.
        """
        if self.exit_code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.exit_code = os.waitstatus_to_exitcode(status)
        content = os.pread(self.reports, 2**30, self.position)
        lines = content[: content.rfind(b"\n") + 1]
        self.position += len(lines)
        for line in lines.splitlines():
            self.replay(session.config, json.loads(line))
        if self.exit_code:
            message = f"a worker ended with {self.exit_code} in or after {self.last_test}"
            pytest.exit(message, returncode=1)
        return self.exit_code is not None

    def replay(self, config, data):
        """Let all plugins see one report."""
        report = config.hook.pytest_report_from_serializable(config=config, data=data)
        self.last_test = report.nodeid
        place = dict(nodeid=report.nodeid, location=report.location)
        if report.when == "setup":
            config.hook.pytest_runtest_logstart(**place)
        config.hook.pytest_runtest_logreport(report=report)
        if report.when == "teardown":
            config.hook.pytest_runtest_logfinish(**place)


class Reporter:
    """In a worker: the plugin that writes each report for the process that shows them."""

    def __init__(self, config, handle):
        self.config = config
        self.handle = handle

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        os.write(self.handle, json.dumps(data).encode() + b"\n")


def become_worker(session, files, queue, handle):
    """Run tests in this process, which was just forked, and end it."""
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        plugins = session.config.pluginmanager
        capture = plugins.getplugin("capturemanager")
        if capture.is_globally_capturing():
            capture.stop_global_capturing()  # its files are those of the first worker
            capture.start_global_capturing()
        plugins.unregister(name="terminalreporter")
        plugins.register(Reporter(session.config, handle))
        for item, following in in_turn(files, queue):
            run_item(session, item, following)
        code = 0
    except KeyboardInterrupt:
        session._setupstate.teardown_exact(None)
    finally:
        os._exit(code)
