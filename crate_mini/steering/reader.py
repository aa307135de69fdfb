"""What a Lab answers about a text: codes, the neurons that fire on it, next tokens, loss, scores.

No method keeps gradients or prints. Inside `with lab.steer(...)` they all describe the steered
model.
"""

import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F

from crate_mini import UserError
from crate_mini.console.terminal import printable
from crate_mini.data.tokenizer import visible
from crate_mini.intervene import must_exist
from crate_mini.neurons.quick_score import quick_scores
from crate_mini.neurons.record import Site
from crate_mini.training import checkpoint
from crate_mini.training.device import widest_float

LEAST_MEAN = 1e-9  # of a neuron, in the ratio that top_neurons sorts by


class Codes(torch.Tensor):
    """Codes (L, T, h) of a text. tokens: its T tokens as printable text.

    Whatever is computed from them is a plain tensor.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl


class Firing(NamedTuple):
    """A neuron at the token of a text where it fires most."""

    layer: int
    neuron: int
    token: str
    position: int  # of the token, from 0
    value: float  # of the code
    share: float  # value / its maximum on held-out text
    ratio: float  # value / its mean on held-out text: how specific it is
    label: str  # as `interpret.py neurons` wrote it; "" without


class Reader:
    """The part of a Lab that reads text."""

    def __init__(self, lab):
        self.lab = lab
        self._corpus = None

    # ---- text and tokens -------------------------------------------------------------------------

    def held_out(self):
        """The Corpus with a "val" split that the model has not seen; opened when first needed."""
        lab = self.lab
        if self._corpus is None:
            facts = (lab.checkpoint, lab.meta, lab.tokenizer, lab.data)
            self._corpus = checkpoint.held_out(*facts, log=lab.log)
        return self._corpus

    def encode(self, text):
        """Token ids of a text of any length. Raises UserError if it is empty or no text."""
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise UserError("the prompt holds bytes that are not UTF-8 text; type it again.")
        ids = self.lab.tokenizer.encode(text)
        if not ids:
            raise UserError('the prompt is empty; give some text, like --prompt "1 2 3 4 5".')
        return ids

    def prompt(self, text):
        """Ids (1, T) of a text that fits into the model's context, on its device."""
        ids = self.encode(text)
        window = self.lab.model.config.block_size
        if len(ids) > window:
            raise UserError(
                f"the prompt has {len(ids)} tokens, the model reads {window}; shorten it."
            )
        return torch.tensor([ids], device=self.lab.model.tokens.weight.device)

    def token(self, id):
        """A token as printable text; `id 300` for an id that the tokenizer does not have."""
        if id >= self.lab.tokenizer.vocab_size:
            return f"id {id}"
        return visible(self.lab.tokenizer.token_bytes(id))

    def text(self, ids):
        """The text of a list of ids; U+FFFD stands for characters that a terminal cannot show."""
        n_ids = self.lab.tokenizer.vocab_size
        return printable(self.lab.tokenizer.decode(id for id in ids if id < n_ids))

    # ---- neurons ---------------------------------------------------------------------------------

    @torch.no_grad()
    def codes(self, text):
        """Codes (L, T, h) of a text; with an autoencoder, of every layer all the same."""
        ids = self.prompt(text)
        _, codes = self.lab.model.trunk(ids)
        codes = torch.cat(codes).as_subclass(Codes)
        codes.tokens = [self.token(id) for id in ids[0].tolist()]
        return codes

    @torch.no_grad()
    def top_neurons(self, text, k=10):
        """[Firing] of the k neurons whose peak on the text is the largest multiple of their mean.

        Means and maxima are those on held-out text; a neuron that never fired there is left out.
        """
        lab, codes = self.lab, self.codes(text)
        layers = range(len(codes)) if lab.sae is None else [lab.sae.layer]
        rows = []
        for layer in layers:
            values = codes[layer] if lab.sae is None else lab.sae.encode(codes[layer].float())
            peaks, positions = values.max(0)
            largest, mean = lab.known.observed(layer), lab.known.means(layer)
            ratios = torch.where(largest > 0, peaks / mean.clamp_min(LEAST_MEAN), 0)
            for neuron in ratios.topk(min(k, len(ratios))).indices.tolist():
                value, position = peaks[neuron].item(), positions[neuron].item()
                share = value / largest[neuron].item() if largest[neuron] > 0 else 0
                row = Firing(
                    layer,
                    neuron,
                    codes.tokens[position],
                    position,
                    value,
                    share,
                    ratios[neuron].item(),
                    lab.known.label(layer, neuron),
                )
                rows.append(row)
        rows = [row for row in rows if row.ratio > 0]
        return sorted(rows, key=lambda row: -row.ratio)[:k]

    def score(self, layer, tokens=100_000, seed=0):
        """{"ngram_r", "null_r", "density"}: float64 (h,) each, of the neurons of a layer.

        ngram_r: correlation, on held-out windows, of each neuron with its mean after the last two
        tokens, a table that other held-out documents filled; null_r: its control, with another
        neuron's table; NaN where undefined, as for a dead neuron. density: the share of tokens on
        which it fires. They are those of `interpret.py neurons` at as many tokens and the same
        seed. Takes seconds to minutes. Raises UserError for a layer that does not exist, or for
        too little text.
        """
        lab = self.lab
        must_exist("layer", layer, len(lab.model.blocks))
        site = Site(f"L{layer}", layer, lab.model.config.n_code)
        if lab.sae:
            site = Site(lab.known.site(layer), layer, lab.sae.c.numel(), lab.sae.encode)
        facts = (lab.model, lab.meta, lab.tokenizer, self.held_out())
        scores = quick_scores(*facts, [site], tokens, seed)[site.name]
        names = ("ngram_r", "null_r", "density")
        return {name: torch.from_numpy(scores[name]) for name in names}

    # ---- what follows ----------------------------------------------------------------------------

    @torch.no_grad()
    def next_tokens(self, prompt, k=10):
        """[(token, probability)] of the k most likely tokens after a prompt."""
        probabilities = self.lab.model(self.prompt(prompt))[0, -1].float().softmax(-1)
        top = probabilities.topk(min(k, len(probabilities)))
        return [(self.token(i), p) for i, p in zip(top.indices.tolist(), top.values.tolist())]

    @torch.no_grad()
    def loss(self, text):
        """Mean cross-entropy in nats of the tokens of a text but the first.

        A text longer than the context is read in consecutive windows, as validation reads. Raises
        UserError if it has fewer than two tokens.
        """
        model, ids = self.lab.model, self.encode(text)
        if len(ids) < 2:
            raise UserError(
                f"{text!r} is a single token, and a loss needs one to predict; give a longer text."
            )
        ids = torch.tensor([ids], device=model.tokens.weight.device)
        total, window = 0.0, model.config.block_size
        for start in range(0, ids.shape[1] - 1, window):
            targets = ids[:, start + 1 : start + 1 + window]
            logits = model(ids[:, start : start + targets.shape[1]])
            logits = logits[0].to(widest_float(logits.device))
            total += F.cross_entropy(logits, targets[0], reduction="sum").item()
        return total / (ids.shape[1] - 1)


def as_warning(line):
    """The log of a Lab in Python: notes become warnings, other lines are dropped."""
    if line.startswith("note"):
        warnings.warn(line.removeprefix("note").strip(), stacklevel=2)
