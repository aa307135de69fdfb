"""A learner's file runs in a process of its own; whatever it does, one sentence comes back."""

import time

import pytest

from crate_mini.course import exercise, grading

RATES = exercise.find(1)


def grade(folder, text, seconds=60, number=1):
    path = folder / "mine.py"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return grading.grade(number, path, seconds)


HOSTILE = [  # none of these imports torch, which would take seconds
    ("exit()", "it calls exit() (line 1: `exit()`) before the check is done; take that out."),
    ("import sys\nsys.exit(0)", "it calls exit() (line 2: `sys.exit(0)`) before the check is done"),
    (
        "import os\nos._exit(0)",
        "it ended the process (exit code 0) before the check; take out exit",
    ),
    ("while True:\n    print('x' * 999)", "it prints more than 1,048,576 bytes; print less."),
    ("def f(:\n    pass", "line 1: `def f(:` is not valid Python: invalid syntax."),
    ("x = 1 / 0", "line 1: `x = 1 / 0` raises ZeroDivisionError: division by zero."),
    ("x = input()", "line 1: `x = input()` raises EOFError: EOF when reading a line."),
    (b"x = '\xff'", "is not valid Python: "),
    (b"x = 1\0", "null bytes"),
    ("raise KeyboardInterrupt", "line 1: `raise KeyboardInterrupt` raises KeyboardInterrupt."),
    ("def f():\n    f()\nf()", "raises RecursionError: maximum recursion depth exceeded"),
    (
        "import os\nos.abort()",
        "it crashed (signal 6); an index beyond the end of an array does that",
    ),
]


@pytest.mark.parametrize("text, sentence", HOSTILE)
def test_a_hostile_file_gets_a_sentence(text, sentence, tmp_path):
    verdict = grade(tmp_path, text)
    assert verdict.outcome == "fail" and verdict.exit_code == 1
    assert sentence in verdict.sentence
    assert "\n" not in verdict.sentence and "Traceback" not in verdict.printed


def test_an_endless_loop_is_stopped_and_named(tmp_path):
    began = time.monotonic()
    verdict = grade(tmp_path, "x = 0\nwhile True:\n    x += 1\n", seconds=1)
    assert time.monotonic() - began < 1 + grading.GRACE
    assert verdict.sentence.startswith("it is not done after 1 seconds (line ")
    assert verdict.sentence.endswith("is there an endless loop?")


def test_a_loop_that_refuses_to_be_stopped_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(grading, "GRACE", 0.5)
    text = "import faulthandler\nfaulthandler.cancel_dump_traceback_later()\nwhile True: pass\n"
    verdict = grade(tmp_path, text, seconds=1)
    assert verdict.sentence == "it is not done after 1 seconds; is there an endless loop?"


@pytest.mark.skipif(not hasattr(grading.os, "killpg"), reason="no process groups")
def test_processes_that_a_file_leaves_behind_are_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(grading, "GRACE", 2)
    text = (
        "import subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "exit()\n"
    )
    began = time.monotonic()
    assert "exit()" in grade(tmp_path, text, seconds=1).sentence
    assert time.monotonic() - began < 30


def test_what_a_file_prints_is_kept(tmp_path):
    verdict = grade(tmp_path, "print('shape', (3, 4))\nraise ValueError\n")
    assert verdict.printed == "shape (3, 4)\n"
    assert verdict.sentence == "line 2: `raise ValueError` raises ValueError."


def test_a_right_file_passes_in_its_own_process(tmp_path):
    verdict = grade(tmp_path, RATES.solution())
    assert (verdict.outcome, verdict.exit_code, verdict.printed) == ("pass", 0, "")


def in_this_process(folder, text):
    path = folder / "mine.py"
    path.write_text(text)
    return grading.examine(1, path)


@pytest.mark.parametrize(
    "body, sentence",
    [
        ("return 'a'", "coding_rate returns a str; expected a number (for Z ("),
        ("return [1, 2]", "coding_rate returns a list; expected a number (for Z ("),
        ("return {}", "coding_rate returns a dict; expected a number (for Z ("),
        ("pass", "coding_rate returns None; is a `return` missing? (for Z ("),
        ("return torch.full_like(Z, 1.0)", "coding_rate returns shape (7, 4), expected () (for Z"),
        ("return float('nan')", "coding_rate returns nan where the right answer is finite (for Z"),
        ("return Z.sum() * eps", "raises NameError: name 'eps' is not defined."),
        ("raise SystemExit", "it calls exit() (line 4: `raise SystemExit`) before the check is"),
        ("return coding_rate(Z, eps2)", "raises RecursionError: maximum recursion depth exceed"),
        ("Z.zero_()\n    return Z.sum()", "coding_rate changes its argument Z; work on a copy."),
        ("return torch.eye(3) @ Z[:, :2]", "raises RuntimeError: mat1 and mat2 shapes cannot be"),
    ],
)
def test_a_wrong_answer_gets_a_sentence(body, sentence, tmp_path):
    text = f"import torch\n\ndef coding_rate(Z, eps2):\n    {body}\n"
    verdict = in_this_process(tmp_path, text)
    assert verdict.outcome == "fail"
    assert sentence in verdict.sentence
    assert "\n" not in verdict.sentence
