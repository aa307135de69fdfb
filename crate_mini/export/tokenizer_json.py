"""A Tokenizer as the tokenizer.json of Hugging Face's `tokenizers`: a byte-level BPE."""

from crate_mini.data.formats import END
from crate_mini.data.tokenizer import _byte_level_spelling


def tokenizer_json(tokenizer):
    """The content of tokenizer.json: a JSON-able dict. <|endoftext|> is its special token."""
    tokens = [tokenizer.token_bytes(id) for id in range(tokenizer.eot)]
    character = {byte: c for c, byte in _byte_level_spelling().items()}

    def spelled(token):
        return "".join(character[byte] for byte in token)

    ranks = {token: id for id, token in enumerate(tokens)}
    merges = []
    for token in tokens:
        if len(token) > 1:
            left, right = last_merge(token, ranks)
            merges.append([spelled(left), spelled(right)])
    end = {"id": tokenizer.eot, "content": END, "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**end, **flags}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # as tiktoken: a piece that is a token stays whole
            "vocab": {spelled(token): id for token, id in ranks.items()},
            "merges": merges,
        },
    }


def last_merge(token, ranks):
    """(left, right): the two tokens that BPE merges last when it builds `token` (bytes).

    Found by merging pairs, lowest rank first, without the token's own rank.
    """
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts
