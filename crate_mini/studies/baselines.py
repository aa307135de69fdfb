"""What a language model has to beat: gzip, and Kneser-Ney trigrams of bytes and of tokens."""

import gzip

import numpy as np
import torch

from crate_mini.data.batches import open_corpus
from crate_mini.data.tokenizer import load_tokenizer
from crate_mini.training.trigram import trigram_bits


def baselines(source="pydocs", spec="pydocs:4095"):
    """Bits per byte of the held-out text by gzip -9, and by trigrams of the training text."""
    tokenizer = load_tokenizer(spec)
    corpus = open_corpus(source, tokenizer, log=quiet)
    ids = {split: all_ids(corpus, split) for split in ("train", "val")}
    text, letters = {}, {}
    for split, row in ids.items():
        words = (tokenizer.token_bytes(int(i)) for i in row if i != tokenizer.eot)
        text[split] = b"".join(words)
        letters[split] = np.frombuffer(text[split], np.uint8)
    by_byte = trigram_bits(letters["train"], letters["val"], 256)
    by_token = trigram_bits(ids["train"], ids["val"], tokenizer.vocab_size)
    return {
        "gzip -9": 8 * len(gzip.compress(text["val"], 9)) / len(text["val"]),
        "trigram of bytes (Kneser-Ney)": by_byte,
        "trigram of the same tokens (Kneser-Ney)": by_token
        * (len(ids["val"]) / corpus.n_bytes["val"]),
    }


def quiet(*words):
    """Print nothing: the `log` of what need not be seen."""


def all_ids(corpus, split):
    """The ids of a split as one array."""
    blocks = list(corpus.blocks(split, 64, 1024))
    first = blocks[0][0].flatten()[:1]
    return torch.cat([first, *(y.flatten() for _, y in blocks)]).numpy()
