"""Effects: what raising a neuron does to the next token, in texts as the model reads them.

    draw_texts -> next_token_effects -> explain (a label names only what holds in both halves)

Raising changes the last token alone, so the keys and values of the tokens before it are computed
once for each text, for all neurons.
"""

import hashlib
import heapq
import math

import numpy as np
import torch
import torch.nn.functional as F

from crate_mini.generate import KVCache, kv_cache
from crate_mini.intervene import hook_codes
from crate_mini.neurons.metrics import rounded, student_95

TEXTS = 64  # at least; each of another document, as long as there are enough
BLOCK_LOGITS = 1 << 22  # logits at a time: they bound the memory


# ---- texts ---------------------------------------------------------------------------------------


def draw_texts(chunks, wanted=TEXTS, seed=0):
    """At least `wanted` texts from the Chunks of a part, grouped by document.

    Returns [texts of one document], all lists of the same length: one text each if there are enough
    documents. A text is an int64 array of ids, whose last is the token that follows: a token drawn
    from a document, after all that the model reads before it, 2 tokens or more. Empty if no
    document is that long.
    """
    groups = {}  # document: its chunks; only those of the documents drawn so far
    drawn = []  # a heap of (-place, document): the documents with the smallest places
    for chunk in chunks:
        if len(chunk.ids) < 3:
            continue
        if chunk.document not in groups:
            place = _place(seed, chunk.document)
            if len(drawn) < wanted:
                heapq.heappush(drawn, (-place, chunk.document))
            elif place < -drawn[0][0]:
                del groups[heapq.heapreplace(drawn, (-place, chunk.document))[1]]
            else:
                continue
            groups[chunk.document] = []
        groups[chunk.document].append(chunk.ids)
    each = math.ceil(wanted / max(1, len(groups)))
    texts = []
    for _, document in sorted(drawn, reverse=True):
        rng = np.random.default_rng([seed, document])
        texts.append([_text(groups[document], rng) for _ in range(each)])
    return texts


def _place(seed, document):
    """A number in [0, 1) for each document, by which the seed draws them."""
    digest = hashlib.blake2b(f"effects/{seed}/{document}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _text(chunks, rng):
    """One token of a document, with what the model reads before it; chunks: arrays of ids."""
    places = np.array([len(ids) - 2 for ids in chunks]).cumsum()
    place = int(rng.integers(places[-1]))
    i = int(np.searchsorted(places, place, "right"))
    end = place - (places[i - 1] if i else 0) + 3
    return np.asarray(chunks[i][:end], np.int64)


# ---- effects -------------------------------------------------------------------------------------


@torch.no_grad()
def next_token_effects(
    model, layer, neurons, levels, texts, vocab, encode=None, directions=None, most=10, done=None
):
    """Raise each of n neurons alone and measure the next token: a causal effect in every text.

    texts: [texts of one document], ids whose last is the token that follows, as from draw_texts.
    After the tokens before it a neuron below its level (n,), usually its observed maximum, is set
    to that level. For a feature, the codes are moved by what its row of directions (width, h) adds
    to them; encode: codes -> features. Ids from `vocab` on only pad the model's vocabulary. done,
    if given, is called now and then with the passes done so far, one for each neuron and text.

    Returns a dict per neuron, in nats and means over texts: "clamp", the level; "positions", the
    number of texts; "documents"; "raised" and "lowered", up to `most` rows [id, change of
    log-probability, low, high, holds]; "kl", KL(before || after), and "loss", the change of loss on
    the token that follows, with "kl_ci95" and "loss_ci95". Intervals are 95 % over documents
    (Student's t), null for a single one. holds: 1 if the token is among the `most` changed most in
    each half of the documents.
    """
    device = model.tokens.weight.device
    neurons = torch.as_tensor(neurons, device=device)
    levels = torch.as_tensor(levels, device=device, dtype=torch.float32)
    size = max(1, BLOCK_LOGITS // model.config.vocab_size)  # neurons in one pass
    effects, steps = [], 0
    for js, targets in zip(neurons.split(size), levels.split(size)):
        changes = _Changes(len(js), vocab, device)
        for group in texts:
            for text in group:
                raise_neurons = _raiser(js, targets, encode, directions)
                ids = torch.as_tensor(text, device=device)
                changes.add(*_before_and_after(model, layer, ids, len(js), raise_neurons), ids[-1])
                steps += len(js)
                if done is not None:
                    done(steps)
            changes.end_document()
        effects += changes.results(targets.tolist(), most)
    return effects


def _before_and_after(model, layer, ids, n, raise_neurons):
    """Log-probabilities (V,) of the token after ids[:-1], and (n, V) with each neuron raised."""
    last = ids[None, -2:-1]
    with kv_cache(model, len(ids) - 1) as cache:
        if len(ids) > 2:
            model.trunk(ids[None, :-2])
        prefix = Prefix(cache)
        for owner in (model, *(block.attention for block in model.blocks)):
            owner.cache = prefix
        before = _log_probs(model, last)[0]
        with hook_codes(model, layer, raise_neurons):
            prefix.length = cache.length
            return before, _log_probs(model, last.expand(n, 1))


class Prefix(KVCache):
    """The keys and values of one text, which the rows of a batch continue; it keeps nothing new."""

    def __init__(self, cache):
        super().__init__(cache.prompt, cache.capacity)
        self.kept, self.length = cache.kept, cache.length

    def extend(self, layer, *new):
        """As KVCache.extend, but the new tensors (B, K, 1, p) are forgotten again."""
        if layer not in self.kept:
            return list(new)
        extended = []
        for kept, t in zip(self.kept[layer], new):
            before = kept[:, :, : self.length].expand(len(t), -1, -1, -1)
            extended.append(torch.cat((before, t), 2))
        return extended


def _log_probs(model, ids):
    """(B, V): log-probabilities of the token after each row of ids (B, T)."""
    stream = model.trunk(ids)[0][:, -1]
    return F.log_softmax(F.linear(stream, model.tokens.weight).float(), -1)


def _raiser(neurons, targets, encode, directions):
    """A function of codes (n, T, h) for hook_codes: at the last token, neurons[i] >= targets[i]."""
    rows = torch.arange(len(neurons), device=neurons.device)

    def raise_neurons(codes):
        codes = codes.clone()
        last = codes[:, -1]  # (n, h), a view
        if directions is None:
            last[rows, neurons] = torch.maximum(last[rows, neurons], targets)
        else:
            features = encode(last.float())[rows, neurons]
            missing = (targets - features).clamp(min=0)
            last += missing[:, None] * directions[neurons]
        return codes

    return raise_neurons


class _Changes:
    """Changes of log-probability for n neurons, summed over documents; each counts once.

    Even and odd documents make the two halves.
    """

    def __init__(self, n, vocab, device):
        self.vocab = vocab
        self.halves = torch.zeros(2, n, vocab, device=device)
        self.squares = torch.zeros(n, vocab, device=device)
        self.costs = []  # (2, n) of each document: KL, change of loss
        self.texts = 0  # in all documents
        self._begin_document()

    def _begin_document(self):
        self.change, self.cost, self.count = 0, 0, 0

    def add(self, before, after, following):
        """Add a text: log-probabilities (V,) and (n, V), and the token that follows."""
        change = after - before
        kl = -(change @ before.exp()).clamp(max=0)
        self.cost = self.cost + torch.stack((kl, -change[:, following]))
        self.change = self.change + change[:, : self.vocab]
        self.count += 1

    def end_document(self):
        """Count the texts since the last document as one more."""
        mean = self.change / self.count
        self.halves[len(self.costs) % 2] += mean
        self.squares += mean * mean
        self.costs.append(self.cost / self.count)
        self.texts += self.count
        self._begin_document()

    def results(self, levels, most):
        """The dicts of next_token_effects."""
        n = len(self.costs)
        mean = self.halves.sum(0) / n
        half_width = None
        if n > 1:
            variance = (self.squares - n * mean * mean).clamp(min=0) / (n - 1)
            half_width = student_95(n - 1) * (variance / n).sqrt()
        costs = torch.stack(self.costs).cpu().double().numpy()  # (n, 2, neurons)
        effects = []
        for i, level in enumerate(levels):
            effect = {"clamp": rounded(level), "positions": self.texts, "documents": n}
            for name, sign in (("raised", 1), ("lowered", -1)):
                width = None if half_width is None else half_width[i]
                effect[name] = _rows(mean[i], width, self.halves[:, i], sign, most)
            for name, values in zip(("kl", "loss"), costs[..., i].T):
                effect[name] = rounded(values.mean())
                effect[f"{name}_ci95"] = _interval(values)
            effects.append(effect)
        return effects


def _rows(change, half_width, halves, sign, most):
    """Rows [id, change, low, high, holds] of the largest changes (V,) of a sign, largest first."""
    values, ids = (sign * change).topk(min(most, len(change)))
    strongest = [set((sign * half).topk(len(ids)).indices.tolist()) for half in halves]
    rows = []
    for value, id in zip((sign * values).tolist(), ids.tolist()):
        if sign * value > 0:
            bounds = [None, None]
            if half_width is not None:
                width = half_width[id].item()
                bounds = [rounded(value - width, 3), rounded(value + width, 3)]
            holds = half_width is not None and all(id in half for half in strongest)
            rows.append([id, rounded(value, 3), *bounds, int(holds)])
    return rows


def _interval(values):
    """95 % interval [low, high] of a mean, by Student's t; None for a single value."""
    n = len(values)
    if n < 2:
        return None
    half = student_95(n - 1) * values.std(ddof=1) / math.sqrt(n)
    return [rounded(values.mean() - half), rounded(values.mean() + half)]
