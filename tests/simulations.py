"""True codes, noisy simulations of them, and their ranks by definition: what scores are tested on."""

import numpy as np
from hypothesis import strategies as st

SEEDS = st.integers(0, 2**32 - 1)


def pair(seed, n=60, h=3, sparse=True, noise=0.5):
    """True codes, mostly zero, and a noisy simulation of them, both (n, h)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, h))
    x = np.maximum(x - 0.8, 0) if sparse else x
    x[0] += 1  # never constant
    return x, x + noise * rng.normal(size=(n, h))


def plain_ranks(values):
    """Average ranks by definition: 1 + how many are smaller + half of how many others are equal."""
    return np.array(
        [1 + sum(b < a for b in values) + (sum(b == a for b in values) - 1) / 2 for a in values]
    )
