"""Run steer.py in the process of the tests; the text and checkpoint that it runs on."""

import contextlib
import functools
import io
import sys
from pathlib import Path
from unittest import mock

import pytest
from tiny_checkpoints import save_checkpoint, write_text

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import steer  # noqa: E402
from crate_mini.console import terminal


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRATE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def ckpt(cache, text, tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("run") / "best", text)


def run_steer(*words, ckpt):
    """The output of `python steer.py WORDS`, with the checkpoint inserted among the words."""
    command = words[:1] if words[0] in steer.COMMANDS else ()
    argv = ["steer.py", *command, str(ckpt), *words[len(command) :]]
    output = io.StringIO()
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(output):
        steer.main()
    return output.getvalue()


def steer_error(*words, ckpt):
    """The one sentence that steer.py prints before it exits with code 2."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as end:
        terminal.run(functools.partial(run_steer, *words, ckpt=ckpt))
    message = errors.getvalue()
    assert end.value.code == 2, message
    assert message.startswith("error: ") and message.count("\n") == 1, message
    return message
