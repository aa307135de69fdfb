"""Sampling with a KV cache.

MSSA uses one projection u as query, key and value, so its cache holds one tensor per layer, half of
what GPT-2 needs; the query correction of crate+ is computed from u and need not be cached.
"""

import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from crate_mini import UserError


class KVCache:
    """Keys and values of earlier tokens, and the position reached in the text.

    prompt: tokens of the prompt; slid: tokens that have left the window; length: tokens kept.
    """

    def __init__(self, prompt, capacity):
        self.prompt, self.capacity = prompt, capacity
        self.slid = self.length = 0
        self.kept = {}  # layer: its tensors (B, K, capacity, p)

    def extend(self, layer, *new):
        """Append a layer's new tensors (B, K, T, p); returns all S tokens of each (B, K, S, p)."""
        if layer not in self.kept:
            B, K, _, p = new[0].shape
            self.kept[layer] = [t.new_empty(B, K, self.capacity, p) for t in new]
        end = self.length + new[0].shape[2]
        for kept, t in zip(self.kept[layer], new):
            kept[:, :, self.length : end] = t
        return [kept[:, :, :end] for kept in self.kept[layer]]


@contextmanager
def kv_cache(model, prompt):
    """In the block, the ids of each call of the LM continue those of the calls before.

    prompt: number of tokens in the prompt. Yields the KVCache, which the model drops when the block
    ends, however it ends.
    """
    cache = KVCache(prompt, model.config.block_size)
    owners = [model, *(block.attention for block in model.blocks)]
    try:
        for owner in owners:
            owner.cache = cache
        yield cache
    finally:
        for owner in owners:
            owner.cache = None


@torch.no_grad()
def generate(model, ids, n_new, temperature=1.0, top_k=None, generator=None, use_cache=True):
    """Continue ids (B, T) by n_new tokens; returns (B, T + n_new).

    temperature: 0 takes the most likely token. top_k: sample from this many most likely tokens.
    generator: a torch.Generator for the samples. Beyond block_size the window slides, which changes
    every position, so the cache is rebuilt for each token. Raises UserError for settings that make
    no sense, and if the logits, or the logits divided by the temperature, are not finite.
    """
    _check(ids.shape[1], n_new, temperature, top_k)
    with kv_cache(model, ids.shape[1]) as cache:
        for _ in range(n_new):
            slid = ids.shape[1] - model.config.block_size
            if slid > 0 or not use_cache:
                cache.slid = max(0, slid)
                cache.length = 0
            x, _ = model.trunk(ids[:, cache.slid + cache.length :])
            logits = F.linear(x[:, -1], model.tokens.weight).float()
            if not (logits / (temperature or 1)).isfinite().all():
                cause = "raise the temperature"
                if not logits.isfinite().all():
                    cause = "change the model less; if it is unchanged, take an earlier checkpoint"
                raise UserError(
                    f"logits at temperature {temperature} are not finite numbers; {cause}."
                )
            new = draw(logits, temperature, top_k, generator)
            ids = torch.cat((ids, new), 1)
    return ids


def _check(tokens, n_new, temperature, top_k):
    """Raise UserError for what `generate` cannot follow; tokens: of the prompt."""
    fitting = {
        "an empty prompt; give it at least one token": tokens > 0,
        f"n_new {n_new}; give 0 or more": n_new >= 0,
        f"temperature {temperature}; give 0, which is greedy, or more": 0 <= temperature < math.inf,
        f"top_k {top_k}; give 1 or more, or None for all": top_k is None or top_k >= 1,
    }
    for problem, fits in fitting.items():
        if not fits:
            raise UserError(f"cannot generate with {problem}.")


def draw(logits, temperature, top_k, generator):
    """One token (B, 1) for each row of logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        floor = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -math.inf)
    probabilities = F.softmax(logits / temperature, -1)
    return torch.multinomial(probabilities, 1, generator=generator)
