"""Results name the commit that made them, and whether the source differs from it."""

import os
import shutil
import subprocess

import pytest

from crate_mini import results


@pytest.mark.skipif(not shutil.which("git"), reason="no git")
def test_the_commit_shows_changed_sources_but_not_new_results(tmp_path, monkeypatch):
    package, written = tmp_path / "crate_mini", tmp_path / "results"
    for folder in (package, written):
        folder.mkdir()
        (folder / "a").write_text("1")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert results.commit() == "unknown"

    def git(*words):
        author = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *author, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    head = git("rev-parse", "HEAD")[:12]
    assert results.commit() == head
    (written / "a").write_text("2")
    assert results.commit() == head
    (package / "a").write_text("2")
    assert results.commit() == head + "+"
