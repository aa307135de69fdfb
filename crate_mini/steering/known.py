"""Labels and maxima of a checkpoint's neurons, recorded or observed."""

import torch

from crate_mini import UserError
from crate_mini.console import results
from crate_mini.intervene import Intervention
from crate_mini.layers.measure import must_be_finite
from crate_mini.neurons.labels import label_text
from crate_mini.neurons.score_files import read_rows, read_summary

HELD_OUT = 16384  # tokens to observe a maximum on, if interpret.py has not recorded it


class KnownNeurons:
    """Labels and maxima of a Lab's neurons, or of the features of its autoencoder.

    They come from the files of `interpret.py neurons`, if these describe the same checkpoint; a
    missing maximum is observed on held-out text. log: called with a note if the files describe
    another checkpoint.
    """

    def __init__(self, lab, log=print):
        self.lab = lab
        self.unused = ""  # why there are files that were not read
        self.rows = self._read(log)  # {(site, neuron): row of scores.jsonl}
        self._observed = {}  # layer: the largest value of each neuron

    def _read(self, log):
        """{(site, neuron): row of scores.jsonl}, {} if they do not describe this checkpoint."""
        folder = results.folder(self.lab.checkpoint)
        files = [folder / name for name in ("scores.jsonl", "record.json", "summary.json")]
        if not all(path.exists() for path in files):
            return {}
        try:
            rows = read_rows(files[0])
            record, _ = read_summary(folder, rows)
        except UserError as error:
            self.unused = str(error).rstrip(".")
        else:
            scored = record.get("checkpoint", {})
            if scored.get("sha256") == self.lab.meta.get("sha256"):
                return {(row["site"], row["neuron"]): row for row in rows}
            self.unused = f"{folder} describes another checkpoint than this one"
        log(f"note      {self.unused}; it is not used")
        return {}

    def site(self, layer):
        """A layer's name in the files of interpret.py: L2, or L2.sae-x4-k32 with an autoencoder."""
        return f"L{layer}.sae-{self.lab.sae.name}" if self.lab.sae else f"L{layer}"

    def label(self, layer, neuron):
        """The label of a neuron in one line; '' if it has none."""
        row = self.rows.get((self.site(layer), neuron), {})
        return label_text(row["label"], self.lab.token) if row.get("label") else ""

    def maximum(self, layer, neuron):
        """(the largest value of a neuron, a description of the text it was observed on)."""
        row = self.rows.get((self.site(layer), neuron), {})
        if row.get("max") and self.lab.data is None:
            return row["max"], "interpret.py's record"
        Intervention(layer, neuron, sae=self.lab.sae).check(self.lab.model.config)
        value = self.observed(layer)[neuron].item()
        tokens = min(HELD_OUT, self.lab.held_out().n_tokens["val"] - 1)
        return value, f"{tokens:,} held-out tokens"

    def observed(self, layer):
        """Largest value (n,) of each neuron or feature of a layer on held-out text."""
        if layer not in self._observed:
            window = min(256, self.lab.model.config.block_size)
            blocks = self.lab.held_out().blocks("val", 8, window, HELD_OUT)
            batches = (ids for ids, _ in blocks)
            self._observed[layer] = maxima(self.lab.model, layer, batches, self.lab.sae)
        return self._observed[layer]


@torch.no_grad()
def maxima(model, layer, batches, sae=None):
    """Largest value (n,) of each neuron of a layer, or feature of `sae`, on batches of ids."""
    largest = 0.0
    for ids in batches:
        codes = model.trunk(ids.to(model.tokens.weight.device))[1][layer].flatten(0, 1)
        must_be_finite(codes, f"a code of layer {layer}")
        values = codes if sae is None else sae.encode(codes.float())
        largest = values.max(0).values.clamp_min(largest)
    return largest
