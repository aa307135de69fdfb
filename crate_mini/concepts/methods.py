"""All that discovers codes among word vectors, behind one call, on the same words: `discover`.

    clvq     CLVQ-VAE, lower to upper layer (clvqvae.py)
    vq       the same on one layer, lower to lower: an ordinary VQ-VAE
    kmeans   k-means of the lower states
    ward     agglomerative clustering of a sample of them, the rest by nearest centroid (LACOAT's method)
    sae      TopK sparse autoencoder of the lower states (sae.py) with as many features as the others have
             codes; a word's code is its strongest feature

All learn from the training split alone, have the same K, and give each code one direction in the space of the
lower layer, so that removing a concept costs every method the same rank, one.
"""

import inspect
from dataclasses import fields

import numpy as np
import torch

from crate_mini import UserError
from crate_mini.cli import nearest as nearest_word
from crate_mini.concepts import clvqvae
from crate_mini.concepts.kmeans import kmeans, means, nearest, usage
from crate_mini.concepts.types import SPLITS, Codes
from crate_mini.sae import train as sae_fit
from crate_mini.sae.autoencoder import SAE


def discover(name, vectors, k, seed=0, **switches):
    """Codes of `vectors` by method `name` with k codes. switches: keywords of that method below.

    For clvq and vq they are clvqvae.Settings' fields and `direction`. Raises UserError for a method or switch
    that is not there, too few vectors, vectors that are all the same, and what a method cannot do.
    """
    if name not in METHODS:
        raise UserError(
            f"method {name!r} is unknown{nearest_word(name, METHODS)}; choose from "
            f"{', '.join(METHODS)}."
        )
    method, train = METHODS[name], vectors.lower[vectors.rows("train")]
    known = (
        [f.name for f in fields(clvqvae.Settings) if f.name != "codes"]
        if name in ("clvq", "vq")
        else []
    )
    known += [
        p.name for p in inspect.signature(method).parameters.values() if p.kind == p.KEYWORD_ONLY
    ]
    for switch in switches:
        if switch not in known:
            raise UserError(f"method {name} has no switch {switch!r}; it has {', '.join(known)}.")
    if not 1 <= k <= len(train):
        raise UserError(
            f"{k} codes cannot be made of {len(train)} training word vectors; ask for 1 to "
            f"{len(train)}, about one per 200 vectors."
        )
    if k > 1 and not (train != train[0]).any():
        raise UserError(
            f"all {len(train)} training word vectors are the same; choose another layer."
        )
    index, centroids, settings, more = method(vectors, k, seed, **switches)
    health = {
        split: usage(index[torch.from_numpy(vectors.rows(split))], centroids) for split in SPLITS
    }
    return Codes(name, seed, index.numpy(), centroids.numpy(), {**health, **more}, settings)


def by_clvq(vectors, k, seed, *, target="upper", direction="code", device="cpu", **switches):
    """CLVQ-VAE. direction: what is removed from a state h of the lower layer.

    code: the codebook's vector, as the authors do although it lies in the encoder's space, which only starts
    out as the layer's. members: the mean state of the training words of the code, which lies in the layer.
    """
    if direction not in ("code", "members"):
        raise UserError(f"direction {direction!r} is unknown; choose code or members.")
    settings = clvqvae.Settings(codes=k, target=target, **switches)
    model, history = clvqvae.fit(vectors, settings, seed, device=device)
    x = torch.from_numpy(vectors.lower)
    index = clvqvae.assign(model, x.to(device) / model.scale[0]).cpu()
    centroids = model.codebook.e.cpu() * model.scale[0]
    if direction == "members":
        train = torch.from_numpy(vectors.rows("train"))
        mean, count = means(x[train], index[train], k)
        centroids = torch.where(count[:, None] > 0, mean, centroids)
    return (
        index,
        centroids,
        {**clvqvae.describe(model), "direction": direction},
        {"epochs": history},
    )


def by_vq(vectors, k, seed, *, direction="code", device="cpu", **switches):
    """The same program on one layer: what a word's code keeps must rebuild the lower state itself."""
    return by_clvq(
        vectors,
        k,
        seed,
        **{"direction": direction, "device": device, **switches, "target": "lower"},
    )


def by_kmeans(vectors, k, seed, *, starts=3, steps=100):
    """k-means, the best of several k-means++ starts."""
    x = torch.from_numpy(vectors.lower)
    centroids, _ = kmeans(x[torch.from_numpy(vectors.rows("train"))], k, seed, starts, steps)
    return nearest(x, centroids)[0], centroids, {"starts": starts, "steps": steps}, {}


def by_ward(vectors, k, seed, *, sample=5000):
    """Ward's agglomerative clustering of `sample` training words: its memory grows with their square."""
    try:
        from sklearn.cluster import AgglomerativeClustering
    except ImportError:
        raise UserError(
            "method ward needs scikit-learn; `pip install scikit-learn`, or leave ward out."
        ) from None
    train = np.flatnonzero(vectors.rows("train"))
    rows = np.sort(np.random.default_rng(seed).permutation(train)[: max(sample, k)])
    some, x = torch.from_numpy(vectors.lower[rows]), torch.from_numpy(vectors.lower)
    index = (
        np.zeros(1, np.int64)
        if len(rows) == 1
        else AgglomerativeClustering(k, linkage="ward").fit_predict(some.numpy())
    )
    centroids, _ = means(some, torch.from_numpy(index).long(), k)
    return nearest(x, centroids)[0], centroids, {"sample": len(rows)}, {}


def by_sae(vectors, k, seed, *, active=8, steps=2000, batch=256, lr=1e-3, direction="decoder"):
    """TopK SAE with k features, `active` of them a word; the code is the strongest before the ReLU.

    direction: decoder (what the feature writes) | encoder (what it reads; the authors' later choice).
    health's "silent" is the share of test words at which no feature is above 0: what the bias stands for
    has a code of its own with other methods, but not here.
    """
    if direction not in ("decoder", "encoder"):
        raise UserError(f"direction {direction!r} is unknown; choose decoder or encoder.")
    if not 1 <= active or not 1 <= steps or not 1 <= batch:
        raise UserError(f"active {active}, steps {steps} and batch {batch} must be at least 1.")
    x = torch.from_numpy(vectors.lower)
    train = x[torch.from_numpy(vectors.rows("train"))]
    draw = torch.Generator().manual_seed(seed)

    def batches():
        while True:
            yield from train[torch.randperm(len(train), generator=draw)].split(batch)

    sae = SAE(x.shape[1], k, k=min(active, k), seed=seed)
    renewed = sae_fit.fit([sae], batches(), steps, lr, seed)[0]
    sae.requires_grad_(False)
    index = torch.cat([((rows - sae.b) @ sae.E + sae.c).argmax(1) for rows in x.split(4096)])
    met, silent = sae_fit.Agreement(), 0
    for rows in x[torch.from_numpy(vectors.rows("test"))].split(4096):
        f = sae.encode(rows)
        met.add(rows, sae.decode(f))
        silent += int((f == 0).all(1).sum())
    settings = {"active": sae.k, "steps": steps, "batch": batch, "lr": lr, "direction": direction}
    more = {
        "renewed": renewed,
        "explained_lower": met.explained_variance() if met.n else None,
        "silent": silent / met.n if met.n else None,
    }
    return index, sae.W if direction == "decoder" else sae.E.T, settings, more


METHODS = {"clvq": by_clvq, "vq": by_vq, "kmeans": by_kmeans, "ward": by_ward, "sae": by_sae}
