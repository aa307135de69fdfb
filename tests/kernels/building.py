"""Builds of the compiled module outside the checkout, with other compilers, flags or sources."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CXX = os.environ.get("CXX", "c++")
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
needs_compiler = pytest.mark.skipif(not shutil.which(CXX), reason="no C++ compiler")
needs_gcc = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
needs_nvcc = pytest.mark.skipif(not (NVCC and shutil.which("gcc")), reason="no nvcc, or no gcc")


def gpu_archs():
    """The architectures that setup.py builds for by default, of those that this nvcc knows."""
    text = (ROOT / "setup.py").read_text()
    archs = re.search('^ARCHS = "(.*)"$', text, re.M)[1].split()
    known = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True).stdout
    return [arch for arch in archs if f"sm_{arch.rstrip('a')}\n" in known]


def copy_package(folder):
    """What setup.py needs, without csrc/: enough of the package to build and import the module."""
    packages = [str(path.relative_to(ROOT)) for path in ROOT.glob("crate_mini/**/__init__.py")]
    for name in ("setup.py", "pyproject.toml", "LICENSE", "crate_mini/_stamp.py", *packages):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "README.md").write_text("a copy, to build\n")
    return folder


def build(folder, **environment):
    """Run setup.py in a copy: (module or None, output). CUDA only if CRATE_CUDA_ARCHS asks."""
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


def sanitizer_runtimes(compiler):
    """Paths of the AddressSanitizer and UBSan libraries, for LD_PRELOAD; [] if it has none."""
    paths = []
    for name in ("libasan.so", "libubsan.so"):
        command = [compiler, f"-print-file-name={name}"]
        done = subprocess.run(command, capture_output=True, text=True)
        paths.append(done.stdout.strip())
    exist = all(os.path.isabs(path) and Path(path).exists() for path in paths)
    return paths if exist else []
