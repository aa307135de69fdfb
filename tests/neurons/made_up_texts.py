"""Texts of random tokens with random properties, for tests of scores beyond the token."""

import numpy as np
import torch

from crate_mini.neurons.beyond_token import Texts


def made_up_texts(documents=40, length=200, types=12, properties=4, seed=0):
    """Texts whose properties depend on the token and on what changes within a document.

    Half of the documents are of the fit part; each property holds in stretches of a document, and
    more often on tokens of high ids.
    """
    rng = np.random.default_rng(seed)
    n = documents * length
    token = rng.integers(types, size=n)
    document = np.repeat(np.arange(documents), length)
    level = rng.normal(size=(documents, properties))[document]
    stretch = np.repeat(rng.normal(size=(n // 20 + 1, properties)), 20, 0)[:n]
    states = level + stretch + token[:, None] / types > 0.5
    return Texts(
        [],
        np.arange(types),
        torch.from_numpy(token),
        document,
        torch.from_numpy(document % 2 == 0),
        torch.from_numpy(states),
        np.arange(n),
        {"fit": n // 2, "score": n - n // 2},
    )
