"""Sets of features to score next to the neurons of a site: its controls.

rotation        a random rotation of the codes, each direction cut to the density of a neuron: the
                same information in the same number of features, in no basis of the model's own
pca             principal components of the codes, oriented to their long tail, cut likewise
token table     each neuron's mean on the token: nothing but the token
shuffled        each neuron's activation at another token of the same type: no context
untrained, sae  another model's codes, an autoencoder's features: as they are

A set has `width` and `columns(numbers)`, (N, b) float32, for the N tokens of Texts.
"""

import numpy as np
import torch

ROWS = 1 << 15  # tokens whose codes are float32 at a time


class Features:
    """Activations as they are; acts (N, h) float16."""

    def __init__(self, acts):
        self.acts = acts
        self.width = acts.shape[1]

    def columns(self, numbers):
        return self.acts[:, torch.from_numpy(np.asarray(numbers))].float()


class Directions:
    """The codes along h directions, cut: relu(x R - threshold), which fires on a share of tokens.

    acts (N, h); directions (h, h), a column each; density (h,): the share of the fit tokens
    on which each fires; is_fit (N,).
    """

    def __init__(self, acts, directions, density, is_fit):
        self.acts = acts
        self.directions = directions
        self.density = density
        self.is_fit = is_fit
        self.width = directions.shape[1]
        self.thresholds = {}

    def columns(self, numbers):
        x = project(self.acts, self.directions[:, torch.from_numpy(np.asarray(numbers))])
        limits = [self._threshold(number, x[:, i]) for i, number in enumerate(numbers)]
        return torch.relu(x - torch.tensor(limits))

    def _threshold(self, number, x):
        number = int(number)
        if number not in self.thresholds:
            values = x[self.is_fit]
            above = round(float(self.density[number]) * len(values))
            rank = min(max(1, len(values) - above), len(values))
            self.thresholds[number] = float(values.kthvalue(rank).values)
        return self.thresholds[number]


class Encoded:
    """The features of an autoencoder of codes (N, h), a block of them at a time."""

    @torch.no_grad()
    def __init__(self, acts, sae):
        self.acts, self.sae = acts, sae
        self.width = len(sae.W)
        self.least = torch.zeros(len(acts), 1)  # of the k that fire on a token, the smallest
        if sae.k:
            least = [sae.encode(x.float()).topk(sae.k).values[:, -1:] for x in acts.split(ROWS)]
            self.least = torch.cat(least)

    @torch.no_grad()
    def columns(self, numbers):
        numbers = torch.from_numpy(np.asarray(numbers))
        shift = self.sae.c[numbers] - self.sae.b @ self.sae.E[:, numbers]
        f = torch.relu(project(self.acts, self.sae.E[:, numbers]) + shift)
        return f * (f >= self.least - 1e-4 * self.least)  # rounding must not drop the smallest


class TokenMeans:
    """Each neuron's mean on its token in the fit documents."""

    def __init__(self, acts, texts):
        self.acts = Features(acts)
        self.texts = texts
        self.width = self.acts.width

    def columns(self, numbers):
        x = self.acts.columns(numbers)
        means = self.texts.by_type(x) / self.texts.counts[:, None]
        return means[self.texts.token]


def density(acts):
    """(h,): the share of tokens on which each feature is above 0; acts (n, h)."""
    above = sum((rows > 0).sum(0) for rows in acts.split(ROWS))
    return above.numpy() / max(len(acts), 1)


def cut(acts, is_fit, share):
    """acts (N, h), 0 where a feature is not among its strongest `share` of the fit tokens."""
    limits = torch.zeros(acts.shape[1])
    for j in range(acts.shape[1]):
        values = acts[is_fit, j].float()
        rank = min(max(1, len(values) - round(share * len(values))), len(values))
        limits[j] = values.kthvalue(rank).values.clamp(min=0)
    return torch.where(acts > limits.half(), acts, 0)


def project(acts, directions):
    """(N, b) float32: codes (N, h) along directions (h, b)."""
    return torch.cat([rows.float() @ directions for rows in acts.split(ROWS)])


def rotation(acts, density, is_fit, rng):
    """Directions: a random rotation; density (h,), dealt to the directions at random."""
    h = acts.shape[1]
    gaussian = torch.from_numpy(rng.standard_normal((h, h))).float()
    q, r = torch.linalg.qr(gaussian)
    directions = q * r.diagonal().sign()  # uniform over rotations and reflections
    return Directions(acts, directions, _dealt(density, h, rng), is_fit)


def principal_components(acts, density, is_fit, rng):
    """Directions: principal components of the fit part, each with its longer tail upwards."""
    h = acts.shape[1]
    fit = acts[is_fit]
    mean = torch.stack([piece.float().sum(0) for piece in fit.split(ROWS)]).sum(0) / len(fit)
    covariance = torch.zeros(h, h)
    for piece in fit.split(ROWS):
        x = piece.float() - mean
        covariance += x.T @ x / len(fit)
    directions = torch.linalg.eigh(covariance).eigenvectors.flip(1)
    skew = torch.zeros(h)
    for piece in fit.split(ROWS):
        skew += ((piece.float() - mean) @ directions).pow(3).sum(0)
    directions = directions * torch.where(skew < 0, -1.0, 1.0)
    return Directions(acts, directions, _dealt(density, acts.shape[1], rng), is_fit)


def _dealt(density, h, rng):
    """(h,) densities drawn from those given; all of them, in another order, if there are h."""
    if len(density) == h:
        return rng.permutation(density)
    return rng.choice(density, h)


def shuffled(acts, texts, rng):
    """Features: in each part, activations dealt anew among the tokens of one type."""
    order = np.arange(len(acts))
    for part in (texts.is_fit, ~texts.is_fit):
        rows = np.flatnonzero(part.numpy())
        token = texts.token[part].numpy()
        by_token = rows[np.argsort(token, kind="stable")]
        random = rng.permutation(len(rows))
        dealt = rows[random][np.argsort(token[random], kind="stable")]
        order[by_token] = dealt
    return Features(acts[torch.from_numpy(order)])
