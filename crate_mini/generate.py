"""The cache of generation: what later tokens attend to, kept so that each pass computes its new tokens only.

MSSA's queries, keys and values are one projection u, so that one tensor per layer is all it keeps, half of
what GPT-2 needs; the query correction of crate+ is made anew from u and needs no room.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F


class Past:
    """Where a model stands in the text that it is writing, and the keys and values of the tokens before.

    prompt: tokens that were given; slid: tokens that the window has left behind; length: tokens kept.
    """

    def __init__(self, prompt, room):
        self.prompt, self.room, self.slid, self.length, self.kept = prompt, room, 0, 0, {}

    def extend(self, layer, *new):
        """Keep a layer's new tensors (B, K, T, p); returns [(B, K, S, p)], with all that came before them."""
        if layer not in self.kept:
            self.kept[layer] = [t.new_empty(*t.shape[:2], self.room, t.shape[3]) for t in new]
        end = self.length + new[0].shape[2]
        for kept, t in zip(self.kept[layer], new):
            kept[:, :, self.length : end] = t
        return [kept[:, :, :end] for kept in self.kept[layer]]


def attend(q, k, v):
    """softmax(causal(q k^T / sqrt(p))) v: q (B, K, T, p) of the last T of S tokens; k, v (B, K, S, p)."""
    T, S = q.shape[2], k.shape[2]
    seen = None if T in (1, S) else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, seen, is_causal=T == S)


@contextmanager
def remember(model, prompt):
    """In the block, ids given to the LM continue those given before: one text, of which `prompt` were given.

    Yields its Past. The model forgets it when the block ends, however it ends.
    """
    past, owners = (
        Past(prompt, model.config.block_size),
        [model, *(b.attention for b in model.blocks)],
    )
    try:
        for owner in owners:
            owner.past = past
        yield past
    finally:
        for owner in owners:
            owner.past = None
