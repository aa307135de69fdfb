"""Which neurons of a layer resemble one another: in what they write, and in when they fire."""

import numpy as np

BLOCK = 1024  # neurons compared with all others at a time


def atoms(model, layer):
    """(d, h): what one unit of each neuron of a layer writes to the stream."""
    sparsifier = model.blocks[layer].sparsifier
    if hasattr(sparsifier, "proj"):
        return sparsifier.proj.weight
    return sparsifier.D if sparsifier.decoder is None else sparsifier.decoder


def most_similar(columns, neurons, most=3):
    """For each of `neurons`, up to `most` [other, cosine] of columns (n, width) like its own.

    The largest first, only above 0, never the neuron itself. A column of zeros resembles nothing.
    """
    columns = np.asarray(columns, np.float32)
    largest = np.abs(columns).max(0, initial=0)  # first, so that no square overflows or vanishes
    columns = columns / np.where(largest > 0, largest, 1)
    norms = np.linalg.norm(columns, axis=0)
    unit = columns / np.where(norms > 0, norms, 1)
    similar = []
    for block in np.split(neurons, range(BLOCK, len(neurons), BLOCK)):
        cosines = unit[:, block].T @ unit  # (block, width)
        cosines[np.arange(len(block)), block] = -1
        best = np.argsort(-cosines, axis=1, kind="stable")[:, :most]
        for row, others in zip(cosines, best):
            similar.append([[int(i), round(float(row[i]), 3)] for i in others if row[i] > 0])
    return similar


def relatives(model, site, acts, neurons, direction=None):
    """{"atoms": .., "together": ..} for each of `neurons` of a site, lists of [other, similarity].

    atoms: cosine of what both write to the stream; together: Pearson r of their activations, acts
    (W, w, width) over uniform windows. A constant neuron has no r. direction (width, h): what each
    feature of an autoencoder adds to the codes.
    """
    written = atoms(model, site.layer).detach().float()
    if direction is not None:
        written = written @ direction.detach().float().T
    x = acts.reshape(-1, acts.shape[-1]).astype(np.float32)
    # A mean in float32 would be off by more than the tolerance for constants below.
    x -= x.mean(0, dtype=np.float64)
    spread = np.abs(x).max(0, initial=0)
    x[:, spread < 1e-6 * np.abs(acts).max((0, 1), initial=0)] = 0  # a constant, up to rounding
    by_atoms = most_similar(written.cpu().numpy(), neurons)
    by_acts = most_similar(x, neurons)
    return [{"atoms": near, "together": same} for near, same in zip(by_atoms, by_acts)]
