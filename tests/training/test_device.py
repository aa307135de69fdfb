"""Evidence names the commit that made it, and says when the source differs from it."""

import os
import shutil
import subprocess

import pytest

from crate_mini.training import device as machine


@pytest.mark.skipif(not shutil.which("git"), reason="no git")
def test_commit_tells_changed_sources_but_not_new_results(tmp_path, monkeypatch):
    package, results = tmp_path / "crate_mini", tmp_path / "results"
    for folder in (package, results):
        folder.mkdir()
        (folder / "a").write_text("1")
    monkeypatch.setattr(machine, "__file__", str(package / "training" / "device.py"))
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert machine.commit() == "unknown"

    def git(*words):
        me = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *me, *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    head = git("rev-parse", "HEAD")[:12]
    assert machine.commit() == head
    (results / "a").write_text("2")
    assert machine.commit() == head
    (package / "a").write_text("2")
    assert machine.commit() == head + "+"
