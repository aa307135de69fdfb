"""Word vectors in which concepts are planted."""

import numpy as np

from crate_mini.concepts.types import Vectors


def planted(n_texts=90, d=8, d_upper=8, n_concepts=2, noise=0.1, seed=0):
    """Vectors of words that each have one concept, their spelling.

    A lower state is a large direction that all share, plus the concept's own direction, plus noise;
    the upper state is a linear map of it. Texts have 0 to 6 words; three of five are for training.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 7, n_texts)
    n_words = lengths.sum()
    concept = rng.integers(0, n_concepts, n_words)
    basis, _ = np.linalg.qr(rng.normal(size=(d, d)))
    directions = 3 * basis[0] + 2 * basis[1 + concept]
    lower = directions + noise * rng.normal(size=(n_words, d))
    return Vectors(
        lower=lower,
        upper=lower @ rng.normal(size=(d, d_upper)),
        sentence=np.repeat(np.arange(n_texts), lengths),
        word=concept,
        position=np.concatenate([np.arange(n) for n in lengths]),
        label=np.arange(n_texts) % 2,
        split=np.array([0, 0, 0, 1, 2])[np.arange(n_texts) % 5],
        vocabulary=[f"word {i}" for i in range(n_concepts)],
        classes=["no", "yes"],
        facts={"seed": seed},
    )
