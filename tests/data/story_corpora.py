"""Corpora of short distinct stories on disk, and ways to read their tokens back."""

from pathlib import Path

import numpy as np
import pytest

from crate_mini.data import token_files
from crate_mini.data.formats import END
from crate_mini.data.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")


def stories(count: int, words: int = 20) -> list[str]:
    """Distinct texts, with characters beyond ASCII."""
    texts = []
    for i in range(count):
        story = " ".join(f"wörd{i * k % 97}" for k in range(words))
        texts.append(f"Story {i}: {story}")
    return texts


def write(folder: Path, texts: list[str], name: str = "corpus.txt") -> str:
    """Write texts as the documents of one file; returns its path."""
    path = folder / name
    path.write_text(END.join(texts), encoding="utf-8")
    return str(path)


def quiet(line):
    """A log that shows nothing."""


def stream(corpus, split: str) -> np.ndarray:
    """All tokens of a split by way of blocks(): the first token, then every target."""
    blocks = list(corpus.blocks(split, 3, 17))
    first_token = blocks[0][0][0, :1].numpy()
    return np.concatenate([first_token] + [y.flatten().numpy() for _, y in blocks])


def decoded(corpus, split: str, tokenizer=BYTES) -> list[str]:
    """The documents of a split as text."""
    if not corpus.n_tokens[split]:
        return []
    return tokenizer.decode(stream(corpus, split).tolist()).split(END)[:-1]


def folder_bytes(cache: Path) -> dict:
    """{path: content} of the files in a cache, without the locks."""
    files = [path for path in sorted(cache.rglob("*")) if path.is_file() and path.suffix]
    return {path.relative_to(cache): path.read_bytes() for path in files}


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of 3,000 tokens, so that a small corpus has several."""
    monkeypatch.setattr(token_files, "PART", 3000)
    monkeypatch.setattr(token_files, "BATCH", 1000)
