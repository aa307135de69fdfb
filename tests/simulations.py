"""True activations, noisy simulations of them, and their ranks by definition."""

import numpy as np
from hypothesis import strategies as st

SEEDS = st.integers(0, 2**32 - 1)


def pair(seed, n=60, h=3, sparse=True, noise=0.5):
    """True activations, mostly zero if sparse, and a noisy simulation of them, both (n, h)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, h))
    if sparse:
        x = np.maximum(x - 0.8, 0)
    x[0] += 1  # never constant
    return x, x + noise * rng.normal(size=(n, h))


def plain_ranks(values):
    """Average ranks by definition: 1 + the number of smaller values + half of the other equals."""
    values = np.asarray(values)
    ranks = []
    for value in values:
        smaller = (values < value).sum()
        equal = (values == value).sum() - 1
        ranks.append(1 + smaller + equal / 2)
    return np.array(ranks)
