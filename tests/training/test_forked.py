"""Children of the warm server behave as new Python processes do."""

import os
import signal
import subprocess

import pytest
from forked import Child, run_script, start_script

BOTH = pytest.mark.parametrize("fresh", [False, True])
CODE = """
import atexit, os, sys
atexit.register(print, "bye")
print(os.getcwd(), sys.argv, os.environ["A"], sys.stdin.read())
print("error", file=sys.stderr)
"""


@BOTH
def test_a_child_has_its_own_arguments_folder_environment_and_streams(tmp_path, fresh):
    env = {**os.environ, "A": "5"}
    done = run_script(["-c", CODE, "x y"], tmp_path, env, input="typed", fresh=fresh)
    assert done.stdout == f"{tmp_path} ['-c', 'x y'] 5 typed\nbye\n"
    assert (done.returncode, done.stderr) == (0, "error\n")
    assert not run_script(["-c", "print(input())"], fresh=fresh).stdout


@BOTH
@pytest.mark.parametrize(
    "code, returncode, error",
    [
        ("raise SystemExit", 0, ""),
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('a sentence')", 1, "a sentence\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("import os; os._exit(9)", 9, ""),
        ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt\n"),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
    ],
)
def test_a_child_ends_as_python_ends(code, returncode, error, fresh):
    done = run_script(
        ["-c", f"print('begun')\nimport sys; sys.stdout.flush()\n{code}"], fresh=fresh
    )
    assert done.stdout == "begun\n"
    assert done.returncode == returncode and done.stderr.endswith(error)


@BOTH
def test_signals_reach_a_child(fresh):
    code = "print('ready', flush=True)\nimport time; time.sleep(60)"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        process = start_script(["-c", code], fresh=fresh)
        assert process.stdout.readline() == "ready\n" and process.poll() is None
        os.kill(process.pid, 0)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == -number


@BOTH
def test_a_child_that_takes_too_long_is_killed(fresh):
    with pytest.raises(subprocess.TimeoutExpired):
        run_script(["-c", "import time; time.sleep(60)"], timeout=0.5, fresh=fresh)


def test_large_outputs_on_both_streams_do_not_block():
    code = "import sys; n = 300_000; print('o' * n); print('e' * n, file=sys.stderr)"
    done = run_script(["-c", code], timeout=60)
    assert len(done.stdout) == len(done.stderr) == 300_001


def test_modules_and_scripts_run_as_main(tmp_path):
    assert run_script(["-m", "json.tool", "--compact"], input="[ 1 ]").stdout == "[1]\n"
    (tmp_path / "neighbour.py").write_text("name = 'a neighbour'")
    (tmp_path / "hello.py").write_text(
        "import sys, neighbour\nif __name__ == '__main__':\n    print(neighbour.name, sys.argv[1:])"
    )
    assert run_script(["hello.py", "x"], cwd=tmp_path).stdout == "a neighbour ['x']\n"


def test_children_do_not_share_what_they_change():
    code = "import os, torch; print(hasattr(torch, 'mark'), os.getcwd()); torch.mark = 1"
    outputs = {run_script(["-c", code]).stdout for _ in range(2)}
    assert outputs == {f"False {os.getcwd()}\n"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_variable_that_python_reads_at_its_start_gets_a_new_process():
    code = "print('ready')"
    plain = start_script(["-c", code], env={**os.environ, "A": "1"})
    special = start_script(["-c", code], env={**os.environ, "PYTHONHASHSEED": "7"})
    assert isinstance(plain, Child) and isinstance(special, subprocess.Popen)
    assert plain.communicate() == special.communicate() == ("ready\n", "")
