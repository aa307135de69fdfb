"""Run a learner's file and judge it: in a process of its own, with a time limit.

The process may do whatever the file makes it do: leave, print without end, loop, crash. `grade`
answers in one sentence in any case. `examine` is the part in that process, which is started as
`python -m crate_mini.course.grading NUMBER FILE VERDICT SECONDS`.
"""

import contextlib
import faulthandler
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from dataclasses import asdict, dataclass
from pathlib import Path

from crate_mini import UserError
from crate_mini.console.results import ROOT
from crate_mini.course import exercise

PRINTED = 2**20  # bytes that a file may print
GRACE = 10  # seconds to end by itself after the time limit, and to import torch


@dataclass
class Verdict:
    """outcome: pass, fail, or unusable if there is nothing to judge; sentence: why."""

    outcome: str
    sentence: str = ""
    printed: str = ""

    @property
    def exit_code(self):
        return {"pass": 0, "fail": 1, "unusable": 2}[self.outcome]


def grade(number, path, seconds=60):
    """The Verdict on a learner's file, whatever the file does."""
    path = Path(path).resolve()
    with tempfile.TemporaryDirectory() as folder:
        verdict, trace = Path(folder, "verdict.json"), Path(folder, "trace.txt")
        words = [str(number), str(path), str(verdict), str(seconds)]
        process = subprocess.Popen(
            [sys.executable, "-m", "crate_mini.course.grading", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": _python_path(), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        late = threading.Event()
        timer = threading.Timer(seconds + GRACE, _stop, (process, late))
        timer.start()
        try:
            printed, flooded = _read(process)
            code = process.wait()
        finally:
            timer.cancel()
            _kill(process)
        text = printed.decode(errors="replace")
        if flooded:
            return Verdict("fail", f"it prints more than {PRINTED:,} bytes; print less.", text)
        if verdict.exists():
            return Verdict(**json.loads(verdict.read_text(encoding="utf-8")), printed=text)
        if late.is_set() or trace.exists() and trace.stat().st_size:
            return Verdict("fail", _late(path, trace, seconds), text)
        return Verdict("fail", _left(code), text)


def _python_path():
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def _stop(process, late):
    late.set()
    _kill(process)


def _kill(process):
    """Kill a process, and all that it has started."""
    with contextlib.suppress(OSError):  # it has ended
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def _read(process):
    """(what a process prints, whether it had to be stopped because that was too much)."""
    printed = b""
    with process.stdout:
        while chunk := process.stdout.read1(2**16):
            printed += chunk
            if len(printed) > PRINTED:
                _kill(process)
                return printed[:PRINTED], True
    return printed, False


def _late(path, trace, seconds):
    """The sentence for a file that is not done in time."""
    text = trace.read_text(encoding="utf-8", errors="replace") if trace.exists() else ""
    match = re.search(rf'File "{re.escape(str(path))}", line (\d+)', text)
    place = f" ({quoted(path, int(match[1]))})" if match else ""
    return f"it is not done after {seconds} seconds{place}; is there an endless loop?"


def _left(code):
    """The sentence for a file that ended the process."""
    if code < 0:
        return f"it crashed (signal {-code}); an index beyond the end of an array does that."
    return f"it ended the process (exit code {code}) before the check; take out exit()."


def quoted(path, number):
    """'line 12: `u = Z @ V`'."""
    with contextlib.suppress(OSError, IndexError):
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
        return f"line {number}: `{lines[number - 1].strip()[:80]}`"
    return f"line {number}"


# ---- in the learner's process --------------------------------------------------------------------


def examine(number, path):
    """The Verdict on a learner's file, which runs in this process."""
    chosen = exercise.find(number)
    if "FILE" in chosen.facts:
        return _judged(path, _check_file, chosen, path)
    return _judged(path, _check_python, chosen, path)


def _check_file(chosen, path):
    return chosen.module().check_file(path)


def _check_python(chosen, path):
    learner = sys.modules["learner"] = types.ModuleType("learner")
    exec(compile(Path(path).read_bytes(), str(path), "exec"), vars(learner))
    module = chosen.module()  # imports torch, which the file may have done
    from crate_mini.course.checking import Learner

    return module.check(Learner(vars(learner), module.MISTAKES))


def _judged(path, check, *args):
    """The Verdict of a check that returns a remark or raises."""
    try:
        return Verdict("pass", check(*args) or "")
    except UserError as error:
        return Verdict("unusable", str(error))
    except BaseException as error:  # exit(), too
        if type(error).__name__ == "Wrong":
            return Verdict("fail", str(error))
        return Verdict("fail", _failure(path, error))


def _failure(path, error):
    """An exception as a sentence, with the learner's last line."""
    kind, text = type(error).__name__, " ".join(str(error).split())[:300]
    if isinstance(error, SyntaxError):
        number = error.lineno or 1
        return f"{quoted(path, number)} is not valid Python: {error.msg}."
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == str(path)]
    if isinstance(error, NotImplementedError) and own:
        return f"{own[-1].name} is not written yet ({quoted(path, own[-1].lineno)})."
    if isinstance(error, SystemExit):
        place = f" ({quoted(path, own[-1].lineno)})" if own else ""
        return f"it calls exit(){place} before the check is done; take that out."
    if own:
        message = f"{kind}: {text}" if text else kind
        return f"{quoted(path, own[-1].lineno)} raises {message.rstrip('.')}."
    return f"the check cannot use what it returns ({kind}: {text.rstrip('.')})."


def main(number, path, verdict, seconds):
    with open(Path(verdict).with_name("trace.txt"), "w") as trace:
        faulthandler.dump_traceback_later(float(seconds), exit=True, file=trace)
        result = asdict(examine(int(number), path))
        faulthandler.cancel_dump_traceback_later()
    del result["printed"]
    sys.stdout.flush()
    finished = Path(verdict).with_suffix(".part")
    finished.write_text(json.dumps(result), encoding="utf-8")
    finished.replace(verdict)
    os._exit(0)  # whatever threads and exit handlers the file has left


if __name__ == "__main__":
    main(*sys.argv[1:])
