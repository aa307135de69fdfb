"""A record on disk: record.json and .npz files; activations.py lists what is in them.

Every .npz carries the stamp of the header that it belongs to, so that files of two runs are never mixed.
"""

import hashlib
import json
import zipfile
import zlib
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from crate_mini import UserError, atomic_write, cli

SCHEMA = 1


def write(out, header, arrays):
    """All files of a record at once: if one cannot be written, those of an earlier record stay."""
    stamp = hashlib.sha256(json.dumps({**header, "seconds": 0}).encode()).hexdigest()
    header = {**header, "stamp": stamp}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot make {out}: {error.strerror}; use another --out.") from None
    with ExitStack() as stack:  # files appear in reverse: the header last
        file = stack.enter_context(atomic_write(out / "record.json"))
        file.write(json.dumps(header, indent=1).encode() + b"\n")
        for name, content in arrays.items():
            file = stack.enter_context(atomic_write(out / f"record-{name}.npz"))
            np.savez(file, stamp=np.array(stamp), **content)


class Record:
    """A record on disk. header: record.json; shared, site(name): arrays by name, read when first used."""

    def __init__(self, out, header):
        self.out, self.header = Path(out), header
        self.sites = [site["name"] for site in header["sites"]]
        self._open = {}

    @property
    def shared(self):
        """Arrays that all sites share: counts, pairs, pair_counts, uniform_<part>, uniform_<part>_doc."""
        return self._arrays("shared")

    def site(self, name):
        """Arrays of one site. Raises UserError if it was not recorded."""
        if name not in self.sites:
            raise UserError(
                f"{self.out} has no record of {name!r}, only of {', '.join(self.sites)}; run "
                "`python interpret.py neurons CKPT --from record`."
            )
        return self._arrays(name)

    def _arrays(self, name):
        if name not in self._open:
            self._open[name] = _Arrays(self.out / f"record-{name}.npz", self.header["stamp"])
        return self._open[name]


class _Arrays(dict):
    """The arrays of an .npz, each read when first asked for. `forget` drops those read so far."""

    def __init__(self, path, stamp):
        self.path = path
        if str(self["stamp"]) != stamp:
            raise UserError(
                f"{path} is of another run than record.json beside it; record again with --from "
                "record."
            )

    def __missing__(self, name):
        try:
            with np.load(self.path) as file:
                self[name] = file[name]
        except OSError as error:
            raise UserError(
                f"Cannot read {self.path}: {error.strerror}; record again with --from record."
            ) from None
        except (ValueError, zipfile.BadZipFile, zlib.error):
            raise UserError(f"{self.path} is damaged; record again with --from record.") from None
        return self[name]

    forget = dict.clear


def load(out):
    """The Record in folder `out`. Raises UserError when there is none, or an unreadable one."""
    path = Path(out, "record.json")
    if not path.exists():
        raise UserError(f"{out} holds no record; make one with `python interpret.py neurons CKPT`.")
    header = cli.read_json(path)
    if header.get("schema") != SCHEMA:
        raise UserError(
            f"{path} has schema {header.get('schema')!r}, expected {SCHEMA}; record again with "
            "--from record."
        )
    return Record(out, header)
