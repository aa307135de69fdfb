"""What tests of sparse autoencoders share: a text, a model, an autoencoder that changes nothing."""

import torch

from crate_mini.model import LM, preset
from crate_mini.sae.autoencoder import SAE

TEXT = " ".join(f"{'abc'[i % 3]}{i * i % 97} sparse{i % 7} code." for i in range(3000))


def tiny(kind="crate", seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LM(preset("2L", kind, vocab_size=320, block_size=64, n_embd=32)).eval()


def identity(h):
    """An autoencoder that gives non-negative codes back exactly."""
    one = SAE(h, h).requires_grad_(False)
    one.W.copy_(torch.eye(h))
    one.E.copy_(torch.eye(h))
    return one
