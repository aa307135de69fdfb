"""A checkpoint to experiment with: text in, text and numbers out; no gradients, no printing.

    lab = crate_mini.load("out/crate-3L/best")
    lab.codes("1 2 3")                                    # (L, T, h), with the text's tokens
    lab.generate("1 2 3", 20, steer={(2, 40): "4x"})      # neuron 40 of layer 2
    with lab.steer(2, 40, "4x"):
        print(lab.loss("1 2 3 4 5"))                      # everything in the block is steered

`lab.known` holds the labels and maxima of its neurons, `lab.reader` what computes the answers.
"""

import torch

from crate_mini import intervene
from crate_mini.generate import generate


class Lab:
    """A model, its tokenizer, its held-out text, and the labels and maxima of its neurons.

    data: text to observe maxima on, instead of the held-out part of the training text.
    sae: a file of `interpret.py sae`; its features then take the place of neurons. log: called with
    notes (labels of another checkpoint, ...), by default a warning. tokenizer: to replace theirs.
    """

    def __init__(self, checkpoint, data=None, device="auto", sae=None, log=None, tokenizer=None):
        from crate_mini.sae import autoencoder
        from crate_mini.steering.known import KnownNeurons
        from crate_mini.steering.reader import Reader, as_warning
        from crate_mini.training.checkpoint import open_model

        self.checkpoint, self.data, self.log = checkpoint, data, log or as_warning
        self.model, self.meta, self.tokenizer = open_model(checkpoint, device, tokenizer, self.log)
        self.sae = autoencoder.load(sae, self.model)[0] if sae else None
        self.known = KnownNeurons(self)
        self.reader = Reader(self)

    def ids(self, prompt):
        """Token ids of a prompt. Raises UserError if it is empty, too long, or no text."""
        return self.reader.prompt(prompt)[0].tolist()

    def token(self, id):
        """A token as printable text; `id 300` for an id that the tokenizer does not have."""
        return self.reader.token(id)

    def text(self, ids):
        """The text of a list of ids; U+FFFD stands for characters that a terminal cannot show."""
        return self.reader.text(ids)

    def held_out(self):
        """The Corpus with a "val" split that the model has not seen; opened when first needed."""
        return self.reader.held_out()

    def codes(self, text):
        """(L, T, h): the codes of a text in every layer; `.tokens` are its T tokens."""
        return self.reader.codes(text)

    def top_neurons(self, text, k=10):
        """[Firing]: the k neurons that fire most specifically on a text, see steering/reader.py."""
        return self.reader.top_neurons(text, k)

    def next_tokens(self, prompt, k=10):
        """[(token, probability)] of the k most likely tokens after a prompt."""
        return self.reader.next_tokens(prompt, k)

    def loss(self, text):
        """Nats per token of a text of any length: the mean over its tokens but the first."""
        return self.reader.loss(text)

    def score(self, layer, tokens=100_000, seed=0):
        """{"ngram_r", its control "null_r", "density"}: (h,) each, measured on held-out tokens."""
        return self.reader.score(layer, tokens, seed)

    def generate(self, prompt, n=40, temperature=0.8, top_k=None, seed=1337, steer=()):
        """The prompt continued by n tokens; temperature 0 is greedy. steer: {(2, 40): "4x"}."""
        ids = self.reader.prompt(prompt)
        draws = torch.Generator(ids.device).manual_seed(seed)
        with self.steer(dict(steer)):
            ids = generate(self.model, ids, n, temperature, top_k, draws)
        return self.text(ids[0].tolist())

    def steer(self, *neurons, **options):
        """A context in which the model runs steered; yields intervene.Steering.

        steer(2, 40, "4x"): as for `intervention`; steer({(2, 40): "4x"}); or steer(intervention).
        """
        return intervene.steer(self.model, self.known.interventions(neurons, options))

    def intervention(self, layer, neuron, value="2x", op="set", **options):
        """An Intervention on one neuron; value as in steer.py, options: further fields of it.

        Raises UserError if the model cannot take it.
        """
        return self.known.intervention(layer, neuron, value, op, **options)


def train(**settings):
    """A Lab of the best checkpoint of a run that this trains, see training/from_python.py."""
    from crate_mini.training import from_python

    return Lab(from_python.train(**settings))
