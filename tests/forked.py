"""Run scripts in children of one warm process, because `import torch` costs seconds each time.

    from forked import run_script, start_script

    done = run_script(["train.py", "--help"])             # like subprocess.run(text=True)
    done.returncode, done.stdout, done.stderr
    process = start_script(["train.py", "--out", "run"])  # like subprocess.Popen, with pipes
    process.stdout.readline(), process.send_signal(SIGTERM), process.wait(60)

The words are those after `python`: a script (in `cwd`, else in the root of this checkout), or
`-m MODULE`, or `-c CODE`. The child runs them as `__main__` with its own arguments, working folder,
environment and streams, and ends as Python ends: atexit functions, tracebacks, exit codes, signals.

A child shares with the server that it is forked from: the interpreter's start (PYTHON... variables,
hash seed), one thread for OpenMP, and imported modules, including those of this checkout. A test of
these gives fresh=True, which starts a new process. So does an environment that differs in a
variable read at such a start, and a system without fork.

The server imports, but never computes: forking is unsafe once OpenMP or autograd threads exist.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
# Prefixes of variables that Python, torch or ops.py read when they start.
READ_AT_START = ("PYTHON", "LD_", "DYLD_", "TORCH", "CXX", "CRATE_BACKEND", *ONE_THREAD)
IMPORTS = (
    "torch",
    "torch._dynamo",  # what the first optimizer imports
    "torch.distributed.nn",
    "torch.nn.parallel",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "train",
)


# ---- in the tests --------------------------------------------------------------------------------


def run_script(words, cwd=None, env=None, *, input=None, timeout=300, fresh=False):
    """Run `python WORDS` to its end; returns a subprocess.CompletedProcess with text output.

    Raises subprocess.TimeoutExpired, after killing the child, if it takes more than `timeout` s.
    """
    process = start_script(words, cwd, env, stdin=input is not None, fresh=fresh)
    try:
        stdout, stderr = process.communicate(input, timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def start_script(words, cwd=None, env=None, *, stdin=False, fresh=False, full_exit=False):
    """Start `python WORDS`; returns a Child, or a subprocess.Popen where no fork will do.

    Both have pid, args, stdout and stderr (text pipes), returncode, poll, wait, communicate,
    send_signal, terminate and kill. stdin: whether there is a pipe to write to, else it is empty.
    full_exit: the child also takes its modules apart, as Python does in the end; this costs more
    than most scripts, so that a child otherwise ends after its atexit functions.
    """
    words = [str(word) for word in words]
    cwd = os.path.abspath(cwd or os.getcwd())
    env = dict(os.environ if env is None else env)
    if not words[0].startswith("-") and not os.path.exists(os.path.join(cwd, words[0])):
        words[0] = str(ROOT / words[0])
    changed = {name for name in {*env, *os.environ} if env.get(name) != os.environ.get(name)}
    changed -= {name for name, value in ONE_THREAD.items() if env.get(name) == value}
    if fresh or not hasattr(os, "fork") or any(name.startswith(READ_AT_START) for name in changed):
        return subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            env=env,
            preexec_fn=heed_ctrl_c if os.name == "posix" else None,
        )
    request = {"words": words, "cwd": cwd, "env": {**env, **ONE_THREAD}, "full_exit": full_exit}
    return Child(request, stdin)


def heed_ctrl_c():
    """Heed SIGINT, which background jobs of a shell, and so their children, ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Child:
    """A script in a process forked from the server, with the interface of subprocess.Popen."""

    def __init__(self, request, with_stdin):
        self.args = request["words"]
        self.returncode = None
        stdin, stdin_end = os.pipe()
        stdout_end, stdout = os.pipe()
        stderr_end, stderr = os.pipe()
        status_end, status = os.pipe()
        send(server(), request, [stdin, stdout, stderr, status])
        for handle in (stdin, stdout, stderr, status):
            os.close(handle)
        self.stdin = os.fdopen(stdin_end, "w")
        if not with_stdin:
            self.stdin.close()
        self.stdout = os.fdopen(stdout_end)
        self.stderr = os.fdopen(stderr_end)
        self._status = os.fdopen(status_end, "rb", buffering=0)  # what select sees is all there is
        self.pid = self._read_number()

    def _read_number(self):
        line = self._status.readline()
        if not line:
            raise RuntimeError(f"the server of tests/forked.py died while running {self.args}")
        return int(line)

    def poll(self):
        """The exit code, negative for a signal; None while the child runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout=None):
        """Wait for the end; returns the exit code. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            ready, _, _ = select.select([self._status], [], [], timeout)
            if not ready:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = self._read_number()
            self._status.close()
        return self.returncode

    def communicate(self, input=None, timeout=None):
        """Write `input`, read both outputs to their ends, wait; returns (stdout, stderr)."""
        end = None if timeout is None else time.monotonic() + timeout
        outputs = {}

        def read(name):
            outputs[name] = getattr(self, name).read()

        readers = [
            threading.Thread(target=read, args=(name,), daemon=True)
            for name in ("stdout", "stderr")
        ]
        for reader in readers:
            reader.start()
        with contextlib.suppress(BrokenPipeError):
            if input is not None:
                self.stdin.write(input)
            self.stdin.close()
        for reader in readers:
            reader.join(None if end is None else max(0, end - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(None if end is None else max(0, end - time.monotonic()))
        self.stdout.close()
        self.stderr.close()
        return outputs["stdout"], outputs["stderr"]

    def send_signal(self, number):
        """Send a signal unless the child has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


@functools.cache
def server():
    """The connection to the server, which starts with the first script and ends with the tests."""
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # so that children buffer as they do in a pipe
        env={**os.environ, **ONE_THREAD},
        cwd=ROOT,
        pass_fds=[theirs.fileno()],
    )
    theirs.close()

    def stop():
        process.terminate()
        process.wait()
        ours.close()

    atexit.register(stop)
    return ours


# ---- between the two -----------------------------------------------------------------------------


def send(connection, request, handles):
    """Send a JSON-able request and open files."""
    content = json.dumps(request).encode()
    socket.send_fds(connection, [len(content).to_bytes(8, "little")], handles)
    connection.sendall(content)


def receive(connection):
    """(request, open files) from `send`; (None, []) when the tests have ended."""
    header, handles, _, _ = socket.recv_fds(connection, 8, 4)
    if not header:
        return None, []
    length = int.from_bytes(header, "little")
    content = bytearray()
    while len(content) < length:
        content += connection.recv(length - len(content))
    return json.loads(content), handles


# ---- in the server -------------------------------------------------------------------------------


def serve(connection):
    """Fork a child for each request. Returns in the children only: (request, its open files).

    Between the server and a child stands an attendant, which reports the child's pid and exit code.
    """
    while True:
        request, handles = receive(connection)
        if request is None:
            os._exit(0)
        if os.fork() == 0:
            break
        for handle in handles:
            os.close(handle)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass  # an attendant that has ended
    connection.close()
    *streams, status = handles
    child = os.fork()
    if child == 0:
        os.close(status)
        return request, streams
    for handle in streams:
        os.close(handle)
    with contextlib.suppress(OSError):  # the tests may have ended
        os.write(status, b"%d\n" % child)
        _, wait_status = os.waitpid(child, 0)
        os.write(status, b"%d\n" % os.waitstatus_to_exitcode(wait_status))
    os._exit(0)


def become(request, streams):
    """Turn this process into `python WORDS`, up to the point where the script begins."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.dup2(streams[number], number)
        os.close(streams[number])
        old = getattr(sys, name)
        buffering = 1 if name == "stderr" else -1
        new = os.fdopen(number, old.mode, buffering, old.encoding, old.errors, closefd=False)
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    if request["full_exit"]:
        atexit.unregister(leave)
    words = request["words"]
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path[0] = request["cwd"]
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.path[0] = ""
    else:
        sys.argv = words
        sys.path[0] = os.path.dirname(os.path.realpath(words[0]))
    return words


EXIT_CODES = []  # of this child's script, once it has ended


def main():
    """Import, serve, and in each child run what was asked for."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests and their children
    sys.path.insert(1, str(ROOT))
    atexit.register(leave)
    for name in IMPORTS:
        with contextlib.suppress(Exception):  # what is broken fails again, and visibly, in a child
            importlib.import_module(name)
    del sys.path[1]
    tasks = Path("/proc/self/task")
    assert not tasks.exists() or len(list(tasks.iterdir())) == 1, "an import has started threads"
    gc.collect()
    gc.freeze()  # children share these pages for longer
    words = become(*serve(connection))
    try:
        run(words)
        EXIT_CODES.append(0)
    except SystemExit as end:
        code = 0 if end.code is None else end.code
        EXIT_CODES.append(code if isinstance(code, int) else 1)
        raise
    except Exception:
        EXIT_CODES.append(1)
        raise


def run(words):
    """Run the script, module or code."""
    if words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(words[0], run_name="__main__")


def leave():
    """End a child without taking its modules apart, which would copy every page they are on.

    Registered before all imports, it is the last of the atexit functions.
    """
    with contextlib.suppress(OSError, ValueError):  # a closed stream, which Python itself reports
        sys.stdout.flush()
        sys.stderr.flush()
        if EXIT_CODES:
            os._exit(EXIT_CODES[0] & 0xFF)


if __name__ == "__main__":
    main()
