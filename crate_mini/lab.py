"""A checkpoint on the desk of steer.py: who its neurons are, how far they go, and how to name one."""

import math
import re

from crate_mini import UserError, cli
from crate_mini import results as evidence
from crate_mini.data.tokenizer import visible
from crate_mini.intervene import Intervention
from crate_mini.neurons import page as pages
from crate_mini.neurons import protocols as score
from crate_mini.sae import autoencoder as sae
from crate_mini.steering import dose_response as dose

HELD_OUT = 16384  # tokens on which a maximum is observed where interpret.py has not recorded it


class Desk:
    """A model on the desk: who its neurons are, how far they go, what turning them does."""

    def __init__(self, ckpt, data=None, device="auto", autoencoder=None):
        self.ckpt, self.data, self.corpus, self.largest = ckpt, data, None, {}
        self.model, self.meta, self.tokenizer = evidence.loaded(ckpt, device)
        self.sae = sae.load(autoencoder, self.model)[0] if autoencoder else None
        self.known = self.explanations()

    def explanations(self):
        """{(site, neuron): row} of scores.jsonl, if interpret.py has scored this very checkpoint."""
        folder = evidence.folder(self.ckpt)
        if not (folder / "scores.jsonl").exists() or not (folder / "record.json").exists():
            return {}
        scored = cli.read_json(folder / "record.json").get("checkpoint", {})
        if scored.get("sha256") != self.meta.get("sha256"):
            print(f"note      {folder} describes another checkpoint than this one; it is not used")
            return {}
        return {
            (row["site"], row["neuron"]): row for row in score.read_rows(folder / "scores.jsonl")
        }

    def site(self, layer):
        return f"L{layer}" + (f".sae-{self.sae.name}" if self.sae else "")

    def token(self, id):
        """A token as printable text; some ids of a model may be no token."""
        known = id < self.tokenizer.vocab_size
        return visible(self.tokenizer.token_bytes(id)) if known else f"id {id}"

    def quoted(self, id):
        return f"“{self.token(id)}”"

    def text(self, ids):
        """Text of ids that a terminal can show as it stands."""
        text = self.tokenizer.decode(i for i in ids if i < self.tokenizer.vocab_size)
        return "".join(
            c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text
        )

    def label(self, layer, j):
        """What is known of a neuron's meaning, in one line, or ''."""
        found = self.known.get((self.site(layer), j), {}).get("label")
        return pages.label_text(found, self.token) if found else ""

    def held_out(self):
        """The text that the model has not seen; opened when first needed."""
        if self.corpus is None:
            self.corpus = evidence.held_out(self.ckpt, self.meta, self.tokenizer, self.data)
        return self.corpus

    def observed(self, layer):
        """(width,) largest value of each neuron of a layer, or feature, on held-out text."""
        if layer not in self.largest:
            blocks = self.held_out().blocks(
                "val", 8, min(256, self.model.config.block_size), HELD_OUT
            )
            self.largest[layer] = dose.observed(
                self.model, layer, self.sae, (x for x, _ in blocks)
            )[0]
        return self.largest[layer]

    def maximum(self, layer, j):
        """(largest value that neuron j was seen at, where)."""
        row = self.known.get((self.site(layer), j), {})
        if row.get("max") and self.data is None:
            return row["max"], "interpret.py's record"
        Intervention(layer, j, sae=self.sae).check(self.model.config)
        value = self.observed(layer)[j].item()
        return value, f"{min(HELD_OUT, self.corpus.n_tokens['val'] - 1):,} held-out tokens"

    def by_label(self, text, layer):
        """(layer, neuron) whose label has most of its activation on `text`, or is a class of that name."""
        sites = {self.site(n): n for n in range(len(self.model.blocks)) if layer in (None, n)}
        found = []
        for (name, j), row in self.known.items():
            label = row.get("label") or {}
            share = sum(
                t[3] or 1e-9
                for t in label.get("tokens", [])
                if text.casefold() in self.token(t[0]).casefold()
            )
            share += label.get("class") == text
            if name in sites and share:
                found.append((-share, sites[name], j))
        if not found:
            raise UserError(
                f"no label of {self.ckpt} has {text!r}; `python interpret.py neurons CKPT` makes "
                "labels, its pages show them."
            )
        others = ", ".join(f"{n}:{j}" for _, n, j in sorted(found)[1:6])
        if others:
            print(
                f"found     {len(found)} neurons with {text!r}; next to this one (layer:neuron): {others}"
            )
        return sorted(found)[0][1:]

    def chosen(self, words, layer):
        """[(layer, neuron)] of --neuron and --layer."""
        if words.startswith("label:") and (text := words.removeprefix("label:").strip(" \"'")):
            return [self.by_label(text, layer)]
        if not re.fullmatch(r" *-?\d{1,9} *(, *-?\d{1,9} *)*", words):
            raise UserError(
                f"--neuron {words!r} names no neuron; give a number like 40, several like 12,40, "
                'or label:"comma".'
            )
        layer = self.sae.layer if layer is None and self.sae else layer
        if layer is None:
            raise UserError("it takes a layer to name a neuron; give --layer 0.")
        if self.sae and layer != self.sae.layer:
            raise UserError(
                f"layer {layer} is not the autoencoder's layer {self.sae.layer}; leave it out."
            )
        return [(layer, int(word)) for word in words.split(",")]

    def turned(self, layer, j, value, op="set", **more):
        """(Intervention on neuron j, what it is in words); value as --value has it. Checked before use."""
        m = re.fullmatch(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)(x|abs)?", value.strip())
        if not m or not math.isfinite(float(m[1])) or op == "scale" and m[2] == "abs":
            raise UserError(
                f"--value {value!r} is no value; give multiples of the neuron's maximum like 2x, "
                "or 1.5abs in its own unit (with --op scale a factor)."
            )
        number, note = float(m[1]), ""
        if op in ("set", "add") and m[2] != "abs":
            largest, where = self.maximum(layer, j)
            if not largest > 0:
                raise UserError(
                    f"neuron {j} of layer {layer} never fired on {where}, so it has no maximum "
                    "to count in; give --value in its own unit, like 1abs."
                )
            number, note = (
                number * largest,
                f" = {number:g} x {largest:.3g}, its maximum in {where}",
            )
        intervention = Intervention(layer, j, op, number, sae=self.sae, **more)
        intervention.check(self.model.config)
        by = {"set": " to", "add": " by", "scale": " by"}.get(op)
        return intervention, f"{intervention}{f'{by} {number:.4g}{note}' if by else ''}"

    def ids(self, prompt):
        """Token ids of a prompt that the model can read."""
        ids, room = self.tokenizer.encode(prompt), self.model.config.block_size
        if not ids:
            raise UserError('the prompt is empty; give some text, like --prompt "1 2 3 4 5".')
        if len(ids) > room:
            raise UserError(
                f"the prompt has {len(ids)} tokens, the model reads {room}; shorten it."
            )
        return ids
