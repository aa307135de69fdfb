"""Ctrl-C, words that a shell reads, text that a terminal shows, torchrun's report."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from forked import ROOT, heed_ctrl_c

from crate_mini import UserError
from crate_mini.console import signals, terminal

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
WORDS = [
    "plain",
    "two words",
    "",
    "it's",
    "back\\slash",
    "new\nline",
    "caf\udce9",
    "\x1b[31mred",
    "$HOME",
    "é",
    "\udce9'\\",
]


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_a_shell_reads_the_words_that_were_meant():
    line = "printf '%s\\0' " + terminal.typable(*WORDS)
    assert line.isprintable()
    done = subprocess.run(["bash", "-c", line], stdout=subprocess.PIPE, check=True)
    assert done.stdout.split(b"\0")[:-1] == [os.fsencode(word) for word in WORDS]


def test_a_value_that_begins_with_a_dash_is_taken_as_a_value():
    parser = terminal.Parser(prog="script.py")
    parser.add_argument("--out")
    for value in ("-x", "--resume", "a", "-1"):
        assert parser.parse_args(terminal.flag_words("--out", value)).out == value


def test_a_terminal_gets_no_escape_codes():
    text = "a\x1b]0;title\x07\r\x9b31m\u202eb\tc\nd é"
    assert terminal.printable(text) == "a\ufffd]0;title\ufffd\ufffd\ufffd31m\ufffdb\tc\nd é"


def test_an_error_with_escape_codes_is_printed_without(capsys):
    def main():
        raise UserError("no \x1b[31m.")

    with pytest.raises(SystemExit, match="2"):
        terminal.run(main)
    assert capsys.readouterr().err == "error: no \ufffd[31m.\n"


def test_torchrun_reports_the_sentence(tmp_path, monkeypatch, capsys):
    def main():
        raise UserError("bad --x.")

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit, match="2"):
        terminal.run(main)
    report = json.loads((tmp_path / "error.json").read_text())
    assert report["message"] == "error: bad --x." and report["timestamp"] > 0


def test_a_notebook_shows_the_sentence():
    assert UserError("bad --x.")._render_traceback_() == ["error: bad --x."]


# ---- Ctrl-C --------------------------------------------------------------------------------------


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_a_stop_request_notes_signals_and_puts_handlers_back():
    before = handlers()
    with terminal.StopRequest() as request:
        assert request.caught == 0
        signal.raise_signal(signal.SIGTERM)
        assert request.caught == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # the next acts at once
    assert handlers() == before


def test_a_second_ctrl_c_does_not_end_an_interactive_python(monkeypatch):
    monkeypatch.setattr(sys, "ps1", "> ", raising=False)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        with terminal.StopRequest():
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_leaves_signals_alone():
    outcomes = []

    def work():
        before = handlers()
        with signals(None), terminal.StopRequest():
            outcomes.append(handlers() == before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert outcomes == [True]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("library", ["_ctypes", "libtorch_python", "libtorch_cpu"])
def test_ctrl_c_during_imports_is_one_line(library, tmp_path):
    """When the process has just loaded a library, on the way to the first line of output."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py")],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_ctrl_c,
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while library not in maps.read_text():
        time.sleep(0.002)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "")
    assert error == "\ninterrupted; run the same command to start again.\n"


# ---- surroundings --------------------------------------------------------------------------------


@posix
def test_closed_streams_do_not_lend_their_numbers_to_files(tmp_path):
    code = (
        "from crate_mini.console import terminal\n"
        "def main():\n    with open('data', 'w') as file:\n        print('lost', flush=True)\n"
        "        file.write('kept')\nterminal.run(main)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = f'exec "{sys.executable}" -c "$1" <&- >&- 2>&-'
    done = subprocess.run(["sh", "-c", line, "sh", code], cwd=tmp_path, env=env)
    assert done.returncode == 0 and (tmp_path / "data").read_text() == "kept"


def test_the_package_names_what_can_be_run():
    done = subprocess.run(
        [sys.executable, "-m", "crate_mini"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr
    for script in ("train.py", "interpret.py", "steer.py"):
        assert f"python {script} " in done.stdout and (ROOT / script).exists()


@pytest.mark.parametrize("words", [["-OO", "train.py"], ["train.py"]])
def test_help_needs_no_docstrings_and_no_width(words):
    env = {**os.environ, "COLUMNS": "4"}
    done = subprocess.run(
        [sys.executable, *words, "--help"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--train-steps" in done.stdout and not done.stderr
