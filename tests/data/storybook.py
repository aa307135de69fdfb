"""Texts that differ, as corpora on disk, and what is read of them again."""

from pathlib import Path

import numpy as np
import pytest

from crate_mini.data import token_files as prepare
from crate_mini.data.batches import load_tokenizer
from crate_mini.data.formats import END

BYTES = load_tokenizer("bytes")


def stories(count: int, words: int = 20) -> list[str]:
    """Different texts, some with bytes beyond ASCII."""
    return [
        f"Story {i}: " + " ".join(f"wörd{i * k % 97}" for k in range(words)) for i in range(count)
    ]


def write(folder: Path, texts: list[str], name: str = "corpus.txt") -> str:
    (folder / name).write_text(END.join(texts), encoding="utf-8")
    return str(folder / name)


def quiet(line):
    pass


def stream(corpus, split: str) -> np.ndarray:
    """All tokens of a split by way of blocks(): first token, then every target."""
    blocks = list(corpus.blocks(split, 3, 17))
    return np.concatenate([blocks[0][0][0, :1].numpy()] + [y.flatten().numpy() for _, y in blocks])


def pieces(corpus, split: str, tok=BYTES) -> list[str]:
    """The documents of a split, decoded again."""
    whole = tok.decode(stream(corpus, split).tolist()) if corpus.n_tokens[split] else ""
    return whole.split(END)[:-1]


def folder_bytes(cache: Path) -> dict:
    """What lies in a cache, the lock aside."""
    return {
        path.relative_to(cache): path.read_bytes()
        for path in sorted(cache.rglob("*"))
        if path.is_file() and path.suffix
    }


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(prepare, "PART", 3000)
    monkeypatch.setattr(prepare, "BATCH", 1000)
