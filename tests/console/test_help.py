"""`--help` of every command is at hand at once: it loads nothing that computes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from forked import run_script

from crate_mini.console import stand_ins

SCRIPT = Path(__file__).with_name("help_texts.py")


def test_help_loads_no_torch_and_is_the_same_text():
    """Nor numpy, nor matplotlib: the script fails if they are loaded."""
    quick = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert quick.returncode == 0, quick.stderr
    loaded = run_script([SCRIPT, "loaded"])
    assert loaded.returncode == 0, loaded.stderr
    texts, expected = json.loads(quick.stdout), json.loads(loaded.stdout)
    assert texts == expected and len(texts) > 30
    for command, text in texts.items():
        assert text.startswith(f"usage: python {command} [-h]"), command


def test_a_wrong_flag_next_to_help_gets_its_sentence():
    """Whichever comes first is answered; neither runs the command."""
    words = [sys.executable, "-c", "import steer; steer.terminal.run(steer.main)"]
    done = subprocess.run(
        [*words, "measure", "--tokens", "few", "--help"], cwd=SCRIPT.parents[2], capture_output=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: argument --tokens: invalid int value: 'few'")


@pytest.mark.parametrize(
    "line, asks",
    [("CKPT --help", True), ("-h", True), ("text -- -h", False), ("--prompt=-h", False)],
)
def test_help_is_asked_for_by_a_flag(line, asks):
    assert stand_ins.asks_for_help(line.split()) == asks


def test_nothing_is_replaced_once_torch_is_loaded():
    before = list(sys.meta_path)
    stand_ins.install()
    assert sys.meta_path == before
