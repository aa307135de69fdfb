"""Language models as judges: how plausibly do a concept's words support what the classifier said?

As CLVQ-VAE's third evaluation, without what made its judges partial: a judge sees one concept at a time, no
method's name, in an order drawn by the seed, and nothing is asked for but plausibility. Items are test texts,
as evenly as there are over right and wrong answers of every class. Who answers: the clients of `interpret.py
llm` behind the same tape, so that a run that stopped goes on, and can be replayed without a model.
"""

import itertools
import re
from pathlib import Path

import numpy as np

from crate_mini import UserError
from crate_mini.concepts.members import TOP
from crate_mini.judges import run as llm
from crate_mini.judges import simulation as rungs
from crate_mini.judges.answer_cache import Spent, Tape
from crate_mini.judges.http_client import Failed
from crate_mini.stats import pearson, ranks, spearman
from crate_mini.training.run_log import track

SCALE = (1, 2, 3)


def stratified(groups, n, seed):
    """Indices of n items (or all), as many of each group (n,) as of the others while it has any."""
    rng, groups = np.random.default_rng(seed), np.asarray(groups)
    order = rng.permutation(len(groups))
    turn = np.empty(len(groups), np.int64)
    for g in np.unique(groups):
        own = order[groups[order] == g]
        turn[own] = np.arange(len(own))
    return order[np.argsort(turn[order], kind="stable")][:n]


def questions(cards, seed):
    """[(item, method)] in an order that tells nothing; cards: [{"concepts": {method: [words]}, ..}]."""
    pairs = [(i, method) for i, card in enumerate(cards) for method in card["concepts"]]
    return [pairs[i] for i in np.random.default_rng(seed).permutation(len(pairs))]


def rate(model, card, words):
    """A judge's rating 1..3 of one concept on one text; 1, unasked, for a concept without words (as the
    original). Raises Failed for an answer that names none."""
    if not words:
        return 1
    query = rungs.messages(
        "concept",
        model.style,
        text=rungs.quoted(card["text"]),
        answer=card["answer"],
        classes=", ".join(card["classes"]),
        words=rungs.quoted(words[:TOP]),
    )
    if f"{model.style} logprobs" in model.can["can"]:
        given = model.ask({"ask": "next", **query})["next"]
        known = {n: given[str(n)] for n in SCALE if str(n) in given}
        if known:
            return max(known, key=known.get)
        raise Failed("none of 1, 2, 3 among the likely answers")
    answer = model.ask({"ask": "text", "most": 4, **query})["text"]
    number = re.search(r"[123]", answer)
    if not number:
        raise Failed(f"no rating in {answer[:40]!r}")
    return int(number[0])


def run(cards, judges, folder, settings, seed=0, log=print):
    """Ratings of all cards by the judges (hf:NAME or http:MODEL): a JSON-able dict, see `statistics`.

    settings: llm.Settings for url, key, style, budget, replay. Raises UserError as llm.Model does, and when
    a judge leaves more than 5 % unanswered.
    """
    if len(set(judges)) != len(judges):
        raise UserError(f"the judges {', '.join(judges)} are not all different; name each once.")
    tape = Tape(Path(folder, "judge-cache.jsonl"), settings.budget, settings.replay)
    order, ratings, failed, stopped = questions(cards, seed), {}, {}, None
    for spec in judges:
        model, own = llm.Model(spec, settings, tape), {}
        failed[model.name] = 0
        try:
            for i, method in track(order, model.name[:9]):
                try:
                    own[i, method] = rate(model, cards[i], cards[i]["concepts"][method])
                except Failed as e:
                    failed[model.name], why = failed[model.name] + 1, e
        except Spent:
            stopped = (
                f"budget of {settings.budget:,} tokens used up; the same command goes on from here"
            )
        if failed[model.name] > 0.05 * len(order):
            raise UserError(
                f"{model.name} gave {failed[model.name]} of {len(order)} ratings that cannot be "
                f"used (last: {why}); it cannot judge."
            )
        ratings[model.name] = own
    if settings.record:
        tape.record(settings.record, {"judges": judges, "seed": seed})
    return {
        "prompt": rungs.prompt_file("concept")[0],
        "cards": len(cards),
        "failed": failed,
        "stopped": stopped,
        "seed": seed,
        "total": tape.total(),
        **statistics(ratings, order),
    }


def statistics(ratings, order):
    """ratings {judge: {(item, method): 1..3}} -> mean and shares by method and judge, agreement of judges.

    krippendorff: alpha with interval distances; pearson: mean over pairs of judges; spearman: the same of
    their rankings of methods; kendall_w of these rankings. None with one judge: nothing to agree.
    """
    methods, table = list(dict.fromkeys(m for _, m in sorted(order))), {}
    for judge, own in ratings.items():
        for m in methods:
            values = [v for (_, method), v in own.items() if method == m]
            table.setdefault(m, {})[judge] = (
                {
                    "n": len(values),
                    "mean": float(np.mean(values)),
                    "shares": {str(s): values.count(s) / len(values) for s in SCALE},
                }
                if values
                else {"n": 0}
            )
    matrix = np.array(
        [[own.get(pair, np.nan) for pair in order] for own in ratings.values()], float
    )
    means = np.array([[table[m][j].get("mean", np.nan) for m in methods] for j in ratings])
    pairs = list(itertools.combinations(range(len(matrix)), 2))
    both = [np.isfinite(matrix[[a, b]]).all(0) for a, b in pairs]
    return {
        "methods": table,
        "agreement": None
        if not pairs
        else {
            "krippendorff": krippendorff(matrix),
            "pearson": mean_of(
                pearson(matrix[a, k], matrix[b, k]) for (a, b), k in zip(pairs, both)
            ),
            "spearman": mean_of(spearman(means[a], means[b]) for a, b in pairs),
            "kendall_w": kendall(means),
        },
    }


def mean_of(results):
    """Mean of metrics' (values, why) that are defined; None if none is."""
    found = [float(value[0]) for value, why in results if not why[0]]
    return float(np.mean(found)) if found else None


def krippendorff(matrix):
    """Krippendorff's alpha with squared differences, 1 - D_observed / D_expected, of (judges, units), NaN
    where unrated; units with one rating do not count. None where all ratings are the same."""
    units = [column[np.isfinite(column)] for column in np.asarray(matrix, float).T]
    units = [u for u in units if len(u) > 1]
    if not units:
        return None
    values = np.concatenate(units)
    observed = sum(((u[:, None] - u) ** 2).sum() / (len(u) - 1) for u in units) / len(values)
    expected = ((values[:, None] - values) ** 2).sum() / (len(values) * (len(values) - 1))
    return float(1 - observed / expected) if expected else None


def kendall(scores):
    """Kendall's W, with ties, of m judges' scores (m, n) of n methods; None for fewer than two of either, or
    where each judge ranks all alike."""
    scores = np.asarray(scores, float)
    m, n = scores.shape
    if m < 2 or n < 2 or not np.isfinite(scores).all():
        return None
    order = ranks(scores.T)  # (n, m)
    ties = sum(
        (count**3 - count).sum()
        for judge in scores
        for count in [np.unique(judge, return_counts=True)[1]]
    )
    spread = ((order.sum(1) - order.sum() / n) ** 2).sum()
    whole = m * m * (n**3 - n) - m * ties
    return float(12 * spread / whole) if whole else None
