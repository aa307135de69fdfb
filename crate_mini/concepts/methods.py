"""Every method that discovers codes among word vectors, behind one call: `discover`.

    clvq     CLVQ-VAE from the lower to the upper layer (clvqvae.py)
    vq       the same program on the lower layer alone: an ordinary VQ-VAE
    kmeans   k-means of the lower states
    ward     agglomerative clustering of a sample of them; other words go to the nearest centroid
             (LACOAT's method)
    sae      TopK sparse autoencoder of the lower states with K features; a word's code is the
             strongest one

All learn from the training split alone, have the same K, and give each code one direction in the
space of the lower layer, so that removing a concept costs every method the same: rank one. All give
a word one code, and so the autoencoder has one active feature unless it is asked for more: features
that share a word each hold a part of its concept, and the strongest of them is no cluster.
"""

import inspect
from dataclasses import fields

import numpy as np
import torch

from crate_mini import UserError, cli
from crate_mini.concepts import clvqvae
from crate_mini.concepts.codebook_checks import agreement_on_test
from crate_mini.concepts.kmeans import kmeans, means, nearest, usage
from crate_mini.concepts.types import SPLITS, Codes
from crate_mini.sae import train as sae_train
from crate_mini.sae.autoencoder import SAE
from crate_mini.sae.evaluate import ReconstructionQuality

CHUNK = 4096  # words whose SAE features are held at a time


def discover(name, vectors, k, seed=0, **switches):
    """k Codes of `vectors` by the method `name`.

    switches: keywords of that method below; for clvq and vq also the fields of clvqvae.Settings.
    Raises UserError for an unknown method or switch, for fewer training words than codes, for
    vectors that are all equal, and for what the method itself refuses.
    """
    if name not in METHODS:
        raise UserError(
            f"method {name!r} is unknown{cli.nearest(name, METHODS)}; choose {cli.one_of(METHODS)}."
        )
    known = known_switches(name)
    for switch in switches:
        if switch not in known:
            raise UserError(f"method {name} has no switch {switch!r}; it has {', '.join(known)}.")
    train = vectors.lower[vectors.rows("train")]
    if not 1 <= k <= len(train):
        raise UserError(
            f"{k} codes cannot be made of {len(train)} training word vectors; ask for 1 to "
            f"{len(train)}, about one per 200 vectors."
        )
    if k > 1 and not (train != train[0]).any():
        raise UserError(
            f"all {len(train)} training word vectors are the same; choose another layer."
        )
    index, centroids, settings, more_health = METHODS[name](vectors, k, seed, **switches)
    health = {}
    for split in SPLITS:
        health[split] = usage(index[torch.from_numpy(vectors.rows(split))], centroids)
    health |= more_health
    return Codes(name, seed, index.numpy(), centroids.numpy(), health, settings)


def known_switches(name):
    """Names of the keywords that `discover` takes for a method."""
    names = []
    if name in ("clvq", "vq"):
        names += [f.name for f in fields(clvqvae.Settings) if f.name != "codes"]
    for parameter in inspect.signature(METHODS[name]).parameters.values():
        if parameter.kind == parameter.KEYWORD_ONLY:
            names.append(parameter.name)
    return list(dict.fromkeys(names))  # `target` is in both


# ---- methods: (codes (N,), centroids (K, d), settings, more facts for Codes.health) --------------


def by_clvq(vectors, k, seed, *, target="upper", direction="code", device="cpu", **switches):
    """CLVQ-VAE. direction: what is removed from a state h of the lower layer.

    code: the codebook's vector. The authors remove this one, although it lies in the encoder's
    space, which only starts out as the layer's. members: the mean state of the code's training
    words, which lies in the layer.

    "ami_start" in health: agreement, over the test words, with the clusters that training started
    from (spherical k-means); 1 if training moved no word.
    """
    if direction not in ("code", "members"):
        raise UserError(f"direction {direction!r} is unknown; choose code or members.")
    settings = clvqvae.Settings(codes=k, target=target, **switches)
    model, history = clvqvae.fit(vectors, settings, seed, device=device)
    x = torch.from_numpy(vectors.lower)
    scaled = x.to(device) / model.scale[0]
    index = clvqvae.assign(model, scaled).cpu()
    centroids = model.codebook.e.cpu() * model.scale[0]
    if direction == "members":
        train = torch.from_numpy(vectors.rows("train"))
        mean, count = means(x[train], index[train], k)
        centroids = torch.where(count[:, None] > 0, mean, centroids)
    described = {**clvqvae.describe(model), "direction": direction}
    start = clvqvae.assign_at_start(model, scaled).cpu()
    agreement = agreement_on_test(vectors, index.numpy(), start.numpy())
    return index, centroids, described, {"epochs": history, "ami_start": agreement}


def by_vq(vectors, k, seed, *, direction="code", device="cpu", **switches):
    """CLVQ-VAE on one layer: a word's code must reconstruct the lower state itself."""
    switches |= {"target": "lower"}
    return by_clvq(vectors, k, seed, direction=direction, device=device, **switches)


def by_kmeans(vectors, k, seed, *, starts=3, steps=100):
    """k-means, the best of several k-means++ starts."""
    x = torch.from_numpy(vectors.lower)
    train = x[torch.from_numpy(vectors.rows("train"))]
    centroids, _ = kmeans(train, k, seed, starts, steps)
    index, _ = nearest(x, centroids)
    return index, centroids, {"starts": starts, "steps": steps}, {}


def by_ward(vectors, k, seed, *, sample=5000):
    """Ward's clustering of `sample` training words, because its memory grows with their square."""
    try:
        from sklearn.cluster import AgglomerativeClustering
    except ImportError:
        raise UserError(
            "method ward needs scikit-learn; `pip install scikit-learn`, or leave ward out."
        ) from None
    train = np.flatnonzero(vectors.rows("train"))
    shuffled = np.random.default_rng(seed).permutation(train)
    rows = np.sort(shuffled[: max(sample, k)])
    sampled = vectors.lower[rows]
    if len(rows) == 1:  # scikit-learn wants two
        clusters = np.zeros(1, np.int64)
    else:
        clusters = AgglomerativeClustering(k, linkage="ward").fit_predict(sampled)
    centroids, _ = means(torch.from_numpy(sampled), torch.from_numpy(clusters).long(), k)
    index, _ = nearest(torch.from_numpy(vectors.lower), centroids)
    return index, centroids, {"sample": len(rows)}, {}


def by_sae(vectors, k, seed, *, active=1, steps=2000, batch=256, lr=1e-3, direction="decoder"):
    """TopK SAE with k features, `active` per word; the code is the strongest before the ReLU.

    direction: decoder, what the feature writes, or encoder, what it reads (the authors' later
    choice). "silent" in health is the share of test words at which no feature is above 0: the
    bias stands for them, where another method would have a code.
    """
    if direction not in ("decoder", "encoder"):
        raise UserError(f"direction {direction!r} is unknown; choose decoder or encoder.")
    if min(active, steps, batch) < 1:
        raise UserError(f"active {active}, steps {steps} and batch {batch} must be at least 1.")
    if active > k:
        raise UserError(f"active {active} is more than the {k} features of the SAE; give 1 to {k}.")
    x = torch.from_numpy(vectors.lower)
    train = x[torch.from_numpy(vectors.rows("train"))]
    sae = SAE(x.shape[1], k, k=active, seed=seed)
    renewed = sae_train.fit([sae], shuffled_batches(train, batch, seed), steps, lr, seed)[0]
    sae.requires_grad_(False)
    index = torch.cat([((rows - sae.b) @ sae.E + sae.c).argmax(1) for rows in x.split(CHUNK)])
    settings = {"active": active, "steps": steps, "batch": batch, "lr": lr, "direction": direction}
    test = x[torch.from_numpy(vectors.rows("test"))]
    health = {"renewed": renewed, **check_sae(sae, test)}
    return index, sae.W if direction == "decoder" else sae.E.T, settings, health


def shuffled_batches(rows, size, seed):
    """Endless batches of rows, in a new order each time all have been seen."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from rows[torch.randperm(len(rows), generator=generator)].split(size)


def check_sae(sae, x):
    """How well an SAE reconstructs words x (n, d); both numbers are None without words.

    explained_lower: share of their variance. silent: share of words without an active feature.
    """
    if not len(x):
        return {"explained_lower": None, "silent": None}
    quality, silent = ReconstructionQuality(), 0
    for rows in x.split(CHUNK):
        f = sae.encode(rows)
        quality.add(rows, sae.decode(f))
        silent += int((f == 0).all(1).sum())
    return {"explained_lower": quality.explained_variance(), "silent": silent / len(x)}


METHODS = {"clvq": by_clvq, "vq": by_vq, "kmeans": by_kmeans, "ward": by_ward, "sae": by_sae}
