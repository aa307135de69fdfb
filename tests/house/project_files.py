"""The files of the project, in a checkout or in an archive without git."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOP_LEVEL = {
    "setup.py",
    "crate_mini",
    "csrc",
    "train.py",
    "interpret.py",
    "steer.py",
    "tests",
    "README.md",
    "LICENSE",
    "pyproject.toml",
    ".gitignore",
    ".ci",
    "results",
}


def tracked():
    """Files under version control; in an archive without git, all files of the project."""
    listing = None
    if shutil.which("git"):
        command = ["git", "ls-files"]
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing and listing.returncode == 0:
        return [ROOT / name for name in listing.stdout.splitlines() if (ROOT / name).exists()]
    files = []
    for top in sorted(TOP_LEVEL):
        files += [path for path in [ROOT / top, *(ROOT / top).rglob("*")] if path.is_file()]
    return [p for p in files if "__pycache__" not in p.parts and not p.name.startswith("_C.")]


FILES = tracked()
PYTHON = [p for p in FILES if p.suffix == ".py"]
C = [p for p in FILES if p.suffix in (".h", ".cpp", ".cuh", ".cu")]
PACKAGE = [p for p in PYTHON if p.is_relative_to(ROOT / "crate_mini")]


def name(path):
    """A path relative to the project, as text: names a test's case."""
    return str(path.relative_to(ROOT))
