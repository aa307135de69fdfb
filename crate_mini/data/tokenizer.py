"""Tokenizers: byte-level BPEs in tiktoken's format, all of one class; pydocs.tiktoken is the embedded one."""

import base64
import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken

from crate_mini import UserError, atomic_write
from crate_mini.data.formats import END, extra
from crate_mini.data.sources import documents, held_out

MARKS = {"\n": "↵", "\t": "⇥", "\r": "␍"}  # how visible() shows white space

# GPT-2's split pattern in tiktoken's spelling (possessive: no backtracking on long runs). Our own vocabulary
# uses it too: words carry their leading space, letters, digits and signs stay apart, and one path serves all.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


class Tokenizer:
    """A byte-level BPE. `ranks`: the bytes of each token -> its id; <|endoftext|> is the id after the last.

    name, vocab_size (eot included), eot, dtype (numpy's, the smallest that holds all ids), hash (of all that
    decides how text becomes ids; the name does not).
    """

    def __init__(self, name: str, ranks: dict[bytes, int]):
        self.name, self.eot, self.vocab_size = name, len(ranks), len(ranks) + 1
        self.dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        self._tokens = [*sorted(ranks, key=ranks.get), END.encode()]
        listing = b"".join(len(token).to_bytes(4, "little") + token for token in self._tokens)
        self.hash = hashlib.sha256(PATTERN.encode() + listing).hexdigest()
        # tiktoken need not know of eot: then no text can spell it.
        self._bpe = tiktoken.Encoding(
            name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; never eot, since the mark inside a text is spelled out like any other characters."""
        return self._bpe.encode_ordinary(text)

    def encode_batch(self, texts: list[str], workers: int | None = None) -> list[np.ndarray]:
        """Ids of each text, in parallel threads: tiktoken releases the interpreter lock."""
        workers = workers or os.cpu_count() or 1
        stride = 4 * workers  # few large tasks: a task per text would cost more than a short text

        def encode(first):
            return [
                self._bpe.encode_to_numpy(text).astype(self.dtype) for text in texts[first::stride]
            ]

        ids = [None] * len(texts)
        with ThreadPoolExecutor(workers) as pool:
            for first, group in enumerate(pool.map(encode, range(stride))):
                ids[first::stride] = group
        return ids

    def decode(self, ids) -> str:
        """Text of `ids`; bytes that are no UTF-8, such as half a character, become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token. Raises UserError outside 0 .. vocab_size - 1."""
        if not 0 <= id < self.vocab_size:
            raise UserError(
                f"Tokenizer {self.name} has no id {id}: its ids are 0 to {self.vocab_size - 1}."
            )
        return self._tokens[id]


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer named by `spec`; raises UserError when there is none or its file is malformed.

    pydocs  embedded: 8,191 ranks + eot = 8,192 ids (a multiple of 64 suits matrix products), made once by
            python -c "from crate_mini.data.batches import *; train_bpe('pydocs', 8191, 'pydocs.tiktoken')"
    gpt2    tiktoken's own, which it downloads once
    bytes   256 ids and eot: a BPE without merges
    PATH    a file of ranks in tiktoken's format: base64 of the token, a space, its rank, one token a line
    Any of them may end in :N to keep the first N ranks: the first merges of a BPE are themselves a BPE.
    """
    name, _, keep = spec.rpartition(":")
    name, keep = (name, int(keep)) if name and keep.isdecimal() and len(keep) < 12 else (spec, None)
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
    elif name == "gpt2":
        ranks = _gpt2_ranks()
    else:
        ranks = _read_ranks(
            Path(__file__).with_name("pydocs.tiktoken") if name == "pydocs" else Path(name)
        )
    if keep is not None:
        if not 256 <= keep <= len(ranks):
            raise UserError(
                f"Tokenizer {spec!r}: {name} has {len(ranks)} ranks, keep at least 256 of them."
            )
        ranks = {token: rank for token, rank in ranks.items() if rank < keep}
    if not all(bytes([i]) in ranks for i in range(256)):
        raise UserError(
            f"Tokenizer {spec!r} lacks some of the 256 bytes: it cannot encode every text."
        )
    return Tokenizer(Path(name).stem + ("" if keep is None else f":{keep}"), ranks)


def _read_ranks(path: Path) -> dict[bytes, int]:
    # tiktoken's own reader caches by path, and then does not see that a file has changed.
    try:
        lines = [line.split() for line in path.read_bytes().splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except OSError as error:
        raise UserError(
            f"No tokenizer {str(path)!r} ({error.strerror}): expected pydocs, gpt2, bytes or the "
            "path of a ranks file."
        ) from None
    except ValueError:
        raise UserError(
            f"{path} is no ranks file: expected lines of base64 token, space, rank."
        ) from None
    if sorted(ranks.values()) != list(range(len(lines))) or b"" in ranks:
        raise UserError(
            f"{path} is no ranks file: its ranks are not 0, 1, 2, ... for as many tokens."
        )
    return ranks


def _gpt2_ranks() -> dict[bytes, int]:
    try:
        from tiktoken_ext.openai_public import gpt2

        return gpt2()["mergeable_ranks"]
    except Exception as error:  # whatever the HTTP client raises
        raise UserError(
            f"tiktoken cannot download GPT-2's vocabulary ({type(error).__name__}): give a file "
            "of its ranks instead, --tokenizer PATH/gpt2.tiktoken."
        ) from None


def train_bpe(source: str, vocab_size: int, path: str):
    """Write the first `vocab_size` ranks of a BPE trained on `source` to `path`, in tiktoken's format.

    Uses the optional package `tokenizers`, whose byte-level splitting is GPT-2's. Documents that the default
    split keeps for validation are left out.
    Raises UserError if the text yields fewer ranks, or the file cannot be written.
    """
    tokenizers = extra("tokenizers", "bpe")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=sorted(level.alphabet()), show_progress=False
    )
    texts = (text for text in documents(source) if not held_out(text.encode(), 0.1))
    bpe.train_from_iterator(texts, trainer)
    vocab = bpe.get_vocab()
    if len(vocab) != vocab_size:
        raise UserError(
            f"{source} yields {len(vocab)} ranks, not {vocab_size}: ask for no more than that."
        )
    # Byte-level BPE writes bytes that are no visible Latin-1 character as the characters from U+0100 on.
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spelled = {chr(byte): byte for byte in visible}
    spelled |= {chr(256 + i): byte for i, byte in enumerate(sorted(set(range(256)) - visible))}
    tokens = [bytes(spelled[char] for char in token) for token in sorted(vocab, key=vocab.get)]
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    with atomic_write(path) as file:
        file.writelines(lines)


def visible(token):
    r"""Bytes of a token as text with nothing invisible: ↵ a newline, ␣8 eight spaces, \xff not UTF-8."""
    characters = []
    for character in token.decode("utf-8", "backslashreplace"):
        if character in MARKS:
            characters.append(MARKS[character])
        elif character == " " or character.isprintable():
            characters.append(character)
        else:
            characters.append(character.encode("unicode_escape").decode())
    return re.sub(" {4,}", lambda run: f"␣{len(run[0])}", "".join(characters))
