"""Tokenizers: byte-level BPEs in tiktoken's format; pydocs.tiktoken is the embedded one."""

import base64
import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken

from crate_mini import UserError
from crate_mini.console.results import atomic_write, read_bytes
from crate_mini.data.formats import END, extra
from crate_mini.data.sources import documents, is_held_out

LARGEST_FILE = 1 << 26  # bytes of a file of ranks; that of 200,000 tokens has 4 MB
MARKS = {"\n": "↵", "\t": "⇥", "\r": "␍"}  # how visible() shows white space

# GPT-2's split pattern in tiktoken's spelling (possessive: no backtracking on long runs). The
# embedded vocabulary uses it too: words carry their leading space; letters, digits and signs stay
# apart.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


class Tokenizer:
    """A byte-level BPE. ranks: {bytes of a token: its id}; <|endoftext|> gets the next id.

    name; eot, the id of <|endoftext|>; vocab_size, including eot; dtype, the smallest that holds
    all ids; hash, of everything that decides how text becomes ids (the name does not).
    """

    def __init__(self, name: str, ranks: dict[bytes, int]):
        self.name = name
        self.eot = len(ranks)
        self.vocab_size = len(ranks) + 1
        self.dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        self._tokens = [*sorted(ranks, key=ranks.get), END.encode()]
        listing = b"".join(len(token).to_bytes(4, "little") + token for token in self._tokens)
        self.hash = hashlib.sha256(PATTERN.encode() + listing).hexdigest()
        # tiktoken does not know eot, so no text can spell it.
        self._bpe = tiktoken.Encoding(
            name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, never eot: a mark inside a text is encoded like any other characters."""
        return self._bpe.encode_ordinary(text)

    def encode_batch(self, texts: list[str], workers: int | None = None) -> list[np.ndarray]:
        """Ids of each text, in parallel threads: tiktoken releases the interpreter lock."""
        workers = workers or os.cpu_count() or 1
        stride = 4 * workers  # few large tasks: one per short text would cost more than the text

        def encode(first):
            group = texts[first::stride]
            return [self._bpe.encode_to_numpy(text).astype(self.dtype) for text in group]

        ids = [None] * len(texts)
        with ThreadPoolExecutor(workers) as pool:
            for first, group in enumerate(pool.map(encode, range(stride))):
                ids[first::stride] = group
        return ids

    def decode(self, ids) -> str:
        """Text of `ids`; bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token. Raises UserError outside 0 .. vocab_size - 1."""
        if not 0 <= id < self.vocab_size:
            raise UserError(
                f"Tokenizer {self.name} has no id {id}: its ids are 0 to {self.vocab_size - 1}."
            )
        return self._tokens[id]


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that `spec` names.

    pydocs  embedded: 8,191 ranks and eot, 8,192 ids (a multiple of 64 suits matrix products), made
            by `python -c "from crate_mini.data.tokenizer import train_bpe;
            train_bpe('pydocs', 8191, 'pydocs.tiktoken')"`
    gpt2    tiktoken's, downloaded once
    bytes   256 ids and eot: a BPE without merges
    PATH    a file of ranks in tiktoken's format: on each line a token in base64, a space, its rank

    Any of them may end in :N, which keeps the first N ranks: the first merges of a BPE are
    themselves a BPE. Raises UserError for an unknown name and for a malformed file.
    """
    name, keep = _split_spec(spec)
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
    elif name == "gpt2":
        ranks = _gpt2_ranks()
    elif name == "pydocs":
        ranks = _read_ranks(Path(__file__).with_name("pydocs.tiktoken"))
    else:
        ranks = _read_ranks(Path(name))
    label = Path(name).stem
    if keep is not None:
        if not 256 <= keep <= len(ranks):
            raise UserError(
                f"Tokenizer {spec!r}: {name} has {len(ranks)} ranks, keep at least 256 of them."
            )
        ranks = {token: rank for token, rank in ranks.items() if rank < keep}
        label = f"{label}:{keep}"
    if not all(bytes([i]) in ranks for i in range(256)):
        raise UserError(
            f"Tokenizer {spec!r} lacks some of the 256 bytes, so it cannot encode every text."
        )
    return Tokenizer(label, ranks)


def _split_spec(spec: str) -> tuple[str, int | None]:
    """("pydocs", 4095) for "pydocs:4095"; (spec, None) where no number of ranks is given."""
    name, _, keep = spec.rpartition(":")
    if name and keep.isdecimal() and len(keep) < 12:
        return name, int(keep)
    return spec, None


def _read_ranks(path: Path) -> dict[bytes, int]:
    """{token: rank} of a file. tiktoken's own reader caches by path and misses changes."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(
                f"Tokenizer {str(path)!r} is not a file; save its ranks to one, like "
                "ranks.tiktoken, and give that."
            )
        if path.stat().st_size > LARGEST_FILE:
            raise UserError(
                f"{path} is not a ranks file: it has {path.stat().st_size:,} bytes, the largest "
                f"vocabularies less than {LARGEST_FILE:,}."
            )
        lines = [line.split() for line in read_bytes(path).splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except OSError as error:
        raise UserError(
            f"No tokenizer {str(path)!r} ({error.strerror}): expected pydocs, gpt2, bytes or the "
            "path of a ranks file."
        ) from None
    except ValueError:
        raise UserError(
            f"{path} is not a ranks file: expected lines of base64 token, space, rank."
        ) from None
    if sorted(ranks.values()) != list(range(len(lines))) or b"" in ranks:
        raise UserError(
            f"{path} is not a ranks file: its ranks are not 0, 1, 2, ... for as many tokens."
        )
    return ranks


def _gpt2_ranks() -> dict[bytes, int]:
    """{token: rank} of GPT-2, downloaded by tiktoken. Raises UserError without a network."""
    try:
        from tiktoken_ext.openai_public import gpt2

        return gpt2()["mergeable_ranks"]
    except Exception as error:  # whatever the HTTP client raises
        reason = " ".join(str(error).split())[:120] or "no reason given"
        raise UserError(
            f"tiktoken cannot download GPT-2's vocabulary ({reason}): give a file of its ranks "
            "instead, --tokenizer PATH/gpt2.tiktoken."
        ) from None


def train_bpe(source: str, vocab_size: int, path: str):
    """Train a BPE on `source` and write its first `vocab_size` ranks in tiktoken's format.

    Uses the optional package `tokenizers`, with GPT-2's byte-level split. Leaves out the documents
    that the default split holds out for validation. Raises UserError if the text yields fewer ranks
    or the file cannot be written.
    """
    tokenizers = extra("tokenizers", "bpe")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = byte_level
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(byte_level.alphabet()),
        show_progress=False,
    )
    texts = (text for text in documents(source) if not is_held_out(text.encode(), 0.1))
    bpe.train_from_iterator(texts, trainer)
    vocab = bpe.get_vocab()
    if len(vocab) != vocab_size:
        raise UserError(
            f"{source} yields {len(vocab)} ranks, not {vocab_size}: ask for no more than that."
        )
    spelling = _byte_level_spelling()
    with atomic_write(path) as file:
        for rank, token in enumerate(sorted(vocab, key=vocab.get)):
            raw = bytes(spelling[character] for character in token)
            file.write(base64.b64encode(raw) + b" %d\n" % rank)


def _byte_level_spelling() -> dict[str, int]:
    """{character: byte} of byte-level BPE, which spells each byte as one visible character.

    A byte that is a visible Latin-1 character stands for itself, the others are written as the
    characters from U+0100 on.
    """
    themselves = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spelling = {chr(byte): byte for byte in themselves}
    others = sorted(set(range(256)) - themselves)
    for i, byte in enumerate(others):
        spelling[chr(256 + i)] = byte
    return spelling


def visible(token: bytes) -> str:
    r"""A token as visible text: ↵ is a newline, ␣8 eight spaces, \xff a byte that is not UTF-8."""
    characters = []
    for character in token.decode("utf-8", "backslashreplace"):
        if character in MARKS:
            characters.append(MARKS[character])
        elif character == " " or character.isprintable():
            characters.append(character)
        else:
            characters.append(character.encode("unicode_escape").decode())
    return re.sub(" {4,}", _count_spaces, "".join(characters))


def _count_spaces(run: re.Match) -> str:
    return f"␣{len(run[0])}"
