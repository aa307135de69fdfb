"""Words of texts, and their states in two layers of a classifier: what concepts are made of.

A word is a piece of GPT-2's split pattern (letters, digits and signs apart) without its leading space; its
state is that of its last token. Layers as in classifier.py: 0 the embeddings, l the stream after block l, all
before the final LayerNorm. The two marks around a text are no words; that drops the first position, whose
states are of another size than all others'.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import regex
import torch

from crate_mini import UserError
from crate_mini.concepts.classifier import batches, kept, pad
from crate_mini.concepts.types import SPLITS, Vectors
from crate_mini.data.tokenizer import PATTERN


@dataclass
class Text:
    """S texts as a classifier reads them: ids (S, T), lengths (S,) tensors; words, S lists of str; number
    (S, T) int64, which of its text's words a token belongs to, -1 where to none."""

    ids: torch.Tensor
    lengths: torch.Tensor
    words: list
    number: np.ndarray

    def ends(self, s):
        """(n,) the last token of each of the n words of text s, and (n,) their numbers."""
        own = np.append(self.number[s], -1)
        at = np.flatnonzero((own[:-1] >= 0) & (own[:-1] != own[1:]))
        return at, own[at]


def read(tokenizer, texts, length, cut):
    """The Text of `texts`; its ids are those of classifier.encode, its words what these hold, in part too."""

    @cache
    def encoded(piece):
        return tokenizer.encode(piece)

    split, words, rows, numbers = regex.compile(PATTERN), [], [], []
    for text in texts:
        own, ids, number = [], [], []
        for piece in split.findall(text):
            new, word = encoded(piece), piece.strip()
            ids += new
            number += [len(own) if word else -1] * len(new)
            own += [word] if word else []
        number = kept(number, length, cut)
        there = {n: i for i, n in enumerate(dict.fromkeys(n for n in number if n >= 0))}
        words.append([own[n] for n in there])
        rows.append([tokenizer.eot, *kept(ids, length, cut), tokenizer.eot])
        numbers.append([-1, *(there.get(n, -1) for n in number), -1])
    return Text(*pad(rows, tokenizer.eot), words, pad(numbers, -1)[0].numpy())


def vectors(model, text, found, layers, least=5, most=20, tests=None, facts=None):
    """Vectors of the words of a Text in two `layers` of a Classifier; found: the Labelled it was read from.

    Of training and stop texts, words that the training texts have `least` times or more, the first `most`
    times that each of the two splits has them; of the test texts `tests` (their rows; None: all) every word
    (as in the code of CLVQ-VAE and LACOAT).
    Raises UserError for layers that are not there, and when no word is that frequent.
    """
    lower, upper = layers
    if not 0 <= lower <= upper <= len(model.lm.blocks):
        raise UserError(
            f"layers {lower},{upper} are not there; give two of 0 to {len(model.lm.blocks)}, the "
            "first not above the second, such as --layers 1,3."
        )
    wanted = found.split != SPLITS["test"]
    wanted[found.split == SPLITS["test"] if tests is None else tests] = True
    rows = [(s, *pair) for s in np.flatnonzero(wanted) for pair in zip(*text.ends(s))]
    of = np.array(rows, np.int64).reshape(-1, 3)  # sentence, token, word's number
    spelled = [text.words[s][n] for s, _, n in rows]
    vocabulary, word = np.unique(spelled, return_inverse=True)
    keep = frequent(word, found.split[of[:, 0]], len(vocabulary), least, most)
    of, word = of[keep], word[keep]
    if not (found.split[of[:, 0]] == SPLITS["train"]).any():
        raise UserError(
            f"no word occurs {least} times in the training texts; give more texts, or --least 1."
        )
    facts = {
        "layers": [lower, upper],
        "least": least,
        "most": most,
        "labelled": found.facts,
        **(facts or {}),
    }
    return Vectors(
        *gather(model, text, of, layers),
        of[:, 0],
        word,
        of[:, 2],
        found.label,
        found.split,
        vocabulary.tolist(),
        found.classes,
        facts,
    )


def frequent(word, split, n, least, most):
    """(N,) bool: which words (of n) to keep, by the rule of `vectors`; split (N,) of each."""
    often = np.bincount(word[split == SPLITS["train"]], minlength=n)[word] >= least
    key = word * len(SPLITS) + split
    order = np.argsort(key, kind="stable")  # equal words together, in their order
    first = np.searchsorted(key[order], key[order])
    nth = np.empty(len(word), np.int64)
    nth[order] = np.arange(len(word)) - first
    return (split == SPLITS["test"]) | often & (nth < most)


@torch.no_grad()
def gather(model, text, of, layers, size=64):
    """(2, N, d) float32: states of the two layers at places (N, 3): sentence (sorted), token, anything."""
    out = np.empty((2, len(of), model.lm.config.n_embd), np.float32)
    for part, T in batches(np.unique(of[:, 0]), text.lengths, size):
        z = (
            model.states(text.ids[part, :T].to(model.head.weight.device))[list(layers)]
            .float()
            .cpu()
            .numpy()
        )
        first, last = np.searchsorted(of[:, 0], [int(part[0]), int(part[-1]) + 1])
        at = np.searchsorted(part.numpy(), of[first:last, 0])
        out[:, first:last] = z[:, at, of[first:last, 1]]
    return out
