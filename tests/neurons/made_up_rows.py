"""Rows of scores.jsonl for a model that does not exist."""

import numpy as np

from crate_mini.neurons.protocols import score_row


def made_up_rows(seed=0, layers=3, h=30, shift=0.0, site="L{}"):
    """Rows in which neuron 0 of a layer is dead, 1 undefined, 2 without an answer."""
    rng, rows = np.random.default_rng(seed), []
    for layer in range(layers):
        for j in range(h):
            score = (rng.normal(shift + layer), "")
            if j == 1:
                score = (float("nan"), "true activations are constant")
            answer = (None, "failed: no answer") if j == 2 else score
            row = score_row(
                site=site.format(layer),
                layer=layer,
                neuron=j,
                activity={"density": 0.005 if j % 2 else 0.2, "max": float(j > 0), "mean": 0.1},
                label={"tokens": []},
                uniform={"ngram_r": score},
                others={"openai_tar[llm:x@A]": answer} if j < 10 else {},
                ci95={"ngram_r": (score[0] - 1, score[0] + 1)},
            )
            rows.append(row)
    return rows
