"""A place that cannot be written to is refused before the work that would fill it."""

import os
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import save_checkpoint, write_text

from crate_mini import UserError
from crate_mini.console import results, terminal
from crate_mini.sae import command as sae_command
from crate_mini.studies import bench, gpu
from crate_mini.studies.runner import Runner
from crate_mini.training.device import machine

LONG = "x" * 300  # longer than a name may be
PROC = Path("/proc")  # it is there, and nobody can make a file in it
needs_proc = pytest.mark.skipif(not PROC.is_dir(), reason="no /proc")


@pytest.fixture(params=["a long name", "in a long folder", "below a file", "in /proc", "a folder"])
def bad_file(request, tmp_path):
    """A path that no file can be written to."""
    (tmp_path / "file").write_text("kept")
    paths = {
        "a long name": tmp_path / LONG,
        "in a long folder": tmp_path / LONG / "a.json",
        "below a file": tmp_path / "file" / "a.json",
        "in /proc": PROC / "a.json",
        "a folder": tmp_path,
    }
    if request.param == "in /proc" and not PROC.is_dir():
        pytest.skip("no /proc")
    yield paths[request.param]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_file_that_cannot_be_written_is_refused(bad_file):
    with pytest.raises(UserError, match="(Cannot write|Nothing can be written)") as refusal:
        results.ready_file(bad_file)
    assert "\n" not in str(refusal.value)


def test_a_file_that_is_there_stays_as_it_is(tmp_path):
    path = tmp_path / "new" / "a.json"
    assert results.ready_file(path) == path and path.parent.is_dir()
    path.write_text("before")
    results.ready_file(path)
    assert path.read_text() == "before" and os.listdir(path.parent) == ["a.json"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_devices_and_pipes_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    results.ready_file(tmp_path / "pipe")  # to open it would wait for a reader
    results.ready_file(os.devnull)
    assert gpu.earlier_stages(tmp_path / "pipe", {}) == {}
    with pytest.raises(UserError, match="pipe cannot be read as JSON: it is a device or a pipe"):
        results.read_json(tmp_path / "pipe")


def no_work(*arguments, **more):
    pytest.fail("the work has begun")


def test_bench_measures_nothing(bad_file, monkeypatch):
    monkeypatch.setattr(bench, "cases", no_work)
    words = ["--op", "decode", "--json", str(bad_file)]
    with pytest.raises(UserError):
        terminal.run_command("bench", bench.COMMAND, words)


def test_gpu_measures_nothing(bad_file, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "machine", lambda device: machine(torch.device("cpu")))
    monkeypatch.setattr(gpu, "run_stages", no_work)
    monkeypatch.setattr(gpu, "measure", no_work)
    monkeypatch.setattr(gpu, "choose_device", lambda name: torch.device("cpu"))
    for words in ([], ["--only", "floors"]):
        with pytest.raises(UserError):
            terminal.run_command("gpu", gpu.COMMAND, [*words, "--json", str(bad_file)])


def test_a_study_runs_no_part(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    (tmp_path / "results").write_text("a file in the place of the folder")
    with pytest.raises(UserError, match="results"):
        Runner("study", 1)


@needs_proc
def test_autoencoders_are_not_trained(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "best", write_text(tmp_path / "text.txt"))
    monkeypatch.setattr(sae_command.train, "fit", no_work)
    words = [str(tmp_path / "best"), "--tokens", "64", "--out", str(PROC)]
    with pytest.raises(UserError, match="Nothing can be written to /proc"):
        terminal.run_command("sae", sae_command.COMMAND, words)
