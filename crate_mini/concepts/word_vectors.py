"""Words of texts and their states in two layers of a classifier, from which concepts are made.

A word is a piece of GPT-2's split pattern (letters, digits and other signs apart) without its
leading space; its state is that of its last token. Layers as in classifier.py: 0 the embeddings, l
the stream after block l, all before the final LayerNorm. The marks at both ends of a text are not
words, which leaves out the first position, where states are much larger than elsewhere.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import regex
import torch

from crate_mini import UserError
from crate_mini.concepts.classifier import batches, pad, truncate
from crate_mini.concepts.types import SPLITS, Vectors
from crate_mini.data.tokenizer import PATTERN

# ---- words ---------------------------------------------------------------------------------------


@dataclass
class TextWords:
    """S texts as a classifier reads them, and their words.

    ids (S, T), lengths (S,): tensors, as classifier.encode returns them. words: S lists of str.
    word_of: (S, T) int64, which of its text's words a token belongs to; -1 for none.
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    words: list
    word_of: np.ndarray

    def last_tokens(self, s):
        """Of text s: (position (n,) of the last token of each word, number (n,) of that word)."""
        words = np.append(self.word_of[s], -1)
        ends = np.flatnonzero((words[:-1] >= 0) & (words[:-1] != words[1:]))
        return ends, words[ends]


def read(tokenizer, texts, length, cut):
    """The TextWords of texts, cut to `length` tokens as classifier.encode does.

    A word that is cut through counts, and keeps its full spelling.
    """
    pattern = regex.compile(PATTERN)
    encode = cache(tokenizer.encode)
    words, rows, word_of = [], [], []
    for text in texts:
        ids, spelled, owners = split_words(pattern.findall(text), encode)
        owners = truncate(owners, length, cut)
        kept = list(dict.fromkeys(n for n in owners if n >= 0))
        renumbered = {n: i for i, n in enumerate(kept)}
        words.append([spelled[n] for n in kept])
        rows.append([tokenizer.eot, *truncate(ids, length, cut), tokenizer.eot])
        word_of.append([-1, *(renumbered.get(n, -1) for n in owners), -1])
    ids, lengths = pad(rows, tokenizer.eot)
    return TextWords(ids, lengths, words, pad(word_of, -1)[0].numpy())


def split_words(pieces, encode):
    """(ids, words, for each id the number of its word or -1) of the pieces of a text.

    A piece that is only white space has tokens but is not a word.
    """
    ids, words, owners = [], [], []
    for piece in pieces:
        new_ids = encode(piece)
        word = piece.strip()
        ids += new_ids
        owners += [len(words) if word else -1] * len(new_ids)
        if word:
            words.append(word)
    return ids, words, owners


# ---- vectors -------------------------------------------------------------------------------------


@dataclass
class ChosenWords:
    """N words of TextWords that get vectors, by the rule of `choose`.

    places: (N, 3) text, last token, number in the text; sorted by text. word: (N,) index into
    vocabulary, a list of str. least, most: of the rule.
    """

    places: np.ndarray
    word: np.ndarray
    vocabulary: list
    least: int
    most: int


def choose(text, labelled, least=5, most=20, tests=None):
    """The ChosenWords of TextWords; no model is needed.

    labelled: the Labelled that the texts come from. Of the train and stop texts, words that occur
    at least `least` times in training texts, and of each word its first `most` occurrences in
    either split; of the test texts every word (the rule of CLVQ-VAE's and LACOAT's code). tests:
    rows of the test texts to use, all if None. Raises UserError when no word is frequent enough.
    """
    wanted = labelled.split != SPLITS["test"]
    wanted[labelled.split == SPLITS["test"] if tests is None else tests] = True
    places, spelled = find_words(text, np.flatnonzero(wanted))
    vocabulary, word = np.unique(spelled, return_inverse=True)
    split = labelled.split[places[:, 0]]
    keep = frequent(word, split, least, most)
    if not (split[keep] == SPLITS["train"]).any():
        raise UserError(
            f"no word occurs {least} times in the training texts; give more texts, or --least 1."
        )
    return ChosenWords(places[keep], word[keep], vocabulary.tolist(), least, most)


def extract(model, text, labelled, layers, words, facts=None):
    """Vectors of ChosenWords in two layers of a Classifier.

    facts: added to those of the Vectors. Raises UserError for layers that do not exist.
    """
    check_layers(layers, len(model.lm.blocks))
    lower_states, upper_states = gather(model, text, words.places, layers)
    about = {"layers": list(layers), "least": words.least, "most": words.most}
    return Vectors(
        lower_states,
        upper_states,
        sentence=words.places[:, 0],
        word=words.word,
        position=words.places[:, 2],
        label=labelled.label,
        split=labelled.split,
        vocabulary=words.vocabulary,
        classes=labelled.classes,
        facts={**about, "labelled": labelled.facts, **(facts or {})},
    )


def check_layers(layers, last):
    """Raise UserError unless both layers exist in a model of `last` blocks, the lower one first."""
    lower, upper = layers
    if not 0 <= lower <= upper <= last:
        raise UserError(
            f"layers {lower},{upper} do not exist; give two of 0 to {last}, the first not above "
            f"the second, such as --layers {max(0, last - 2)},{last}."
        )


def find_words(text, rows):
    """(places (N, 3): text, last token, number in the text; N spellings) of the words of texts."""
    places, spelled = [], []
    for s in rows:
        for token, number in zip(*text.last_tokens(s)):
            places.append((s, token, number))
            spelled.append(text.words[s][number])
    return np.array(places, np.int64).reshape(-1, 3), spelled


def frequent(word, split, least, most):
    """(N,) bool: which words to keep by the rule of `extract`.

    word (N,): index of the spelling. split (N,): of the word's text.
    """
    n = word.max(initial=0) + 1
    in_training = np.bincount(word[split == SPLITS["train"]], minlength=n)
    often = in_training[word] >= least
    key = word * len(SPLITS) + split
    order = np.argsort(key, kind="stable")  # equal words of a split together, in their order
    first = np.searchsorted(key[order], key[order])
    occurrence = np.empty(len(word), np.int64)
    occurrence[order] = np.arange(len(word)) - first
    return (split == SPLITS["test"]) | often & (occurrence < most)


@torch.no_grad()
def gather(model, text, places, layers, size=64):
    """(2, N, d) float32: states of two layers at places (N, 3), which are sorted by text."""
    states = np.empty((2, len(places), model.lm.config.n_embd), np.float32)
    device = model.head.weight.device
    for batch, T in batches(np.unique(places[:, 0]), text.lengths, size):
        z = model.states(text.ids[batch, :T].to(device))[list(layers)]
        z = z.float().cpu().numpy()
        first, end = np.searchsorted(places[:, 0], [int(batch[0]), int(batch[-1]) + 1])
        row = np.searchsorted(batch.numpy(), places[first:end, 0])
        states[:, first:end] = z[:, row, places[first:end, 1]]
    return states
