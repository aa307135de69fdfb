"""A hash of the sources of the compiled module: setup.py compiles it in, ops.py compares it."""

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = (".h", ".cpp", ".cuh", ".cu")


def source_stamp(root=ROOT):
    """sha256 (hex) of the names and contents of csrc/ and setup.py; None without them (a wheel)."""
    csrc, setup = Path(root, "csrc"), Path(root, "setup.py")
    files = sorted(path for path in csrc.glob("*") if path.suffix in SUFFIXES)
    if not files or not setup.exists():
        return None
    digest = hashlib.sha256()
    for path in [*files, setup]:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()
