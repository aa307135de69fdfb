"""Dose-response: how far steering a neuron moves its own tokens, and how far everything else.

A seed draws neurons among those that fire on held-out text. A first set of windows chooses each
neuron's continuations: the tokens that rise most in probability when it is set to twice its
observed maximum. In a second set the neuron is set, at every position, to each dose (a multiple of
that maximum), and these are measured:

    effect   mean change of the continuations' log-probability (nats)
    seen     the same for the tokens that follow where the neuron fires, in a third set of windows
    kl       KL(unsteered || steered) of the next token, the side effect (nats)
    loss     change of the loss on the text's actual next tokens (nats)

Kinds: neuron; random, a change of the stream of the same length along a random mixture of the
layer's atoms; with an SAE, feature+error (the codes move by the change of the reconstruction) and
feature (the reconstruction replaces the codes). The first kind of a pair chooses the continuations
of both. `own` is the effect on the continuations that a kind chooses itself: a random direction
raises some tokens too, and has an effect on those if it may choose them.
"""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from crate_mini import UserError, stats
from crate_mini.console.terminal import Progress
from crate_mini.intervene import Intervention, steer
from crate_mini.neurons.relatives import atoms
from crate_mini.steering.known import maxima
from crate_mini.steering.next_token import check_codes, direct_effect, finite, stream
from crate_mini.training.device import widest_float

CHOOSE = 2.0  # dose that chooses a neuron's continuations
AT_KL = 0.1  # nats of side effect at which kinds are compared
COUNTED = 16384  # held-out tokens, at most, to observe maxima and followers in
GROUPS = 16  # of documents, left out of the measured text in turn
GAINS = ("effect", "own", "seen")
METRICS = (*GAINS, "kl", "loss")


def windows(corpus, T, n, seed, limit=2**20, eot=None):
    """Three (x, y, document): n windows that choose, n that measure, others to count in.

    x, y: ids (.., T); document (..): of each window's first token, by the `eot` tokens before it.
    They are drawn from held-out text, and no two share a token. Raises UserError if the text is too
    short.
    """
    pairs = [pair for pair in corpus.blocks("val", 256, T, limit) if pair[0].shape[1] == T]
    available = sum(len(x) for x, _ in pairs)
    if available < 3 * n:
        raise UserError(
            f"the held-out text has {available} windows of {T} tokens and {3 * n} are needed; "
            "lower --tokens or give more text with --data."
        )
    x, y = map(torch.cat, zip(*pairs))
    ends = (x == eot).sum(1) if eot is not None else torch.ones(len(x), dtype=torch.int64)
    document = ends.cumsum(0) - ends
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    parts = (order[:n], order[n : 2 * n], order[2 * n : 2 * n + COUNTED // T])
    return [(x[rows], y[rows], document[rows]) for rows in parts]


@torch.no_grad()
def followers(model, layer, sae, drawn, batches, top):
    """Ids (n, top) of the tokens that follow where each drawn neuron fires, more than elsewhere.

    batches: pairs (x, y) of ids. Tokens are ranked by the share of the neuron's activation just
    before them, minus their share of the text.
    """
    device = model.tokens.weight.device
    activation = torch.zeros(len(drawn), model.config.vocab_size, device=device)  # before a token
    count = torch.zeros(model.config.vocab_size, device=device)
    for x, y in batches:
        codes = model.trunk(x.to(device))[1][layer].flatten(0, 1).float()
        values = codes if sae is None else sae.encode(codes)
        following = y.to(device).flatten()
        activation.index_add_(1, following, values[:, drawn].T)
        count += torch.bincount(following, minlength=len(count))
    excess = activation / activation.sum(1, keepdim=True) - count / count.sum()
    return excess.topk(min(top, len(count))).indices


class Baseline:
    """The unsteered model on the windows that choose and that measure, to compare runs with.

    group: (n,) of documents, of each window that measures; by default each its own.
    """

    def __init__(self, model, choose, measure, top, group=None):
        device = model.tokens.weight.device
        self.model, self.top = model, top
        self.choosing = choose[0].to(device)
        with torch.no_grad():
            check_codes(model.trunk(self.choosing[:1])[1])
        self.text, self.targets = (ids.to(device) for ids in measure)
        group = torch.arange(len(self.text)) if group is None else group
        self.member = F.one_hot(group).to(device, widest_float(device))  # (n, groups)
        self.mean = self.log_probabilities(self.choosing).exp().mean(0)
        self.plain = self.log_probabilities(self.text)

    @torch.no_grad()
    def log_probabilities(self, ids):
        """Next-token log-probabilities (N, V) at all N tokens."""
        return F.log_softmax(finite(self.model(ids).flatten(0, 1).float()), -1)

    def continuations(self, intervention):
        """Ids (top,) of the tokens whose mean probability the intervention raises most."""
        with steer(self.model, [intervention]):
            steered = self.log_probabilities(self.choosing).exp().mean(0)
        return (steered - self.mean).topk(min(self.top, len(steered))).indices

    def response(self, intervention, tokens):
        """{"kl", "loss", name: mean change of log-probability of these ids}, in nats.

        tokens: {name: ids}. "windows" and "by_group": how many windows each group of documents has,
        and the same means over those.
        """
        with steer(self.model, [intervention]):
            steered = self.log_probabilities(self.text)
        targets = self.targets.flatten()[:, None]
        by_token = {
            "kl": F.kl_div(steered, self.plain, log_target=True, reduction="none").sum(-1),
            "loss": (self.plain - steered).gather(1, targets)[:, 0],
        }
        change = steered - self.plain
        for name, ids in tokens.items():
            by_token[name] = change[:, ids].mean(-1)
        count = self.member.sum(0)
        response, by_group = {}, {}
        for name, values in by_token.items():
            sums = values.to(self.member.dtype).view(len(self.text), -1).mean(1) @ self.member
            response[name] = (sums.sum() / count.sum()).item()
            by_group[name] = [float(f"{mean:.6g}") for mean in (sums / count).tolist()]
        return {**response, "windows": count.long().tolist(), "by_group": by_group}


def kinds(model, layer, neuron, sae, generator):
    """{kind: Intervention that sets a neuron or feature, without its value}."""
    base = Intervention(layer, neuron, "set", sae=sae)
    if sae is None:
        return {"neuron": base, "random": random_control(base, model, generator)}
    return {"feature+error": replace(base, keep_error=True), "feature": base}


def random_control(intervention, model, generator):
    """The intervention along a random mixture of atoms that moves the stream equally far."""
    W = atoms(model, intervention.layer).detach()
    mixture = torch.randn(W.shape[1], generator=generator).to(W)
    scale = W[:, intervention.neuron].norm() / (W @ mixture).norm()
    return replace(intervention, along=mixture * scale)


def draw(largest, n, rng):
    """Up to n neurons that ever fired, drawn by rng, in order."""
    live = largest.cpu().numpy().nonzero()[0]
    return sorted(rng.choice(live, min(n, len(live)), replace=False).tolist())


def measure(model, corpus, doses, sites, *, n, tokens, top, seed, eot=None):
    """Measure n neurons of each of the sites [(layer, SAE or None)]; see the head of this file.

    eot: the token that ends a document; without it, each window counts as a document.

    Returns {"rows": one for each neuron, kind and dose, "inserted": the cost of each kind before
    anything is changed, "attribution": weights against runs, "live": how many neurons fire, and
    which were drawn}. Raises UserError for a dead layer or too little text.
    """
    T = min(64, model.config.block_size)
    n_windows = max(2, -(-tokens // T))
    choosing, measuring, counting = windows(corpus, T, n_windows, seed, eot=eot)
    _, rank = measuring[2].unique(return_inverse=True)
    baseline = Baseline(model, choosing[:2], measuring[:2], top, rank % GROUPS)
    batches = list(zip(*(ids.split(16) for ids in counting[:2])))
    measured = {"rows": [], "inserted": [], "attribution": [], "live": []}
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    progress = Progress("measure", len(sites), every=0)
    for done, (layer, sae) in enumerate(sites, 1):
        largest = maxima(model, layer, (x for x, _ in batches), sae)
        drawn = draw(largest, n, rng)
        if not drawn:
            raise UserError(
                f"nothing in layer {layer} ever fired on held-out text, so there is no maximum to "
                "multiply; train longer, or give other text with --data."
            )
        live = {"live": int((largest > 0).sum()), "of": len(largest), "drawn": drawn}
        measured["live"].append({"layer": layer, "sae": sae and sae.name, **live})
        measured["inserted"] += inserted(baseline, kinds(model, layer, drawn[0], sae, generator))
        following = followers(model, layer, sae, drawn, batches, top)
        for neuron, seen in zip(drawn, following):
            unit = largest[neuron].item()
            interventions = kinds(model, layer, neuron, sae, generator)
            measured["rows"] += responses(baseline, interventions, unit, doses, seen)
        if sae is None:
            compared = attribution(model, baseline.text, layer, drawn, largest, doses)
            measured["attribution"] += compared
        progress.update(done)
    return measured


def inserted(baseline, interventions):
    """A row for each kind but random: its cost when the neuron keeps its value."""
    rows = []
    for kind, intervention in interventions.items():
        if kind != "random":
            cost = baseline.response(replace(intervention, op="scale", value=1.0), {})
            costs = {name: cost[name] for name in ("kl", "loss")}
            rows.append({"layer": intervention.layer, "kind": kind, **costs})
    return rows


def responses(baseline, interventions, unit, doses, seen):
    """The rows of one neuron or feature: every kind, every dose (a multiple of `unit`)."""
    rows = []
    named = None
    for kind, intervention in interventions.items():
        own = baseline.continuations(replace(intervention, value=CHOOSE * unit))
        named = own if named is None else named
        tokens = {"effect": named, "own": own, "seen": seen}
        for dose in doses:
            response = baseline.response(replace(intervention, value=dose * unit), tokens)
            row = {
                "layer": intervention.layer,
                "sae": intervention.sae and intervention.sae.name,
                "kind": kind,
                "neuron": intervention.neuron,
                "dose": dose,
                "unit": unit,
                **response,
                "raised": own.tolist(),
                "followers": seen.tolist(),
            }
            rows.append(row)
    return rows


@torch.no_grad()
def attribution(model, ids, layer, drawn, largest, doses):
    """Direct attribution against a run; both set a neuron at the last token of each window of ids.

    A row for the smallest and the largest dose, of means over windows and neurons: "correlation"
    over the vocabulary, "null", the same with another drawn neuron's attribution (None if there is
    none), and "top10", the share of the ten most raised tokens on which both agree.
    """
    z, codes = stream(model, ids)
    z, a = z[:, -1], codes[layer][:, -1]
    logits = F.linear(model.norm(z), model.tokens.weight)
    rows = []
    for dose in (min(doses), max(doses)):
        by_run, by_weights = [], []
        for neuron in drawn:
            value = dose * largest[neuron].item()
            with steer(model, [Intervention(layer, neuron, "set", value, "last")]):
                steered = F.linear(model.trunk(ids)[0][:, -1], model.tokens.weight)
            by_run.append(steered - logits)
            change = torch.zeros_like(a)
            change[:, neuron] = value - a[:, neuron]
            by_weights.append(direct_effect(model, z, layer, change))
        agreement = _agreement(torch.stack(by_run), torch.stack(by_weights))
        rows.append({"layer": layer, "dose": dose, **agreement, "n": len(drawn)})
    return rows


def _agreement(run, direct):
    """Agreement of two changes of logits (neurons, windows, V), as in `attribution`."""
    V = run.shape[-1]
    both = F.one_hot(torch.stack((run, direct)).topk(10).indices, V).sum(-2).prod(0)
    run = run - run.mean(-1, True)
    direct = direct - direct.mean(-1, True)
    null = None
    if len(run) > 1:
        null = F.cosine_similarity(run, direct.roll(1, 0), dim=-1).mean().item()
    return {
        "top10": both.sum(-1).float().mean().item() / 10,
        "correlation": F.cosine_similarity(run, direct, dim=-1).mean().item(),
        "null": null,
    }


# ---- summaries over neurons and documents --------------------------------------------------------


def interval(versions, rng):
    """{"n", "mean", "ci95"} of a metric over neurons, neurons and documents redrawn.

    versions: lists of the neurons' values, None where one has none: on all documents, then without
    each group of them. Other neurons and other documents each add their variance. No interval of
    one neuron.
    """
    known = [i for i, value in enumerate(versions[0]) if value is not None]
    if not known:
        return {"n": 0, "mean": None, "ci95": None}
    whole = np.array([versions[0][i] for i in known], float)
    sources = [whole - whole.mean()]
    means = []
    for version in versions[1:]:
        values = [version[i] if version[i] is not None else versions[0][i] for i in known]
        means.append(np.mean(values))
    if len(means) > 1:
        sources.append((len(means) - 1) * (np.mean(means) - np.array(means)))
    bounds = stats.bootstrap_interval(sources, seed=rng, weights=[1] * len(sources))
    mean = whole.mean().item()
    return {"n": len(known), "mean": mean, "ci95": bounds and [mean + bound for bound in bounds]}


def versions_of(rows):
    """[rows, rows without a group of documents, ..]; only the first if the rows know no groups."""
    groups = max((len(row.get("windows", [])) for row in rows), default=0)
    return [rows, *([_without(row, group) for row in rows] for group in range(groups))]


def _without(row, group):
    """A row without one group of documents; itself if it has no such group, or no other."""
    counts = np.array(row.get("windows", []), float)
    if group >= len(counts) or len(counts) < 2:
        return row
    counts[group] = 0
    means = {}
    for metric, values in row["by_group"].items():
        means[metric] = float(np.average(values, weights=counts))
    return {**row, **means}


def at_kl(rows, metric, kl=AT_KL):
    """A metric of one neuron at the side effect `kl`, log-linear between its doses, or None."""
    points = sorted((max(row["kl"], 1e-12), row[metric]) for row in rows)
    sides, values = zip(*points)
    if not sides[0] <= kl <= sides[-1]:
        return None
    return float(np.interp(np.log(kl), np.log(sides), values))


def by_neuron(rows):
    """{(layer, SAE, neuron): its rows}: features of two autoencoders may share a number."""
    groups = {}
    for row in rows:
        groups.setdefault((row["layer"], row.get("sae"), row["neuron"]), []).append(row)
    return groups


def contrasts(rows, seed):
    """{"neuron - random": {metric: interval}, ..} at equal side effect, paired by neuron.

    Only neurons and features that reach AT_KL both ways count.
    """
    rng = np.random.default_rng(seed)
    versions = [by_neuron(version).values() for version in versions_of(rows)]
    compared = {}
    for a, b in (("neuron", "random"), ("feature", "feature+error")):
        intervals = {}
        for metric in ("own", "seen"):
            differences = [
                [_difference(group, metric, a, b) for group in groups] for groups in versions
            ]
            intervals[metric] = interval(differences, rng)
        if intervals["own"]["n"]:
            compared[f"{a} - {b}"] = intervals
    return compared


def _difference(rows, metric, a, b):
    """A metric of one neuron at AT_KL, kind a minus kind b; None where either has none."""
    values = []
    for kind in (a, b):
        rows_of_kind = [row for row in rows if row["kind"] == kind]
        values.append(at_kl(rows_of_kind, metric) if rows_of_kind else None)
    return None if None in values else values[0] - values[1]


def summary(rows, seed):
    """{kind: {"doses": {dose: {metric: interval}}, "at_kl": {metric: interval}}} over neurons."""
    rng = np.random.default_rng(seed)
    versions = versions_of(rows)
    summaries = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of_kind = [_where(version, "kind", kind) for version in versions]
        doses = {}
        for dose in dict.fromkeys(row["dose"] for row in of_kind[0]):
            at_dose = [_where(version, "dose", dose) for version in of_kind]
            doses[f"{dose:g}"] = _intervals(at_dose, METRICS, rng)
        equal = []
        for version in of_kind:
            equal.append([_at_equal_kl(group) for group in by_neuron(version).values()])
        summaries[kind] = {"doses": doses, "at_kl": _intervals(equal, GAINS, rng)}
    return summaries


def _where(rows, name, value):
    return [row for row in rows if row[name] == value]


def _intervals(versions, metrics, rng):
    """{metric: interval of its values in the versions of rows}."""
    intervals = {}
    for metric in metrics:
        values = [[row[metric] for row in version] for version in versions]
        intervals[metric] = interval(values, rng)
    return intervals


def _at_equal_kl(rows):
    """{metric: value at AT_KL, or None} of one neuron."""
    return {metric: at_kl(rows, metric) for metric in GAINS}
