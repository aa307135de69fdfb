"""Meaning beyond the token: does a neuron follow a property of the text so far, given its token?

    r(neuron, property) = Pearson r after each token type's mean is removed from both

A function of the token alone scores 0, whatever it is. Token means come from the fit documents and
are applied to the score documents; tokens of a type that the fit documents hold less than LEAST
times are left out of both, because their mean is not known. The best neuron of each property is
chosen on the fit documents (largest r, so that it fires where the property holds) and read on the
score documents; the mean over properties is the *coverage* of a set of features. Every set has its
controls in feature_sets.py. Intervals redraw the score documents; the choice of neurons stays.
"""

from dataclasses import dataclass

import numpy as np
import torch

from crate_mini import stats
from crate_mini.neurons.documents import PARTS
from crate_mini.neurons.npz import HALF_MAX
from crate_mini.neurons.text_states import NAMES

LEAST = 3  # occurrences of a token type in the fit documents
TOKENS_WITH = 50  # that a property must hold on, and not hold on, in each part
DOCUMENTS_WITH = 5  # that they must lie in
BLOCK_FLOATS = 1 << 25  # activations in memory at a time, as float32
BATCH_TOKENS = 1 << 13
ROWS = 1 << 15  # tokens in float64 at a time
SAME = 1e-10  # share of a feature's power that is rounding, not variation within a token type


@dataclass
class Texts:
    """N tokens of the fit and score documents with P properties, in the order of `batches`.

    token (N,): the type of each token, 0 .. U - 1; document (N,); is_fit (N,) bool; states (N, P)
    bool; kept (N,): which of the tokens that the model reads these are. score_documents (D,);
    score_document: for each score token, which of the D it lies in.
    """

    batches: list  # [(part, [chunk, ...])], what the model reads
    ids: np.ndarray  # (U,) the token of each type
    token: torch.Tensor
    document: np.ndarray
    is_fit: torch.Tensor
    states: torch.Tensor
    kept: np.ndarray
    read: dict  # {part: tokens that were read}

    def __post_init__(self):
        score = self.document[~self.is_fit.numpy()]
        self.score_documents, self.score_document = np.unique(score, return_inverse=True)

    @property
    def counts(self):
        """(U,) how often each type occurs in the fit documents."""
        return torch.bincount(self.token[self.is_fit], minlength=len(self.ids))

    def by_type(self, x):
        """(U, b): sums of x (N, b) over the tokens of each type in the fit documents."""
        return _sums(x[self.is_fit], self.token[self.is_fit], len(self.ids))

    def residual(self, x):
        """x (N, b) minus the mean of each token type in the fit documents.

        All 0 where nothing but rounding is left, as of a function of the token alone.
        """
        means = self.by_type(x) / self.counts[:, None]
        left = x - means[self.token]
        left[:, left.square().mean(0) <= SAME * x.square().mean(0)] = 0
        return left


def _sums(x, groups, n):
    """(n, b) float32: sums of the rows of x (N, b) by group; in float64 on the way."""
    sums = torch.zeros(n, x.shape[1], dtype=torch.float64)
    for rows, numbers in zip(x.split(ROWS), groups.split(ROWS)):
        sums.index_add_(0, numbers, rows.double())
    return sums.float()


def read_texts(documents, states, size=BATCH_TOKENS):
    """The Texts of a FitScoreSplit; states: a TextStates."""
    batches, numbers, fit = [], [], []
    rows, ids = [np.empty((0, len(NAMES)), bool)], [np.empty(0, np.int64)]
    for part in PARTS:
        for chunks in documents.batches(part, size):
            batches.append((part, chunks))
            for chunk in chunks:
                rows.append(states.of(chunk.ids))
                ids.append(chunk.ids)
                numbers += [chunk.document] * len(chunk.ids)
                fit += [part == "fit"] * len(chunk.ids)
    ids = np.concatenate(ids)
    is_fit = np.array(fit, bool)
    count = np.bincount(ids[is_fit], minlength=ids.max(initial=0) + 1)
    kept = np.flatnonzero(count[ids] >= LEAST)
    types, token = np.unique(ids[kept], return_inverse=True)
    read = {"fit": int(is_fit.sum()), "score": int((~is_fit).sum())}
    return Texts(
        batches,
        types,
        torch.from_numpy(token),
        np.array(numbers, np.int64)[kept],
        torch.from_numpy(is_fit[kept]),
        torch.from_numpy(np.concatenate(rows)[kept]),
        kept,
        read,
    )


@torch.no_grad()
def read_codes(model, texts, sites, dtype=torch.float32):
    """{site: (N, width) float16}: the activations of these sites on the tokens of Texts.

    Those of a site that reaches beyond float16 are divided by a power of two.
    """
    device = model.tokens.weight.device
    pieces = {site.name: _HalfPieces() for site in sites}
    for _, chunks in texts.batches:
        ids = torch.zeros(len(chunks), len(chunks[0].ids), dtype=torch.int64)
        real = torch.zeros(ids.shape, dtype=torch.bool)
        for row, chunk in enumerate(chunks):
            ids[row, : len(chunk.ids)] = torch.from_numpy(chunk.ids)
            real[row, : len(chunk.ids)] = True
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            codes = model.trunk(ids.to(device))[1]
        for site in sites:
            x = codes[site.layer][real.to(device)].float()
            x = x if site.encode is None else site.encode(x).float()
            pieces[site.name].add(x)
    kept = torch.from_numpy(texts.kept)
    return {name: torch.cat(parts.pieces)[kept] for name, parts in pieces.items()}


class _HalfPieces:
    """Activations of a site, piece by piece, as float16 times 2^exponent; the scores ignore it."""

    def __init__(self):
        self.pieces, self.exponent = [], 0

    def add(self, x):
        """Add x (n, width) float32; if it is too large, all pieces are divided once more."""
        above = int(torch.frexp(x.abs().max()).exponent) - HALF_MAX - self.exponent
        if above > 0:
            self.exponent += above
            self.pieces = [piece * 2.0**-above for piece in self.pieces]
        self.pieces.append((x * 2.0**-self.exponent).half().cpu())


# ---- properties ----------------------------------------------------------------------------------


class Properties:
    """The properties that a text can score: p of the P, in `numbers`; the others are too rare.

    residual (N, p): each minus the mean of its token type.
    """

    def __init__(self, texts):
        scored = _is_frequent(texts, texts.states) & _is_frequent(texts, ~texts.states)
        residual = texts.residual(texts.states.float())
        for part in (texts.is_fit, ~texts.is_fit):  # not a function of the token
            scored &= residual[part].square().mean(0).numpy() > 1e-6
        self.numbers = np.flatnonzero(scored)
        self.residual = residual[:, self.numbers]
        power = self.residual.square()
        self.fit_power = texts.by_type(power)  # (U, p) by type
        score = ~texts.is_fit
        self.score_power = _sums(power[score], texts.token[score], len(texts.ids))


def _is_frequent(texts, holds):
    """(P,) bool: whether properties hold (N, P) on enough tokens and documents of each part."""
    frequent = np.ones(holds.shape[1], bool)
    for part in (texts.is_fit, ~texts.is_fit):
        inside = holds[part].numpy()
        _, document = np.unique(texts.document[part.numpy()], return_inverse=True)
        by_document = np.zeros((document.max(initial=-1) + 1, holds.shape[1]))
        np.add.at(by_document, document, inside)
        frequent &= by_document.sum(0) >= TOKENS_WITH
        frequent &= (by_document > 0).sum(0) >= DOCUMENTS_WITH
    return frequent


# ---- scores --------------------------------------------------------------------------------------


@dataclass
class Correlations:
    """r of h features with p properties in each part, {"fit", "score"}: (h, p), NaN if undefined.

    own: the same among tokens of the types on which a feature varies only, so that a neuron of one
    word can follow a property as well as one of all words; power is taken about 0. density: mean
    share of the fit tokens on which a feature is above 0.
    """

    r: dict
    own: dict
    density: float = 0.0


def blocks(width, n):
    """Arrays of the numbers 0 .. width - 1: columns of n tokens that fit into BLOCK_FLOATS."""
    size = max(1, BLOCK_FLOATS // n)
    return [np.arange(i, min(i + size, width)) for i in range(0, width, size)]


def correlate(texts, properties, features):
    """The Correlations of a set of features, a block of columns at a time: matrix products alone.

    features: has `width`, and `columns(numbers)` which gives (N, b) float32.
    """
    p = len(properties.numbers)
    result = Correlations({}, {})
    for part in PARTS:
        result.r[part] = np.full((features.width, p), np.nan)
        result.own[part] = np.full((features.width, p), np.nan)
    masks = {"fit": texts.is_fit, "score": ~texts.is_fit}
    powers = {"fit": properties.fit_power, "score": properties.score_power}
    for block in blocks(features.width, len(texts.token)):
        x = features.columns(block)
        result.density += float((x[texts.is_fit] > 0).float().mean(0).sum()) / features.width
        residual = texts.residual(x)
        by_type = texts.by_type(residual.square()) / texts.counts[:, None]
        varies = (by_type > SAME * x.square().mean(0)).float()  # (U, b)
        for part, mask in masks.items():
            a, q = residual[mask], properties.residual[mask]
            result.r[part][block] = _ratio(*_centred(a, q))
            power = varies.T @ powers[part]  # of each property, on the feature's own types
            scale = (a.square().sum(0)[:, None] * power).sqrt()
            result.own[part][block] = _ratio(a.T @ q, scale)
    return result


def _centred(a, q):
    """(products (b, p), scale (b, p)) of Pearson r of the columns of a (n, b) and q (n, p)."""
    a, q = a - a.mean(0), q - q.mean(0)
    return a.T @ q, (a.square().sum(0)[:, None] * q.square().sum(0)).sqrt()


def _ratio(products, scale):
    """products / scale as an array, NaN where the scale is 0."""
    return torch.where(scale > 0, products / scale, torch.nan).numpy()


def best_features(r):
    """(p,): the feature of each property with the largest r (h, p); undefined ones come last."""
    return np.where(np.isnan(r), -np.inf, r).argmax(0)


def neuron_scores(correlations):
    """(property (h,), r (h,)): of each neuron, chosen on fit documents, read on the others.

    r is `own`: among tokens of the types that the neuron fires on. NaN if undefined.
    """
    fit, score = correlations.own["fit"], correlations.own["score"]
    best = np.where(np.isnan(fit), -np.inf, fit).argmax(1)
    return best, score[np.arange(len(fit)), best]


# ---- intervals -----------------------------------------------------------------------------------


def document_moments(texts, properties, features, chosen):
    """(D, 6, p): sums by score document from which r of each property and its feature follows.

    chosen (p,): the feature of each property. Sums of 1, a, q, a^2, q^2, a q.
    """
    a = torch.empty(len(texts.token), len(chosen))
    for block in blocks(len(chosen), len(a)):
        a[:, block] = texts.residual(features.columns(chosen[block]))
    score = ~texts.is_fit
    a, q = a[score].double(), properties.residual[score].double()
    document = torch.from_numpy(texts.score_document)
    sums = torch.zeros(len(texts.score_documents), 6, len(chosen), dtype=torch.float64)
    for i, moment in enumerate((torch.ones_like(a), a, q, a * a, q * q, a * q)):
        sums[:, i].index_add_(0, document, moment)
    return sums.numpy()


def coverage_of(moments):
    """Mean r over properties of sums (..., 6, p); a feature that does not vary counts as 0."""
    n, a, q, aa, qq, aq = np.moveaxis(moments, -2, 0)
    with np.errstate(all="ignore"):
        n = np.maximum(n, 1)
        va = aa / n - (a / n) ** 2
        vq = qq / n - (q / n) ** 2
        r = (aq / n - a * q / n / n) / np.sqrt(va * vq)
        varies = (va > SAME * aa / n) & (vq > SAME * qq / n)
    return np.where(varies, r, 0).mean(-1)


def coverage_by_document(moments):
    """(D,): what each document says of the coverage, from sums (D, 6, p); see pseudo_values."""
    total = moments.sum(0)
    return pseudo_values(coverage_of(total), coverage_of(total - moments))


def pseudo_values(whole, without):
    """(D,): jackknife pseudo-values (Miller 1974), whose mean is about the statistic.

    whole: the statistic on all D documents; without (D,): on all but each of them. Redrawing the
    values stands for redrawing the documents.
    """
    n = len(without)
    return n * whole - (n - 1) * without


def interval(values, seed):
    """95 % interval [low, high] of the mean of values by document; no width for one document."""
    mean = float(np.mean(values))
    return stats.bootstrap_interval([values], seed=seed) or [mean, mean]
