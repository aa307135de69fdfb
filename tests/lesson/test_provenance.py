"""Results name the commit that made them, and whether the source differs from it."""

import os
import shutil
import subprocess

import pytest

from crate_mini.console import results


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


@pytest.mark.skipif(not shutil.which("git"), reason="no git")
def test_a_repository_around_the_source_is_not_its_own(tmp_path, monkeypatch):
    """As with a source archive that is unpacked in another project, or in a hook of one."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run(["git", "-C", str(tmp_path), *author, *words], check=True)
    source = tmp_path / "crate_mini-1.0"
    source.mkdir()
    (source / ".git").mkdir()  # an empty one is none
    monkeypatch.setattr(results, "ROOT", source)
    assert results.commit() == "unknown"
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert results.commit() == "unknown"
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert len(results.commit()) >= 12
