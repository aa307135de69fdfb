"""Two processes share the files of tests, and what they report is what one process would."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import side_by_side

CONFTEST = """
import os, time
import pytest, side_by_side

def pytest_runtestloop(session):
    side_by_side.run(session, 2)
    return True

@pytest.fixture(scope="session")
def kept(tmp_path_factory):
    with open("log", "a") as log:
        log.write(f"start {os.getpid()}\\n")
    yield tmp_path_factory.mktemp("kept")
    with open("log", "a") as log:
        log.write(f"end {os.getpid()}\\n")
"""
FILE = """
import os, signal, time

def test_first(kept, tmp_path):
    time.sleep(0.1)

def test_second(kept, capfd):
    os.system("echo from a child")
    assert capfd.readouterr().out == "from a child\\n"
"""
DEATH = """
MAIN = os.getpid()

def die():
    if os.getpid() != MAIN:
        os.kill(os.getpid(), 9)
    return True
"""
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")


@pytest.fixture
def project(tmp_path):
    """A folder of six files with two tests each."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "conftest.py").write_text(CONFTEST)
    for number in range(6):
        (tmp_path / f"test_{number}.py").write_text(FILE)
    return tmp_path


def start(project, *words):
    path = str(Path(side_by_side.__file__).parent)
    command = [sys.executable, "-m", "pytest", *words]
    return subprocess.Popen(
        command,
        cwd=project,
        env={**os.environ, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=obey_ctrl_c,
    )


def obey_ctrl_c():
    """What a shell starts in the background ignores SIGINT, and so do the processes it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(project, *words):
    process = start(project, *words)
    output, _ = process.communicate(timeout=100)
    return process.returncode, output


def add_test(project, number, code):
    with open(project / f"test_{number}.py", "a") as file:
        file.write(f"\ndef test_third():\n    {code}\n")


def log(project):
    """{process: what its session fixture did}."""
    lines = re.findall(r"(\w+) (\d+)", (project / "log").read_text())
    events = {}
    for event, process in lines:
        events.setdefault(process, []).append(event)
    return events


def test_every_test_runs_once_and_fixtures_live_as_long_as_ever(project):
    code, output = run(project, "-v")
    assert code == 0 and "12 passed" in output
    for number in range(6):
        for name in ("first", "second"):
            assert output.count(f"test_{number}.py::test_{name} PASSED") == 1
    assert list(log(project).values()) == [["start", "end"]] * 2


@pytest.mark.parametrize("number", [0, 1])  # one process begins with each
def test_a_failure_is_shown_whoever_met_it(project, number):
    add_test(project, number, "print('before it failed'); assert 1 == 2")
    code, output = run(project)
    assert code == 1 and "1 failed, 12 passed" in output
    assert "assert 1 == 2" in output and "before it failed" in output
    code, output = run(project, "-x")
    assert code == 1 and "stopping after 1 failures" in output


def test_a_process_that_dies_fails_the_tests(project):
    (project / "conftest.py").write_text(CONFTEST + DEATH)
    for number in range(6):
        add_test(project, number, "import conftest; assert conftest.die()")
    code, output = run(project)
    assert code == 1
    assert re.search(r"a worker ended with -9 in or after test_\d.py::test_third", output)


def test_ctrl_c_ends_both_and_their_fixtures(project):
    for number in range(6):
        add_test(project, number, "time.sleep(60)")
    process = start(project)
    while not (project / "log").exists() or len(log(project)) < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=50)
    assert process.returncode == 2 and "KeyboardInterrupt" in output
    assert list(log(project).values()) == [["start", "end"]] * 2


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
def test_this_suite_runs_in_two_processes():
    """What its conftest imports must not leave a thread behind."""
    environment = {name: os.environ[name] for name in os.environ if "NUM_THREADS" not in name}
    tests = Path(__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "lesson/test_laws.py", "lesson/test_stats.py"]
    outcome = subprocess.run(command, cwd=tests, env=environment, capture_output=True, text=True)
    assert "tests ran in 2 processes" in outcome.stdout
