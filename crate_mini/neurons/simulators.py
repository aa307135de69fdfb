"""Explanations without a language model: what fires a neuron, said in tables, labels and patterns.

    Backoff     mean activation by previous and current token, else by current token, else the mean: `ngram`
    Table       the same by current token alone (`token`), or by the few tokens of a label (`label@10`), or by
                the tokens of five excerpts: all that a language model would be shown (the evidence ceiling)
    labels      what a page shows: top tokens, left neighbours, class of token
    effects     what raising a neuron does to the next token (needs the model)
    Trie        Neuron2Graph: the shortest patterns that keep half of the activation (needs the model)

All of them are simulators: called with tokens (.., w + 1), whose column 0 is the token before the window (-1:
there is none), they return the activations (.., w) that they expect; a table does so of neuron j, an int or
ints that broadcast against (.., w), or else of all neurons at once, (.., w, h).
V tokens, h neurons of a site, P frequent pairs of tokens.
"""

import numpy as np
import torch
import torch.nn.functional as F

SHRINK = (
    0.5,
    10.0,
)  # of means by token, by pair: as good as the best of a grid on 18,000 and 250,000 tokens
STEADY = (
    100.0  # the same for ranking tokens in a label: it shows those that are both loud and frequent
)
SHOWN = 10  # tokens in a label
SAW = {  # one line under each table: what the simulator saw
    "token": "token_r: saw the current token only (mean activation per token over the fit part, shrunk).",
    "ngram": "ngram_r: saw the last two tokens only (mean per frequent pair, else per token, shrunk); "
    "r is predictability from them, not meaning.",
    "label": f"label_r@{SHOWN}: saw only the tokens of the printed label (up to {SHOWN}) and their means.",
    "null": "null_r: the ngram table of another neuron of the same site, drawn by the seed.",
    "init": "init_r: ngram_r of the same architecture at random initialisation, same corpus and windows.",
    "five excerpts": "five excerpts: saw the tokens of five excerpts, those a language model would be shown: "
    "the number its explanation has to beat.",
    "trie": "trie: saw up to 32 tokens of context through patterns of the top excerpts of the fit part.",
}


class Table:
    """Expected activation by current token. values (V + 1, h): the last row, reached as -1, is no token."""

    def __init__(self, values):
        self.values = values

    def __call__(self, tokens, j=slice(None)):
        """tokens (.., w + 1) -> (.., w, h), or (.., w) of neurons j."""
        return self.values[tokens[..., 1:], j]


class Backoff(Table):
    """Means by pair of tokens over means by token over the mean, each shrunk to the next; all neurons.

    m_v = (sum over the tokens v + k m) / (c_v + k), m_uv = (sum over the pairs uv + k' m_v) / (c_uv + k'): as
    if k more tokens had been seen, at what is expected without them. counts (V,), token_sum (V, h),
    pairs (P, 2), pair_counts (P,), pair_sum (P, h) as recorded; shrink: k and k', numbers or (h,).
    """

    def __init__(self, counts, token_sum, pairs, pair_counts, pair_sum, shrink=SHRINK):
        k, k_pair = shrink
        self.counts, self.token_sum, self.mean = (
            counts,
            token_sum,
            token_sum.sum(0) / max(counts.sum(), 1),
        )
        values = (token_sum + k * self.mean) / (counts[:, None] + k)
        super().__init__(np.concatenate((values, self.mean[None])).astype(np.float32))
        key = pairs[:, 0].astype(np.int64) * len(counts) + pairs[:, 1]
        order = np.argsort(key)
        self.keys, self.pairs, self.pair_counts = key[order], pairs[order], pair_counts[order]
        sums = pair_sum[order] + k_pair * self.values[self.pairs[:, 1]]
        self.pair = (sums / (self.pair_counts[:, None] + k_pair)).astype(np.float32)

    def find(self, tokens):
        """(which tokens end a frequent pair (.., w), the numbers of these pairs) of tokens (.., w + 1)."""
        last, now = tokens[..., :-1].astype(np.int64), tokens[..., 1:]
        if not len(self.keys):
            return np.zeros(now.shape, bool), np.zeros(0, np.int64)
        key = np.where((last < 0) | (now < 0), -1, last * len(self.counts) + now)
        at = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
        known = self.keys[at] == key
        return known, at[known]

    def __call__(self, tokens, j=slice(None)):
        out, (known, at) = super().__call__(tokens, j), self.find(tokens)
        out[known] = self.pair[
            at, j if isinstance(j, slice) else np.broadcast_to(j, known.shape)[known]
        ]
        return out


def five_table(tokens, acts, shrink=0.3):
    """The Sparse table of a few excerpts of a neuron, tokens (n, w + 1) and acts (n, w); tokens -1 pad."""
    real = tokens[:, 1:] >= 0
    ids, place, count = np.unique(tokens[:, 1:][real], return_inverse=True, return_counts=True)
    acts = acts[real]
    total, mean = (
        np.bincount(place, acts, minlength=len(ids)),
        float(acts.mean()) if len(ids) else 0.0,
    )
    means = (total + shrink * mean) / (count + shrink)
    return Sparse(dict(zip(ids.tolist(), means.tolist())), mean)


class Sparse:
    """A table with few tokens, of one neuron: {id: activation}, and one value for the rest."""

    def __init__(self, shown, rest):
        self.ids = np.array(sorted(shown), dtype=np.int64)
        self.values, self.rest = np.array([shown[i] for i in self.ids.tolist()], np.float32), rest

    def __call__(self, tokens):
        """tokens (n, w + 1) -> (n, w)."""
        now = tokens[:, 1:]
        if not len(self.ids):
            return np.full(now.shape, self.rest, np.float32)
        at = np.minimum(np.searchsorted(self.ids, now), len(self.ids) - 1)
        return np.where(self.ids[at] == now, self.values[at], np.float32(self.rest))


def label_table(label):
    """Simulator of exactly what a label shows: its tokens at their printed means, all others at `rest`."""
    return Sparse({id: mean for id, mean, *_ in label["tokens"]}, label["rest"])


# ---- labels ----------------------------------------------------------------------------------------------


def classes(tokens):
    """{class: (V,) bool} by fixed tests on the text of each token (bytes); a token may be in several."""
    texts = [t.decode("utf-8", "replace") for t in tokens]
    tests = {
        "newline": lambda t: "\n" in t,
        "blank": lambda t: not t.strip() and "\n" not in t,
        "digit": lambda t: t.strip().isdigit(),
        "punctuation": lambda t: t.strip() and not any(c.isalnum() or c == "\ufffd" for c in t),
        "capital": lambda t: t.strip()[:1].isupper(),
        "word start": lambda t: t[:1] == " " and t[1:2].isalpha(),
        "suffix": lambda t: t[:1].islower(),
    }
    return {name: np.array([bool(test(t)) for t in texts]) for name, test in tests.items()}


def class_fit(backoff, members):
    """(C, h): correlation over the text of each neuron's token table with each class; members (C, V) bool."""
    weight = backoff.counts / max(backoff.counts.sum(), 1)
    x = backoff.values[:-1] - weight @ backoff.values[:-1]
    spread, share = weight @ x**2, members @ weight
    both = (members * weight) @ x
    return both / np.sqrt(np.maximum(np.outer(share * (1 - share), spread), 1e-30))


def position_fit(acts, start):
    """(h,) correlation with the position in the context, the larger of: its log, being the first.

    acts (W, w, h) of windows that begin `start` (W,) tokens into their context.
    """
    position = (start[:, None] + np.arange(acts.shape[1])).ravel()
    y = acts.reshape(len(position), -1).astype(np.float32)
    y = y - y.mean(0)
    best = np.zeros(y.shape[1], np.float32)
    for x in (np.log1p(position), position == 0):
        x = (x - x.mean()).astype(np.float32)
        r = x @ y / np.maximum(np.sqrt((x**2).sum() * (y**2).sum(0)), 1e-30)
        best = np.where(abs(r) > abs(best), r, best)
    return best


def labels(backoff, tokens, position=None, shown=SHOWN, clear=0.5):
    """One dict per neuron, what a reader is shown; tokens: the bytes of each id; position: position_fit's.

    tokens  up to `shown` x [id, mean, count, share of all activation], those above the neuron's mean that
            stay highest when shrunk by STEADY
    rest    mean of all tokens that are not shown (it follows from the shares)
    left    up to 5 ids before a shown token, after which it fires more than it does on average
    class   the class, or "position", whose correlation with the neuron is `clear` or more; else "mixed"
    """
    members = classes(tokens)
    fit = class_fit(backoff, np.array(list(members.values()))[:, : len(backoff.counts)])
    names, n, found = [*members, "position"], backoff.counts.sum(), []
    fit = np.vstack([fit, np.zeros_like(fit[:1]) if position is None else abs(position)])
    for j, mean in enumerate(backoff.mean):
        x = backoff.values[:-1, j]
        steady = (backoff.token_sum[:, j] - mean * backoff.counts) / (backoff.counts + STEADY)
        top = np.argsort(-steady, kind="stable")[:shown]
        top = top[steady[top] > 1e-6 * abs(mean)]
        total, some = backoff.token_sum[:, j].sum(), backoff.token_sum[top, j].sum()
        rows = [
            [
                int(i),
                rounded(x[i]),
                int(backoff.counts[i]),
                rounded(backoff.token_sum[i, j] / total) if total > 0 else None,
            ]
            for i in top
        ]
        best = int(fit[:, j].argmax())
        found.append(
            {
                "tokens": rows,
                "rest": rounded((total - some) / max(n - backoff.counts[top].sum(), 1)),
                "left": _left(backoff, j, top),
                "class": names[best] if fit[best, j] >= clear else "mixed",
            }
        )
    return found


def _left(backoff, j, top, most=5, share=0.05):
    """Ids before the tokens `top` that add activation: each at least `share` of what those tokens carry."""
    mine = np.isin(backoff.pairs[:, 1], top)
    extra = (
        backoff.pair[mine, j] - backoff.values[backoff.pairs[mine, 1], j]
    ) * backoff.pair_counts[mine]
    gain = np.bincount(backoff.pairs[mine, 0], np.maximum(extra, 0), minlength=1)
    order = np.argsort(-gain, kind="stable")[:most]
    return order[gain[order] > max(share * backoff.token_sum[top, j].sum(), 0)].tolist()


def rounded(value, digits=4):
    """A number as it is printed: so many significant digits."""
    return float(f"{float(value):.{digits}g}")


@torch.no_grad()
def effects(
    model, layer, neurons, levels, contexts, vocab, encode=None, directions=None, most=10, batch=256
):
    """What raising each of n neurons does to the next token, causal: a pass of its own in every context.

    At the last token read of each of the contexts (C, T + 1), whose last column is the token that follows, a
    neuron below its level (n,), commonly its observed maximum, is set to it; a feature likewise, by what its
    row of `directions` (width, codes) adds to the codes, with encode: codes -> features. Ids from `vocab` on
    only pad the model's vocabulary. A dict per neuron, as pages show it: "clamp" the level, "positions" C,
    "raised" and "lowered" up to `most` [id, mean change of log-probability], "kl" of before from after and
    "loss", its change on the token that follows: means in nats.
    """
    device, W, change, found = model.tokens.weight.device, model.tokens.weight, None, []
    read, then, C = contexts[:, :-1].to(device), contexts[:, -1].to(device), len(contexts)

    def push(module, inputs, codes):
        """Rows are (neuron, context) pairs; only each one's last token is touched."""
        if change is None:
            return codes
        codes, (j, to) = codes.clone(), change
        last, row = codes[:, -1], torch.arange(len(j), device=device)
        if directions is None:
            last[row, j] = torch.maximum(last[row, j], to)
        else:
            last += (to - encode(last.float())[row, j]).clamp(min=0)[:, None] * directions[j]
        return codes

    def after(idx):
        return F.log_softmax(F.linear(model.trunk(idx)[0][:, -1], W).float(), -1)

    hook, step = model.blocks[layer].sparsifier.code.register_forward_hook(push), max(1, batch // C)
    try:
        base = after(read)
        for some, to in zip(*(torch.as_tensor(v).split(step) for v in (neurons, levels))):
            change = [v.to(device).repeat_interleave(C) for v in (some, to.float())]
            moved = after(read.repeat(len(some), 1)).view(len(some), C, -1) - base
            kl, loss = (
                -(base.exp() * moved).sum(-1).mean(1),
                -moved[:, torch.arange(C), then].mean(1),
            )
            found += [
                {
                    "clamp": rounded(level),
                    "positions": C,
                    "raised": _most(mean, 1, most),
                    "lowered": _most(mean, -1, most),
                    "kl": rounded(max(far, 0)),
                    "loss": rounded(more),
                }
                for level, mean, far, more in zip(
                    to.tolist(), moved[..., :vocab].mean(1), kl.tolist(), loss.tolist()
                )
            ]
    finally:
        hook.remove()
    return found


def _most(change, sign, n):
    """Up to n [id, change] of the largest changes of this sign, the largest first; change (V,)."""
    values, ids = (sign * change).topk(min(n, len(change)))
    return [[i, rounded(sign * v, 3)] for v, i in zip(values.tolist(), ids.tolist()) if v > 0]


# ---- Neuron2Graph ----------------------------------------------------------------------------------------

ANY, END, BEGIN = (
    -2,
    -3,
    -4,
)  # edges: any token; the value of a pattern; of one that begins a context


class Trie:
    """Patterns over the last tokens, read backwards; the first that matches, the shortest, gives the value.

    Neuron2Graph (Foote et al. 2023) in the compact form of OpenAI's SAE paper (Gao et al. 2024): one pattern
    per excerpt, no language model that varies it. A pattern lists tokens from the newest to the oldest, ANY
    for one that does not matter; an anchored one matches only where the context begins with it.
    """

    def __init__(self):
        self.root, self.patterns = {}, []

    @classmethod
    def of(cls, patterns):
        """The Trie with these `patterns`."""
        trie = cls()
        for pattern, value, anchored in patterns:
            trie.add(pattern, value, anchored)
        return trie

    def add(self, pattern, value, anchored=False):
        """Add a pattern; of equal ones the largest value counts."""
        node, end = self.root, BEGIN if anchored else END
        for token in pattern:
            node = node.setdefault(int(token), {})
        node[end] = max(value, node.get(end, value))
        self.patterns.append([[int(t) for t in pattern], rounded(value), bool(anchored)])

    def __call__(self, tokens):
        """tokens (n, w + 1) -> (n, w) expected activations, 0 where no pattern matches."""
        return np.array(
            [[self._match(row, t) for t in range(1, len(row))] for row in tokens.tolist()],
            np.float32,
        ).reshape(len(tokens), tokens.shape[1] - 1)

    def _match(self, row, t):
        nodes = [self.root]
        while nodes and t >= 0 and row[t] >= 0:
            nodes = [node[edge] for node in nodes for edge in (row[t], ANY) if edge in node]
            t -= 1
            ends = (END, BEGIN) if t >= 0 and row[t] < 0 else (END,)
            for node in nodes:
                for end in ends:
                    if end in node:
                        return node[end]
        return 0.0


def fit_trie(activate, excerpts, pad, ratio=0.5, longest=32):
    """A Trie of excerpts [(ids up to the token that fires, its activation)].

    activate(list of id lists) -> activation at each one's last token. Per excerpt: the shortest suffix, of at
    most `longest` tokens, that keeps `ratio` of the activation; it is anchored if it does not keep that with
    a `pad` token in front; a token in it is literal if `pad` in its place costs `ratio` or more. A pattern
    without any would fire everywhere and hide the others: it is left out.
    """
    trie = Trie()
    for ids, value in excerpts:
        suffixes = [ids[-n:] for n in range(1, min(longest, len(ids)) + 1)]
        enough = [(s, a) for s, a in zip(suffixes, activate(suffixes)) if a >= ratio * value > 0]
        if not enough:
            continue
        ids, full = enough[0]
        front, *without = activate(
            [[pad, *ids], *([*ids[:i], pad, *ids[i + 1 :]] for i in range(len(ids)))]
        )
        pattern = [t if full - a >= ratio * full else ANY for t, a in zip(ids, without)]
        if set(pattern) != {ANY}:
            trie.add(pattern[::-1], value, front < ratio * full)
    return trie


def at_last(model, layer, j, encode=None):
    """`activate` of fit_trie: neuron j of a layer, or of an SAE's encode, each row being a whole context."""
    device = next(model.parameters()).device

    @torch.no_grad()
    def activate(rows):
        length = max(map(len, rows))
        idx = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=device)
        ends = torch.tensor([len(row) - 1 for row in rows], device=device)
        codes = model.trunk(idx)[1][layer][torch.arange(len(rows), device=device), ends]
        return (codes if encode is None else encode(codes.float()))[:, j].float().tolist()

    return activate


def precision_recall(true, predicted, level):
    """{"precision", "recall", "f1"} of predicted for true, fired being >= level; None for 0 / 0, and where
    the neuron fires everywhere, so that nothing could be wrong."""
    fires, said = true >= level, predicted >= level
    if fires.all():
        return dict.fromkeys(("precision", "recall", "f1"))
    both = int((fires & said).sum())
    return {
        "precision": both / int(said.sum()) if said.any() else None,
        "recall": both / int(fires.sum()) if fires.any() else None,
        "f1": 2 * both / int(fires.sum() + said.sum()) if fires.any() or said.any() else None,
    }
