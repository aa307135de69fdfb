"""A record on disk, the first stage of `interpret.py neurons`.

    record.json          schema, seed, checkpoint, corpus, counts by part, sites
    record-shared.npz
        fit part: counts (V,) of tokens, the frequent bigrams pairs (P, 2), pair_counts (P,)
        each part: uniform_<part> (W, 65), the W = 128 (fit) or 256 (score) windows drawn uniformly,
                   and their documents, uniform_<part>_doc (W,)
    record-<site>.npz
        all tokens: mean, var, skew, kurtosis, density, max (h,); hist (h, 50), hist_edges (51,)
        fit part: token_sum (V, h), pair_sum (P, h)
        each part: uniform_<part>_acts (W, 64, h); top_<part>_tokens (h, 36, 65),
                   top_<part>_acts (h, 36, 64), top_<part>_at and top_<part>_doc (h, 36)
        cut record: limits (h,), below which activations were set to 0 (cut.py)

Activations are halves with an exponent for each neuron (npz.py). A window has 64 tokens; the first
of its 65 ids is the token before it, -1 where a chunk begins. Each .npz carries the stamp of the
header it belongs to, so that files of two runs never mix.
"""

import hashlib
import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from crate_mini import UserError
from crate_mini.console import results
from crate_mini.console.results import atomic_write
from crate_mini.neurons import npz

SCHEMA = 2  # 1: documents were cut, and dealt to the parts without regard to their lengths
AGAIN = "record again with --from record"
ENTRIES = {"seed", "checkpoint", "corpus", "tokens", "dedup", "sites", "stamp"}  # of record.json


def write(out, header, arrays):
    """Write a record to the folder `out`, all files or none: a failure leaves an earlier one alone.

    arrays: {"shared" or a site: {name: array}}. Raises UserError if the folder cannot be made or
    a file cannot be written.
    """
    content = json.dumps({**header, "seconds": 0})
    stamp = hashlib.sha256(content.encode()).hexdigest()
    header = {**header, "stamp": stamp}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot make {out}: {error.strerror}; use another --out.") from None
    with ExitStack() as stack:  # the files appear in reverse order: the header last
        file = stack.enter_context(atomic_write(out / "record.json"))
        file.write(json.dumps(results.sealed(header), indent=1).encode() + b"\n")
        for name, content in arrays.items():
            file = stack.enter_context(atomic_write(out / f"record-{name}.npz"))
            npz.write(file, {"stamp": np.array(stamp), **content})


def load(out):
    """The Record in the folder `out`. Raises UserError if there is none, or one it cannot read."""
    path = Path(out, "record.json")
    if not path.exists():
        raise UserError(f"{out} holds no record; make one with `python interpret.py neurons CKPT`.")
    writes = "what `python interpret.py neurons CKPT --from record` writes"
    header = results.read_json(path, expected=writes)
    if header.get("schema") != SCHEMA:
        raise UserError(f"{path} has schema {header.get('schema')!r}, expected {SCHEMA}; {AGAIN}.")
    if not ENTRIES <= set(header):
        raise UserError(f"{path} is damaged or no record; {AGAIN}.")
    return Record(out, header)


class Record:
    """A record on disk; its arrays are read when first used. header: the content of record.json."""

    def __init__(self, out, header):
        self.out, self.header = Path(out), header
        self.sites = [site["name"] for site in header["sites"]]
        self._files = {}

    @property
    def shared(self):
        """The arrays that all sites share."""
        return self._arrays("shared")

    def site(self, name):
        """The arrays of one site. Raises UserError if it was not recorded."""
        if name not in self.sites:
            raise UserError(
                f"{self.out} has no record of {name!r}, only of {', '.join(self.sites)}; run "
                "`python interpret.py neurons CKPT --from record`."
            )
        return self._arrays(name)

    def _arrays(self, name):
        if name not in self._files:
            path = self.out / f"record-{name}.npz"
            self._files[name] = LazyArrays(path, self.header["stamp"])
        return self._files[name]


class LazyArrays(dict):
    """The arrays of an .npz, each read when first asked for; `forget` drops those in memory."""

    def __init__(self, path, stamp):
        self.path = path
        if str(self["stamp"]) != stamp:
            raise UserError(f"{path} is from another run than record.json next to it; {AGAIN}.")

    def __missing__(self, name):
        self[name] = npz.arrays(self.path, AGAIN, [name])[name]
        return self[name]

    forget = dict.clear
