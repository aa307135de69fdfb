"""A text, a small model and an autoencoder that changes nothing, for tests of autoencoders."""

import torch

from crate_mini.data.batches import open_corpus
from crate_mini.data.tokenizer import load_tokenizer
from crate_mini.model import LM, preset
from crate_mini.sae.autoencoder import SAE

WORDS = [f"{'abc'[i % 3]}{i * i % 97} sparse{i % 7} code." for i in range(3000)]
TEXT = " ".join(WORDS)
H = 128  # codes of a layer of tiny_model


def quiet(line):
    """A log that shows nothing."""


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def small_corpus(folder):
    """The corpus of TEXT as bytes, with its cache in the same folder."""
    (folder / "text.txt").write_text(TEXT)
    tokenizer = load_tokenizer("bytes")
    return open_corpus(str(folder / "text.txt"), tokenizer, folder / "cache", log=quiet)


def tiny_model(kind="crate", seed=0):
    """An untrained two-layer LM in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LM(preset("2L", kind, vocab_size=320, block_size=64, n_embd=32)).eval()


def identity(h):
    """An autoencoder that returns non-negative codes unchanged."""
    sae = SAE(h, h).requires_grad_(False)
    sae.W.copy_(torch.eye(h))
    sae.E.copy_(torch.eye(h))
    return sae
