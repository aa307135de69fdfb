"""What nvcc made of each kernel: tensor-core, 16-byte and spilling instructions, counted in the machine code.

HMMA, HGMMA: tensor cores (Ampere's, Hopper's). LDGSTS, LDG.E.128, STG.E.128: 16 bytes a thread. LDL, STL: a
register array that lies in memory, which no kernel should have. `python -m crate_mini.studies.gpu code` keeps
the counts in results/; it needs no GPU.
"""

import re
import shutil
import subprocess

from crate_mini import UserError

INSTRUCTIONS = (
    r"\b(?:HGMMA|HMMA|LDSM|UTMALDG|LDGSTS[.\w]*|(?:LD|ST)[GL](?:\.E)?(?:\.(?:64|128|U16))?)\b"
)


def counts(path, archs):
    """A dict for each kernel of a module and architecture ("90a"): name, arch, registers of a thread, bytes
    of stack, static shared and local memory, its instructions' counts.

    Raises UserError without cuobjdump and nvdisasm.
    """
    if not shutil.which("cuobjdump") or not shutil.which("nvdisasm"):
        raise UserError(
            "cuobjdump and nvdisasm are not there; they come with the CUDA toolkit, or as the "
            "packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm."
        )
    for arch in archs:
        used = resources(dump("-res-usage", arch, path))
        for name, found in instructions(dump("-sass", arch, path)):
            yield {"name": name, "arch": f"sm_{arch}", **used.get(name, {}), **found}


def dump(what, arch, path):
    """What cuobjdump says of one architecture."""
    return subprocess.run(
        ["cuobjdump", what, "-arch", f"sm_{arch}", path], capture_output=True, text=True, check=True
    ).stdout


def resources(text):
    """{kernel: {"registers", "stack", "shared", "local"}} of what `cuobjdump -res-usage` says."""
    rows = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    return {
        name: dict(zip(("registers", "stack", "shared", "local"), map(int, row)))
        for name, *row in rows
    }


def instructions(text):
    """[(kernel, {instruction: count})] of what `cuobjdump -sass` says."""
    found = []
    for line in text.splitlines():
        if "Function : " in line:
            found.append((line.split(" : ")[1].strip(), {}))
        elif found:
            for name in re.findall(INSTRUCTIONS, line):
                found[-1][1][name] = found[-1][1].get(name, 0) + 1
    return found
