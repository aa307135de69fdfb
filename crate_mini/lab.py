"""A checkpoint to experiment with: codes of a text, next tokens, steering, generation.

    lab = crate_mini.load("out/crate-3L/best")
    lab.codes("1 2 3")                              # (L, T, h)
    lab.next_tokens("1 2 3", 5)                     # [(" 4", 0.61), ...]
    with lab.steer(lab.intervention(2, 40, "4x")):  # neuron 40 of layer 2
        print(lab.generate("1 2 3", 20))

`lab.known` holds the labels and maxima of its neurons.
"""

import torch

from crate_mini import UserError, intervene
from crate_mini.generate import generate


class Lab:
    """A model, its tokenizer, its held-out text, and the labels and maxima of its neurons.

    data: text to observe maxima on, instead of the held-out part of the training text.
    sae: a file of `interpret.py sae`; its features then take the place of neurons. log: called with
    a note if recorded labels belong to another checkpoint. tokenizer: its name, to replace theirs.
    """

    def __init__(self, checkpoint, data=None, device="auto", sae=None, log=print, tokenizer=None):
        from crate_mini.sae import autoencoder
        from crate_mini.steering.known import KnownNeurons
        from crate_mini.training.checkpoint import open_model

        self.checkpoint, self.data = checkpoint, data
        self.model, self.meta, self.tokenizer = open_model(checkpoint, device, tokenizer)
        self.sae = autoencoder.load(sae, self.model)[0] if sae else None
        self.known = KnownNeurons(self, log)
        self._corpus = None

    def ids(self, prompt):
        """Token ids of a prompt. Raises UserError if it is empty, too long, or no text."""
        if any("\ud800" <= c <= "\udfff" for c in prompt):
            raise UserError("the prompt holds bytes that are not UTF-8 text; type it again.")
        ids = self.tokenizer.encode(prompt)
        window = self.model.config.block_size
        if not ids:
            raise UserError('the prompt is empty; give some text, like --prompt "1 2 3 4 5".')
        if len(ids) > window:
            raise UserError(
                f"the prompt has {len(ids)} tokens, the model reads {window}; shorten it."
            )
        return ids

    def _batch(self, prompt):
        return torch.tensor([self.ids(prompt)], device=self.model.tokens.weight.device)

    def token(self, id):
        """A token as printable text; `id 300` for an id that the tokenizer does not have."""
        from crate_mini.data.tokenizer import visible

        if id >= self.tokenizer.vocab_size:
            return f"id {id}"
        return visible(self.tokenizer.token_bytes(id))

    def text(self, ids):
        """The text of a list of ids; U+FFFD stands for characters that a terminal cannot show."""
        from crate_mini.console.terminal import printable

        return printable(self.tokenizer.decode(id for id in ids if id < self.tokenizer.vocab_size))

    def held_out(self):
        """The Corpus with a "val" split that the model has not seen; opened when first needed."""
        from crate_mini.training.checkpoint import held_out

        if self._corpus is None:
            self._corpus = held_out(self.checkpoint, self.meta, self.tokenizer, self.data)
        return self._corpus

    @torch.no_grad()
    def codes(self, text):
        """(L, T, h): the codes of a text in every layer."""
        _, codes = self.model.trunk(self._batch(text))
        return torch.cat(codes)

    @torch.no_grad()
    def next_tokens(self, prompt, k=10):
        """[(token, probability)] of the k most likely tokens after a prompt."""
        probabilities = self.model(self._batch(prompt))[0, -1].float().softmax(-1)
        top = probabilities.topk(min(k, len(probabilities)))
        return [(self.token(i), p) for i, p in zip(top.indices.tolist(), top.values.tolist())]

    def generate(self, prompt, n=40, temperature=0.8, top_k=None, seed=1337):
        """The prompt continued by n tokens; temperature 0 is greedy."""
        ids = self._batch(prompt)
        draws = torch.Generator(ids.device).manual_seed(seed)
        ids = generate(self.model, ids, n, temperature, top_k, draws)
        return self.text(ids[0].tolist())

    def steer(self, *interventions):
        """A context in which the model runs with these interventions; see intervene.steer."""
        return intervene.steer(self.model, interventions)

    def intervention(self, layer, neuron, value="2x", op="set", **options):
        """An Intervention on one neuron; value as in steer.py, options: further fields of it.

        Raises UserError if the model cannot take it.
        """
        from crate_mini.steering.choose import amount

        number, _ = amount(self, layer, neuron, value, op)
        change = intervene.Intervention(layer, neuron, op, number, sae=self.sae, **options)
        change.check(self.model.config)
        return change
