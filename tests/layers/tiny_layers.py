"""Tiny models of every kind and inputs for them."""

import torch

from crate_mini import model
from crate_mini.training import checkpoint

KINDS = {  # name: what makes a model of this kind from the paper's
    "crate": {},
    "gpt2": model.KINDS["gpt2"],
    "crate+": {**model.KINDS["crate+"], "query_rank": 3},
    "mssa-mlp": {"sparsifier": "mlp", "residual": True},
    "mhsa-ista": {"attention": "mhsa"},
    "gelu": {**model.KINDS["gpt2"], "bias": True, "activation": "gelu"},
    "top-k": {"top_k": 3, "debias": True},
    "twin, top-k": {**model.KINDS["gpt2"], "top_k": 3},
    "variants": {"unit_norm": True, "learned_lam": True, "ista_steps": 3, "expansion": 1},
}
V = 64  # vocabulary
T = 16  # context
D = 12  # width
H = 4 * D  # codes of a layer
K = 2  # heads


def tiny(seed=0, **changes):
    """An untrained LM of two layers in eval mode."""
    size = dict(vocab_size=V, block_size=T, n_layer=2, n_head=K, n_embd=D)
    return checkpoint.untrained(model.Config(**{**size, **changes}), seed)


def token_ids(seed=0, rows=3):
    """Random ids (rows, T)."""
    return torch.randint(V, (rows, T), generator=torch.Generator().manual_seed(seed))


def gaussian(*shape, seed=0):
    """A normal random tensor in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
