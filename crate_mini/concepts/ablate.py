"""Taking directions out of a classifier's states: which directions, and what the model says without them.

h becomes h - (h . u) u, u of length 1, at the lower layer; VARIANTS says where u comes from.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch

from crate_mini import UserError
from crate_mini.concepts.classifier import batches
from crate_mini.generate import remember

VARIANTS = {
    "own": "the code of the text's salient word",
    "another": "the code of another text's salient word, any class",
    "same class": "the code of the salient word of another text of the same class",
    "other class": "the code of the salient word of a text of another class",
    "centred": "the own code less the mean code of the training words",
    "centred, another": "another text's code less that mean",
    "mean": "the mean lower state of the training words: no concept at all",
    "raw": "the salient word's own state: no codebook",
    "gaussian": "a random direction for each text: the original's only control",
}
OF_CODES = tuple(VARIANTS)[:6]  # what depends on the codes; the rest is shared by all methods


@dataclass
class Items:
    """n test texts with a salient word: text (n,) its number, row (n,) of the word in Vectors; ids (n, T),
    lengths (n,), label (n,) tensors; at the lower layer h (n, d) the read-out's state, mean (n, d) the mean
    of the words' states."""

    text: np.ndarray
    row: np.ndarray
    ids: torch.Tensor
    lengths: torch.Tensor
    label: torch.Tensor
    h: torch.Tensor
    mean: torch.Tensor

    def first(self, n):
        """The first n of them."""
        return Items(*(getattr(self, f.name)[:n] for f in fields(self)))


@torch.no_grad()
def items(model, text, vectors, salient):
    """The Items of a Salience: its texts that have a salient word."""
    layer, device = vectors.facts["layers"][0], model.head.weight.device
    row_of = {
        pair: i for i, pair in enumerate(zip(vectors.sentence.tolist(), vectors.position.tolist()))
    }
    pairs = list(zip(salient.sentence.tolist(), salient.position.tolist()))
    pairs = [pair for pair in pairs if pair[1] >= 0]
    rows = torch.tensor([s for s, _ in pairs])
    h = [
        model.states(text.ids[part, :T].to(device), layer).cpu()[
            torch.arange(len(part)), text.lengths[part] - 1
        ]
        for part, T in batches(rows, text.lengths, 64)
    ]
    lengths, total = text.lengths[rows], np.zeros((len(vectors.label), vectors.lower.shape[1]))
    np.add.at(total, vectors.sentence, vectors.lower)
    count = np.bincount(vectors.sentence, minlength=len(total))[rows.numpy(), None]
    return Items(
        rows.numpy(),
        np.array([row_of[pair] for pair in pairs]),
        text.ids[rows, : int(lengths.max())],
        lengths,
        torch.from_numpy(vectors.label)[rows],
        torch.cat(h),
        torch.from_numpy((total[rows.numpy()] / count).astype(np.float32)),
    )


def unit(x):
    """(n, d) tensor, rows of length 1; rows of zeros stay."""
    x = torch.as_tensor(x)
    norm = x.norm(dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, 1)


def without(h, u):
    """h (.., d) less its part along u (.., d), which has length 1 or 0: rank one and nothing else."""
    return h - (h * u).sum(-1, keepdim=True) * u


def partners(label, seed):
    """{variant: (n,) another text's number}, drawn by the seed: any, of the same class, of another class.

    Raises UserError when a text has no such partner.
    """
    rng, n = np.random.default_rng(seed), len(label)
    label, found = np.asarray(label), {}
    fits = {
        "another": np.ones((n, n), bool),
        "same class": label[:, None] == label,
        "other class": label[:, None] != label,
    }
    for name, fit in fits.items():
        key = np.where(fit & ~np.eye(n, dtype=bool), rng.random((n, n)), -1)
        if (key.max(1) < 0).any():
            raise UserError(
                f"one of the {n} test texts has no partner of the {name}; give more labelled "
                "texts, or judge on all of them with --tests 0."
            )
        found[name] = key.argmax(1)
    return found


def code_directions(codes, vectors, found, seed):
    """{variant: (n, d) unit directions} of OF_CODES, and the share of texts whose partner has their code."""
    of = codes.assignment[found.row]
    other, u = partners(found.label, seed), torch.from_numpy(codes.directions())
    used = codes.assignment[vectors.rows("train")]
    mean = torch.from_numpy(codes.centroids[used].mean(0))
    centred = unit(torch.from_numpy(codes.centroids) - mean)
    directions = {
        "own": u[of],
        **{name: u[of[j]] for name, j in other.items()},
        "centred": centred[of],
        "centred, another": centred[of[other["another"]]],
    }
    return directions, {name: float((of == of[j]).mean()) for name, j in other.items()}


def shared_directions(vectors, found, seed):
    """{variant: (n, d)} of the controls that no codebook enters."""
    mean = vectors.lower[vectors.rows("train")].mean(0)
    generator = torch.Generator().manual_seed(seed)
    return {
        "mean": unit(mean).expand_as(found.h),
        "raw": unit(vectors.lower[found.row]),
        "gaussian": unit(torch.randn(found.h.shape, generator=generator)),
    }


class Above:
    """The classifier from the lower layer on, on the Items `found`; it runs with a direction taken out.

    Results: (logits (n, C), what the head reads (n, d)), on the CPU, in the order of the items.
    """

    @torch.no_grad()
    def __init__(self, model, found, layer, size=64):
        self.model, self.layer, self.groups = model, layer, []
        for T in found.lengths.unique():  # texts of one length together: nothing is padded
            for part in (found.lengths == T).nonzero()[:, 0].split(size):
                ids = found.ids[part, :T].to(model.head.weight.device)
                self.groups.append((part, model.states(ids, layer)))

    @torch.no_grad()
    def all(self, u):
        """The result with u (n, d) taken out of every place of each text."""
        return joined(
            [
                (
                    part,
                    *self.model.onward(
                        without(z, u[part].to(z)[:, None]),
                        self.layer,
                        torch.full((len(z),), z.shape[1]),
                    ),
                )
                for part, z in self.groups
            ]
        )

    @torch.no_grad()
    def last(self, us):
        """[the result for each u of us], u (n, d) taken out of the read-out's place alone.

        What the other places hold above is computed once: in a causal model none of them sees the last.
        """
        lm, results = self.model.lm, [[] for _ in us]
        for part, z in self.groups:
            with remember(lm, z.shape[1]) as past:
                blocks(lm, z[:, :-1], self.layer)
                past.length = z.shape[1] - 1
                for u, result in zip(us, results):
                    x = lm.norm(
                        blocks(lm, without(z[:, -1:], u[part].to(z)[:, None]), self.layer)[:, 0]
                    )
                    result.append((part, self.model.head(x), x))
        return [joined(result) for result in results]


def blocks(lm, z, layer):
    """The stream z (B, T, d) after block `layer` through all blocks above."""
    for block in lm.blocks[layer:]:
        z, _ = block(z)
    return z


def joined(parts):
    """Results of groups [(items, logits, read)] in the order of the items."""
    order = torch.cat([part for part, *_ in parts]).argsort()
    return tuple(torch.cat([row[i].cpu() for row in parts])[order] for i in (1, 2))
