"""One hash over the sources of the compiled module: setup.py writes it in, ops.py compares it at import."""

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def source_stamp(root=ROOT):
    """sha256 (hex) of csrc/ and setup.py, by name and content; None where they are absent (a wheel)."""
    files = sorted(
        p for p in Path(root, "csrc").glob("*") if p.suffix in (".h", ".cpp", ".cuh", ".cu")
    )
    if not files or not Path(root, "setup.py").exists():
        return None
    digest = hashlib.sha256()
    for path in [*files, Path(root, "setup.py")]:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()
