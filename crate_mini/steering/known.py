"""Labels and maxima of a checkpoint's neurons, recorded or observed."""

from contextlib import contextmanager

import torch

from crate_mini import UserError
from crate_mini.console import results
from crate_mini.intervene import Intervention, hook_codes
from crate_mini.layers.measure import must_be_finite
from crate_mini.neurons.labels import label_text
from crate_mini.neurons.score_files import complete, read_rows, read_summary
from crate_mini.steering import choose
from crate_mini.training.device import widest_float

HELD_OUT = 16384  # tokens to observe a maximum on, if interpret.py has not recorded it


class KnownNeurons:
    """Labels and maxima of a Lab's neurons, or of the features of its autoencoder.

    They come from the files of `interpret.py neurons`, if these describe the same checkpoint; a
    missing maximum is observed on held-out text. The Lab's log is called with a note if the files
    describe another checkpoint.
    """

    def __init__(self, lab):
        self.lab = lab
        self.unused = ""  # why there are files that were not read
        self.rows = self._read()  # {(site, neuron): row of scores.jsonl}
        self._observed = {}  # (layer, subspace): the largest values (n,), the means (n,)

    def _read(self):
        """{(site, neuron): row of scores.jsonl}, {} if they do not describe this checkpoint."""
        folder = results.folder(self.lab.checkpoint)
        files = [folder / name for name in ("scores.jsonl", "record.json", "summary.json")]
        if not all(path.exists() for path in files):
            return {}
        try:
            rows = read_rows(files[0])
            record, _ = read_summary(folder, rows)
            with complete(folder):
                sha256 = record.get("checkpoint", {}).get("sha256")
        except UserError as error:
            self.unused = str(error).rstrip(".")
        else:
            if sha256 == self.lab.meta.get("sha256"):
                return {(row["site"], row["neuron"]): row for row in rows}
            self.unused = f"{folder} describes another checkpoint than this one"
        self.lab.log(f"note      {self.unused}; it is not used")
        return {}

    def site(self, layer):
        """A layer's name in the files of interpret.py: L2, or L2.sae-x4-k32 with an autoencoder."""
        return f"L{layer}.sae-{self.lab.sae.name}" if self.lab.sae else f"L{layer}"

    def label(self, layer, neuron):
        """The label of a neuron in one line; '' if it has none."""
        row = self.rows.get((self.site(layer), neuron), {})
        if not row.get("label"):
            return ""
        with complete(results.folder(self.lab.checkpoint)):
            return label_text(row["label"], self.lab.token)

    def intervention(self, layer, neuron, value="2x", op="set", **options):
        """An Intervention; value: as for steer.py's --value, a plain number as a multiple.

        Raises UserError if the model cannot take it.
        """
        options = {"sae": self.lab.sae, **options}
        subspace = options.get("subspace", False)
        number, _ = choose.amount(self.lab, layer, neuron, value, op, subspace)
        change = Intervention(layer, neuron, op, number, **options)
        change.check(self.lab.model.config)
        return change

    def interventions(self, neurons, options):
        """The list of Interventions that the arguments of Lab.steer name."""
        if all(isinstance(change, Intervention) for change in neurons):
            return list(neurons)
        if len(neurons) > 1:
            return [self.intervention(*neurons, **options)]
        try:
            pairs = [(layer, neuron, value) for (layer, neuron), value in neurons[0].items()]
        except (AttributeError, TypeError, ValueError):
            raise UserError(
                f"{neurons[0]!r} does not name neurons; give steer(2, 40, '4x') or "
                "steer({(2, 40): '4x'}), where 2 is the layer and 40 the neuron."
            ) from None
        return [self.intervention(*pair, **options) for pair in pairs]

    def maximum(self, layer, neuron, subspace=False):
        """(the largest value of a neuron, a description of the text it was observed on).

        subspace: of a coordinate of u instead.
        """
        row = {} if subspace else self.rows.get((self.site(layer), neuron), {})
        if row.get("max") and self.lab.data is None:
            return row["max"], "interpret.py's record"
        sae = None if subspace else self.lab.sae
        Intervention(layer, neuron, sae=sae, subspace=subspace).check(self.lab.model.config)
        value = self.observed(layer, subspace)[neuron].item()
        tokens = min(HELD_OUT, self.lab.held_out().n_tokens["val"] - 1)
        return value, f"{tokens:,} held-out tokens"

    def observed(self, layer, subspace=False):
        """Largest value (n,) of each neuron, feature, or coordinate of u on held-out text."""
        return self._statistics(layer, subspace)[0]

    def means(self, layer):
        """Mean value (n,) of each neuron or feature of a layer on held-out text."""
        return self._statistics(layer)[1]

    def _statistics(self, layer, subspace=False):
        if (layer, subspace) not in self._observed:
            model = self.lab.model
            window = min(256, model.config.block_size)
            blocks = self.lab.held_out().blocks("val", 8, window, HELD_OUT)
            batches = (ids for ids, _ in blocks)
            sae = None if subspace else self.lab.sae
            with unsteered(model):
                observed = statistics(model, layer, batches, sae, subspace)
            self._observed[layer, subspace] = observed
        return self._observed[layer, subspace]


def maxima(model, layer, batches, sae=None):
    """Largest value (n,) of each neuron of a layer, or feature of `sae`, on batches of ids."""
    return statistics(model, layer, batches, sae)[0]


@torch.no_grad()
def statistics(model, layer, batches, sae=None, subspace=False):
    """(largest values (n,), means (n,)) of each neuron of a layer on batches of ids (B, T).

    sae: of its features instead; subspace: of the coordinates of u.
    """
    largest = -torch.inf if subspace else 0.0
    total = count = 0

    def observe(codes):
        nonlocal largest, total, count
        codes = codes.flatten(0, 1)
        must_be_finite(codes, f"a code of layer {layer}")
        values = codes if sae is None else sae.encode(codes.float())
        largest = values.max(0).values.clamp_min(largest)
        total = total + values.sum(0, dtype=widest_float(values.device))
        count += len(values)

    with hook_codes(model, layer, observe, subspace):
        for ids in batches:
            model.trunk(ids.to(model.tokens.weight.device))
    return largest, (total / count).to(largest.dtype)


@contextmanager
def unsteered(model):
    """In the block, no hook acts on codes or projections, as if it were outside all `steer`."""
    points = [block.sparsifier.code for block in model.blocks]
    points += [
        block.attention.subspace for block in model.blocks if hasattr(block.attention, "subspace")
    ]
    hooks = [dict(point._forward_hooks) for point in points]
    for point in points:
        point._forward_hooks.clear()
    try:
        yield
    finally:
        for point, kept in zip(points, hooks):
            point._forward_hooks.update(kept)
