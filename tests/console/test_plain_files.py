"""Links to devices, pipes and folders in the place of files that we read: a sentence, at once."""

import os
import signal

import pytest

from crate_mini import UserError
from crate_mini.concepts import survey as concepts_survey
from crate_mini.console import results
from crate_mini.data import tokenizer
from crate_mini.export.command import check_folder
from crate_mini.judges.answer_cache import read_answers
from crate_mini.neurons import score_files
from crate_mini.neurons import survey as neurons_survey
from crate_mini.training import checkpoint, foreign_files

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")


@pytest.fixture(params=["/dev/zero", "/dev/urandom", "/dev/full", "pipe", "folder"])
def special(request, tmp_path):
    """A function that puts what is no file in the place of one, and sets an alarm."""

    def put(name):
        path = tmp_path / name
        if request.param == "pipe":
            os.mkfifo(path)
        elif request.param == "folder":
            path.mkdir()
        else:
            path.symlink_to(request.param)
        return path

    def stop(*_):
        raise AssertionError("it waits, or reads without end")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield put
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


@pytest.mark.parametrize(
    "read",
    [
        results.read_json,
        score_files.read_rows,
        neurons_survey.score,
        tokenizer.load_tokenizer,
        lambda path: concepts_survey.read_choices(path, [], ""),
    ],
)
def test_a_reader_refuses_it_in_a_sentence(special, read):
    path = special("file.json")
    with pytest.raises(UserError) as caught:
        read(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_in_a_checkpoint(special, tmp_path):
    special("config.json")
    with pytest.raises(UserError, match="No checkpoint in .*; expected a folder written by"):
        checkpoint.read_meta(tmp_path)


def test_in_place_of_weights(special):
    with pytest.raises(OSError):
        checkpoint.read_tensors(special("weights.pt"), "0" * 64)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "pytorch_model.bin",
        "model.safetensors.index.json",
        "pytorch_model.bin.index.json",
        "model-00001-of-00001.safetensors",
        "pytorch_model-00001-of-00001.bin",
    ],
)
def test_in_a_folder_of_another_project(special, tmp_path, name):
    if name != "config.json":
        (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    special(name)
    with pytest.raises(UserError) as caught:
        foreign_files.read(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_may_be_missing_counts_as_missing(special, tmp_path):
    special("config.json")
    check_folder(tmp_path)  # no checkpoint of ours
    with pytest.raises(OSError):
        read_answers(special("answers.jsonl"))
