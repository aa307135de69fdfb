"""Remove a direction from a classifier's states: which directions, and how the model then answers.

At the lower layer h becomes h - (h . u) u with u of length 1; VARIANTS lists where u comes from.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch

from crate_mini import UserError
from crate_mini.concepts.classifier import batches
from crate_mini.generate import kv_cache

CODE_VARIANTS = {
    "own": "the code of the text's salient word",
    "another": "the code of another text's salient word, any class",
    "same class": "the code of the salient word of another text of the same class",
    "other class": "the code of the salient word of a text of another class",
    "centred": "the text's own code minus the mean code of the training words",
    "centred, another": "another text's code minus that mean",
}
SHARED_VARIANTS = {  # no codebook is involved: the same for all methods
    "mean": "the mean lower state of the training words: no concept at all",
    "raw": "the state of the salient word itself: no codebook",
    "gaussian": "a random direction for each text: the only control of the authors",
}
VARIANTS = CODE_VARIANTS | SHARED_VARIANTS


@dataclass
class SalientTexts:
    """n test texts that have a salient word.

    text (n,): number of the text. row (n,): of the salient word, in Vectors. Tensors: ids (n, T),
    lengths (n,), label (n,); at the lower layer, h (n, d) the state that the head reads, and mean
    (n, d) of the states of the words.
    """

    text: np.ndarray
    row: np.ndarray
    ids: torch.Tensor
    lengths: torch.Tensor
    label: torch.Tensor
    h: torch.Tensor
    mean: torch.Tensor

    def first(self, n):
        """The first n of them."""
        return SalientTexts(*(getattr(self, f.name)[:n] for f in fields(self)))


def select(model, text, vectors, salience):
    """The SalientTexts of a Salience: those of its texts that have a salient word."""
    row_of = {}
    for row, place in enumerate(zip(vectors.sentence.tolist(), vectors.position.tolist())):
        row_of[place] = row
    places = zip(salience.sentence.tolist(), salience.position.tolist())
    places = [(s, position) for s, position in places if position >= 0]
    texts = torch.tensor([s for s, _ in places])
    lengths = text.lengths[texts]
    return SalientTexts(
        text=texts.numpy(),
        row=np.array([row_of[place] for place in places]),
        ids=text.ids[texts, : int(lengths.max())],
        lengths=lengths,
        label=torch.from_numpy(vectors.label)[texts],
        h=read_out_states(model, text, texts, vectors.facts["layers"][0]),
        mean=mean_word_states(vectors, texts.numpy()),
    )


@torch.no_grad()
def read_out_states(model, text, rows, layer):
    """(n, d): the state that the head reads, at a lower layer, of the texts `rows` (n,)."""
    device = model.head.weight.device
    states = []
    for batch, T in batches(rows, text.lengths, 64):
        z = model.states(text.ids[batch, :T].to(device), layer).cpu()
        states.append(z[torch.arange(len(batch)), text.lengths[batch] - 1])
    return torch.cat(states)


def mean_word_states(vectors, rows):
    """(n, d): mean lower state of the words of each of the texts `rows` (n,)."""
    total = np.zeros((len(vectors.label), vectors.lower.shape[1]))
    np.add.at(total, vectors.sentence, vectors.lower)
    count = np.bincount(vectors.sentence, minlength=len(total))
    mean = total[rows] / count[rows, None]
    return torch.from_numpy(mean.astype(np.float32))


# ---- directions ----------------------------------------------------------------------------------


def unit(x):
    """x (n, d) as a tensor with rows of length 1; rows of zeros stay zero."""
    x = torch.as_tensor(x)
    norm = x.norm(dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, 1)


def without(h, u):
    """h (.., d) without its part along u (.., d) of length 1 or 0: rank one and nothing else."""
    return h - (h * u).sum(-1, keepdim=True) * u


def partners(label, seed):
    """{variant: (n,) number of another text}: any, one of the same class, one of another class.

    Drawn by the seed. Raises UserError when a text has no such partner.
    """
    label = np.asarray(label)
    n = len(label)
    rng = np.random.default_rng(seed)
    allowed = {
        "another": np.ones((n, n), bool),
        "same class": label[:, None] == label,
        "other class": label[:, None] != label,
    }
    chosen = {}
    for name, pairs in allowed.items():
        key = np.where(pairs & ~np.eye(n, dtype=bool), rng.random((n, n)), -1)
        if (key.max(1) < 0).any():
            raise UserError(
                f"one of the {n} test texts has no partner for {name!r}; give more labelled "
                "texts, or judge on all of them with --tests 0."
            )
        chosen[name] = key.argmax(1)
    return chosen


def code_directions(codes, vectors, texts, seed):
    """Directions of CODE_VARIANTS for SalientTexts, by the Codes of one method.

    Returns ({variant: (n, d) unit directions}, {variant: share of texts whose partner has the same
    code}).
    """
    code = codes.assignment[texts.row]
    partner = partners(texts.label, seed)
    u = torch.from_numpy(codes.directions())
    in_training = codes.assignment[vectors.rows("train")]
    mean = codes.centroids[in_training].mean(0)
    centred = unit(torch.from_numpy(codes.centroids) - torch.from_numpy(mean))
    directions = {"own": u[code]}
    equal = {}
    for name, other in partner.items():
        directions[name] = u[code[other]]
        equal[name] = float((code == code[other]).mean())
    directions["centred"] = centred[code]
    directions["centred, another"] = centred[code[partner["another"]]]
    return directions, equal


def shared_directions(vectors, texts, seed):
    """{variant: (n, d) unit directions} of SHARED_VARIANTS for SalientTexts."""
    mean = vectors.lower[vectors.rows("train")].mean(0)
    generator = torch.Generator().manual_seed(seed)
    return {
        "mean": unit(mean).expand_as(texts.h),
        "raw": unit(vectors.lower[texts.row]),
        "gaussian": unit(torch.randn(texts.h.shape, generator=generator)),
    }


# ---- the model without a direction ---------------------------------------------------------------


class UpperLayers:
    """The classifier from the lower layer on, run on SalientTexts with a direction removed.

    Results are (logits (n, C), what the head read (n, d)), on the CPU, in the order of the texts.
    """

    @torch.no_grad()
    def __init__(self, model, texts, layer, size=64):
        self.model = model
        self.layer = layer
        self.groups = []  # (numbers of the texts, their states z) of one length: nothing is padded
        device = model.head.weight.device
        for T in texts.lengths.unique():
            for group in (texts.lengths == T).nonzero()[:, 0].split(size):
                ids = texts.ids[group, :T].to(device)
                self.groups.append((group, model.states(ids, layer)))

    @torch.no_grad()
    def remove_everywhere(self, u):
        """The result with u (n, d) removed at every position of each text."""
        outputs = []
        for group, z in self.groups:
            lengths = torch.full((len(z),), z.shape[1])
            z = without(z, u[group].to(z)[:, None])
            outputs.append((group, *self.model.run_from(z, self.layer, lengths)))
        return in_order(outputs)

    @torch.no_grad()
    def remove_from_last(self, directions):
        """[the result for each u of a list], u (n, d) removed at the last position alone.

        The other positions are computed once: in a causal model none of them sees the last.
        """
        lm = self.model.lm
        outputs = [[] for _ in directions]
        for group, z in self.groups:
            with kv_cache(lm, z.shape[1]) as cache:
                run_blocks(lm, z[:, :-1], self.layer)
                cache.length = z.shape[1] - 1
                for u, output in zip(directions, outputs):
                    last = without(z[:, -1:], u[group].to(z)[:, None])
                    x = lm.norm(run_blocks(lm, last, self.layer)[:, 0])
                    output.append((group, self.model.head(x), x))
        return [in_order(output) for output in outputs]


def run_blocks(lm, z, layer):
    """The stream z (B, T, d) after block `layer`, through all blocks above."""
    for block in lm.blocks[layer:]:
        z, _ = block(z)
    return z


def in_order(outputs):
    """(logits, read) of all texts, from a list of (numbers of the texts, logits, read)."""
    groups, logits, read = zip(*outputs)
    order = torch.cat(groups).argsort()
    return torch.cat(logits).cpu()[order], torch.cat(read).cpu()[order]
