"""Builds of the extension outside the checkout, for tests that need another compiler, flags or text."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
needs_compiler = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "c++")), reason="no C++ compiler"
)
needs_nvcc = pytest.mark.skipif(
    not (NVCC and shutil.which("gcc")), reason="no nvcc, or no gcc for it"
)


def copy_package(folder):
    """What setup.py needs, without csrc/: enough of the package to be built and described."""
    inner = [str(path.relative_to(ROOT)) for path in ROOT.glob("crate_mini/**/__init__.py")]
    for name in ("setup.py", "pyproject.toml", "LICENSE", "crate_mini/_stamp.py", *inner):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "README.md").write_text("a copy, to build\n")
    return folder


def build(folder, **environment):
    """Run setup.py in a copy: (module or None, what it printed). No CUDA unless CRATE_CUDA_ARCHS asks."""
    for old in (folder / "crate_mini").glob("_C*"):
        old.unlink()
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "CRATE_CUDA_ARCHS": "none", **environment},
    )
    assert done.returncode == 0, done.stdout
    return next((folder / "crate_mini").glob("_C*"), None), done.stdout
