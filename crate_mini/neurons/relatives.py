"""Which neurons of a layer resemble one another: in what they write, and in when they fire."""

import numpy as np

from crate_mini.intervene import atoms

BLOCK = 1024  # neurons compared with all others at a time


def alike(columns, neurons, most=3):
    """For each of `neurons` up to `most` [other, cosine] of the columns (n, width) most like its own.

    The largest first; only cosines above 0, never the neuron itself. A column of zeros is like nothing.
    """
    columns = np.asarray(columns, np.float32)
    length = np.linalg.norm(columns, axis=0)
    unit, found = columns / np.where(length > 0, length, 1), []
    for some in np.split(neurons, range(BLOCK, len(neurons), BLOCK)):
        cosine = unit[:, some].T @ unit
        cosine[np.arange(len(some)), some] = -1
        best = np.argsort(-cosine, axis=1, kind="stable")[:, :most]
        found += [
            [[int(i), round(float(row[i]), 3)] for i in top if row[i] > 0]
            for row, top in zip(cosine, best)
        ]
    return found


def relatives(model, site, acts, neurons, direction=None):
    """For each of `neurons` {"atoms": [[other, cosine of what both write to the stream], ...], "together":
    [[other, Pearson r of their activations], ...]}.

    acts (W, w, width): over windows drawn uniformly; a constant neuron has no r. direction (width, codes): of
    an autoencoder's features, what each adds to the codes.
    """
    written = atoms(model, site.layer).detach().float()
    if direction is not None:
        written = written @ direction.detach().float().T
    x = acts.reshape(-1, acts.shape[-1]).astype(np.float32)
    x -= x.mean(
        0, dtype=np.float64
    )  # in float32 it is off by more than the constants below may vary
    x[:, np.abs(x).max(0, initial=0) < 1e-6] = 0  # a constant, but for rounding
    pairs = zip(alike(written.cpu().numpy(), neurons), alike(x, neurons))
    return [{"atoms": near, "together": same} for near, same in pairs]
