"""Dose and response: how far turning a neuron moves what it should move, and what else it moves.

Neurons are drawn by a seed among those that fire on held-out text. Some windows choose: the tokens whose
probability rises most when the neuron is set to 2x its observed maximum are its continuations. In others it
is set, at all positions, to each dose (in multiples of that maximum), and measured are

    effect   mean change of the continuations' log-probability (nats)
    seen     the same of the tokens that were seen to follow where the neuron fired, in other text
    kl       KL(unsteered || steered) of the next token, the side effect (nats)
    loss     change of the loss on the text's own next tokens (nats)

Kinds: neuron; random, a change of the stream of equal length along a random mixture of the layer's atoms;
with an SAE, feature+error (the codes get what the turn changes in the reconstruction) and feature (they are
replaced by the reconstruction). The first kind names the continuations for both; `own` is the effect on those
that the kind itself chooses: a random direction raises some tokens too, and who chooses them finds an effect.
"""

import time
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from crate_mini import UserError
from crate_mini.intervene import Intervention, random_like, steer
from crate_mini.steering.next_token import direct_effect, finite, stream

CHOOSE = 2.0  # dose that chooses a neuron's continuations
AT_KL = 0.1  # nats of side effect at which kinds are compared
COUNTED = 16384  # held-out tokens, at most, on which maxima and followers are observed
DRAWS = 2000  # of the bootstrap over neurons
METRICS = ("effect", "own", "seen", "kl", "loss")


def windows(corpus, T, n, seed, limit=2**20):
    """[(x, y)]: n windows (n, T) of ids that choose, n that measure, and others to count in.

    At random from held-out text; no two share a token. Raises UserError when the text is too short.
    """
    pairs = [pair for pair in corpus.blocks("val", 256, T, limit) if pair[0].shape[1] == T]
    there = sum(len(x) for x, _ in pairs)
    if there < 3 * n:
        raise UserError(
            f"the held-out text has {there} windows of {T} tokens and {3 * n} are needed; lower "
            "--tokens or give more text with --data."
        )
    x, y = map(torch.cat, zip(*pairs))
    order = torch.randperm(there, generator=torch.Generator().manual_seed(seed))
    return [
        (x[part], y[part])
        for part in (order[:n], order[n : 2 * n], order[2 * n : 2 * n + COUNTED // T])
    ]


@torch.no_grad()
def observed(model, layer, sae, batches):
    """(largest value (n,), share of tokens above 0 (n,)) of a layer's codes, or of the SAE's features."""
    top, fired, seen = 0.0, 0.0, 0
    for idx in batches:
        a = model.trunk(idx.to(model.tokens.weight.device))[1][layer].flatten(0, 1)
        f = a if sae is None else sae.encode(a.float())
        top, fired, seen = f.max(0).values.clamp_min(top), fired + (f > 0).sum(0), seen + len(f)
    return top, fired / seen


@torch.no_grad()
def followers(model, layer, sae, drawn, batches, top):
    """Ids (n, top) of tokens that follow where each of the drawn neurons fires, more often than elsewhere.

    By the share of a neuron's activation that comes just before the token, less its share of the text.
    """
    device = model.tokens.weight.device
    spent = torch.zeros(len(drawn), model.config.vocab_size, device=device)
    count = torch.zeros(model.config.vocab_size, device=device)
    for x, y in batches:
        a, after = model.trunk(x.to(device))[1][layer].flatten(0, 1).float(), y.to(device).flatten()
        f = (a if sae is None else sae.encode(a))[:, drawn]
        spent.index_add_(1, after, f.T)
        count += torch.bincount(after, minlength=len(count))
    more = spent / spent.sum(1, keepdim=True) - count / count.sum()
    return more.topk(min(top, len(count))).indices


class Judge:
    """What the unsteered model says of two sets of windows, and how far steered runs depart from it."""

    def __init__(self, model, choose, measure, top):
        device = model.tokens.weight.device
        self.model, self.top = model, top
        self.idx, (self.text, self.targets) = choose[0].to(device), (t.to(device) for t in measure)
        self.before = self.probabilities(self.idx).exp().mean(0)
        self.plain = self.probabilities(self.text)

    @torch.no_grad()
    def probabilities(self, idx):
        """Next-token log-probabilities (N, V) at all N tokens."""
        return F.log_softmax(finite(self.model(idx).flatten(0, 1).float()), -1)

    def continuations(self, intervention):
        """Ids (top,) of the tokens whose mean probability the intervention raises most."""
        with steer(self.model, [intervention]):
            turned = self.probabilities(self.idx).exp().mean(0)
        return (turned - self.before).topk(min(self.top, len(turned))).indices

    def response(self, intervention, tokens):
        """{"kl", "loss", and for each name: ids in `tokens` the mean change of their log-probability}."""
        with steer(self.model, [intervention]):
            turned = self.probabilities(self.text)
        at, change = self.targets.flatten()[:, None], turned - self.plain
        found = {
            "kl": F.kl_div(turned, self.plain, log_target=True, reduction="sum") / len(turned),
            "loss": (self.plain - turned).gather(1, at).mean(),
        }
        found |= {name: change[:, ids].mean() for name, ids in tokens.items()}
        return {name: value.item() for name, value in found.items()}


def kinds(model, layer, j, sae, g):
    """{kind: Intervention that sets neuron or feature j, value to be filled in}."""
    base = Intervention(layer, j, "set", sae=sae)
    if sae is None:
        return {"neuron": base, "random": random_like(base, model, g)}
    return {"feature+error": replace(base, keep_error=True), "feature": base}


def draw(largest, n, rng):
    """n of the neurons that fired at all, by rng, in order; all of them if there are fewer."""
    live = largest.cpu().numpy().nonzero()[0]
    return sorted(rng.choice(live, min(n, len(live)), replace=False).tolist())


def measure(model, corpus, doses, sites, *, n, tokens, top, seed, log=print):
    """Everything about n neurons of each of the sites [(layer, SAE or None)]; see the head of this file.

    Returns {"rows": one for each neuron, kind and dose, "inserted": what it costs to turn nothing,
    "attribution": weights against runs, "live": counts and who was drawn}.
    Raises UserError for a dead layer, or too little text.
    """
    T = min(64, model.config.block_size)
    rows = max(2, -(-tokens // T))
    choosing, measuring, counted = windows(corpus, T, rows, seed)
    judge, counted = (
        Judge(model, choosing, measuring, top),
        list(zip(*(t.split(16) for t in counted))),
    )
    found, start = {"rows": [], "inserted": [], "attribution": [], "live": []}, time.perf_counter()
    rng, g = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    for done, (layer, sae) in enumerate(sites):
        largest, _ = observed(model, layer, sae, (x for x, _ in counted))
        drawn = draw(largest, n, rng)
        if not drawn:
            raise UserError(
                f"nothing in layer {layer} ever fired on held-out text; a dead layer cannot be "
                "turned by multiples of what it does."
            )
        found["live"].append(
            {
                "layer": layer,
                "sae": sae and sae.name,
                "live": int((largest > 0).sum()),
                "of": len(largest),
                "drawn": drawn,
            }
        )
        for kind, turned in kinds(model, layer, drawn[0], sae, g).items():
            cost = judge.response(replace(turned, op="scale", value=1.0), {})
            found["inserted"] += [{"layer": layer, "kind": kind, **cost}] * (kind != "random")
        for j, seen in zip(drawn, followers(model, layer, sae, drawn, counted, top)):
            unit = largest[j].item()
            found["rows"] += responses(judge, kinds(model, layer, j, sae, g), unit, doses, seen)
        if sae is None:
            found["attribution"] += attribution(model, judge.text, layer, drawn, largest, doses)
        left = (time.perf_counter() - start) / (done + 1) * (len(sites) - done - 1)
        log(
            f"layer {layer}, {f'features of {sae.name}' if sae else 'neurons'}: {len(drawn)} measured, "
            f"{done + 1} of {len(sites)} sites  ETA {int(left) // 60}:{int(left) % 60:02d}"
        )
    return found


def responses(judge, kinds, unit, doses, seen):
    """Rows of one neuron or feature: every kind, every dose."""
    rows, named = [], None
    for kind, turned in kinds.items():
        own = judge.continuations(replace(turned, value=CHOOSE * unit))
        named = own if named is None else named
        for dose in doses:
            change = judge.response(
                replace(turned, value=dose * unit), {"effect": named, "own": own, "seen": seen}
            )
            rows.append(
                {
                    "layer": turned.layer,
                    "sae": turned.sae and turned.sae.name,
                    "kind": kind,
                    "neuron": turned.neuron,
                    "dose": dose,
                    "unit": unit,
                    **change,
                    "raised": own.tolist(),
                    "followers": seen.tolist(),
                }
            )
    return rows


@torch.no_grad()
def attribution(model, idx, layer, drawn, largest, doses):
    """Direct attribution against a run; both set a neuron at the last token of each window.

    A row for the smallest and the largest dose: correlation over the vocabulary, null: the same with another
    drawn neuron's attribution (None if there is none), top10: the share of the ten most raised tokens on
    which both agree; means over windows and neurons.
    """
    (z, codes), rows = stream(model, idx), []
    z, a = z[:, -1], codes[layer][:, -1]
    plain = F.linear(model.norm(z), model.tokens.weight)
    for dose in (min(doses), max(doses)):
        runs, tolds = [], []
        for j in drawn:
            value = dose * largest[j].item()
            with steer(model, [Intervention(layer, j, "set", value, "last")]):
                runs.append(F.linear(model.trunk(idx)[0][:, -1], model.tokens.weight) - plain)
            change = torch.zeros_like(a)
            change[:, j] = value - a[:, j]
            tolds.append(direct_effect(model, z, layer, change))
        run, told = torch.stack(runs), torch.stack(tolds)  # (neurons, windows, V)
        both = F.one_hot(torch.stack((run, told)).topk(10).indices, run.shape[-1]).sum(-2).prod(0)
        run, told = run - run.mean(-1, True), told - told.mean(-1, True)
        null = (
            F.cosine_similarity(run, told.roll(1, 0), dim=-1).mean().item()
            if len(drawn) > 1
            else None
        )
        rows.append(
            {
                "layer": layer,
                "dose": dose,
                "top10": both.sum(-1).float().mean().item() / 10,
                "correlation": F.cosine_similarity(run, told, dim=-1).mean().item(),
                "null": null,
                "n": len(drawn),
            }
        )
    return rows


def interval(values, rng):
    """{"n", "mean", "ci95"} of values that are not None; the interval is the mean's, by the bootstrap."""
    values = np.asarray([v for v in values if v is not None], float)
    if not len(values):
        return {"n": 0, "mean": None, "ci95": None}
    means = values[rng.integers(len(values), size=(DRAWS, len(values)))].mean(1)
    return {
        "n": len(values),
        "mean": values.mean().item(),
        "ci95": np.quantile(means, [0.025, 0.975]).tolist(),
    }


def at_kl(rows, metric, kl=AT_KL):
    """A metric of one neuron's rows where its side effect is `kl`, log-linear between doses, or None."""
    sides, values = zip(*sorted((max(r["kl"], 1e-12), r[metric]) for r in rows))
    if not sides[0] <= kl <= sides[-1]:
        return None
    return float(np.interp(np.log(kl), np.log(sides), values))


def contrasts(rows, seed):
    """{"neuron - random": {metric: interval}, ..} at equal side effect: kinds of the same neuron, in pairs.

    Only neurons and features that reach AT_KL both ways count.
    """
    rng, found, by = np.random.default_rng(seed), {}, {}
    for r in rows:
        by.setdefault((r["layer"], r.get("sae"), r["neuron"]), {}).setdefault(r["kind"], []).append(
            r
        )
    for a, b in (("neuron", "random"), ("feature", "feature+error")):
        for m in ("own", "seen"):
            pairs = [
                [at_kl(kinds[k], m) for k in (a, b)]
                for kinds in by.values()
                if {a, b} <= set(kinds)
            ]
            found.setdefault(f"{a} - {b}", {})[m] = interval(
                [None if None in pair else pair[0] - pair[1] for pair in pairs], rng
            )
    return {pair: some for pair, some in found.items() if some["own"]["n"]}


def summary(rows, seed):
    """{kind: {"doses": {dose: {metric: interval}}, "at_kl": {metric: interval}}}, over all neurons."""
    rng, found = np.random.default_rng(seed), {}
    for kind in dict.fromkeys(r["kind"] for r in rows):
        mine, by = [r for r in rows if r["kind"] == kind], {}
        for r in mine:
            by.setdefault((r["layer"], r.get("sae"), r["neuron"]), []).append(r)
        found[kind] = {
            "doses": {
                f"{d:g}": {
                    m: interval([r[m] for r in mine if r["dose"] == d], rng) for m in METRICS
                }
                for d in dict.fromkeys(r["dose"] for r in mine)
            },
            "at_kl": {
                m: interval([at_kl(some, m) for some in by.values()], rng) for m in METRICS[:3]
            },
        }
    return found
