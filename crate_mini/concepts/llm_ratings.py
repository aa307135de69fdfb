"""Language models as judges: how plausibly do a concept's words support the classifier's answer?

CLVQ-VAE's third evaluation, without what made its judges partial: a judge sees one concept at a
time and no method's name, in an order drawn by the seed, and is asked for plausibility alone. The
test texts are spread evenly over the answers, right and wrong, as far as there are enough. The
judges are the clients of `interpret.py llm`, behind the same answer cache: a run that stopped can
continue, and any run can be replayed without a model.
"""

import itertools
import re
from pathlib import Path

import numpy as np

from crate_mini import UserError
from crate_mini.concepts.concept_words import TOP
from crate_mini.console.terminal import track
from crate_mini.judges import prompt_files
from crate_mini.judges.answer_cache import AnswerCache, BudgetSpent
from crate_mini.judges.language_model import LanguageModel
from crate_mini.judges.queries import NoAnswer
from crate_mini.neurons.ranks import ranks, spearman
from crate_mini.stats import pearson

SCALE = (1, 2, 3)
MOST_FAILED = 0.05  # share of ratings without an answer above which a judge is refused


# ---- asking --------------------------------------------------------------------------------------


def check(judges, folder, settings):
    """Raise UserError for judges that cannot be asked, before anything else is done for them."""
    if len(set(judges)) != len(judges):
        raise UserError(f"the judges {', '.join(judges)} are not all different; name each once.")
    if not judges:
        return
    cache = AnswerCache(Path(folder, "judge-cache.jsonl"), settings.budget, settings.replay)
    for spec in judges:
        judge = LanguageModel(spec, cache, settings.url, settings.key_env, flag="--judges")
        if not settings.replay:
            judge.check_client()


def run(cards, judges, folder, settings, seed=0):
    """Ratings of all cards, from report.cards, by the judges (hf:NAME or http:MODEL).

    settings: has url, key_env, budget, record and replay, as command.Settings. The answer cache is
    in `folder`. Returns a JSON-able dict, see `statistics`. Raises UserError as LanguageModel does,
    and when a judge leaves more than 5 % unanswered.
    """
    cache = AnswerCache(Path(folder, "judge-cache.jsonl"), settings.budget, settings.replay)
    order = questions(cards, seed)
    ratings, failed, stopped = {}, {}, None
    for spec in judges:
        judge = LanguageModel(spec, cache, settings.url, settings.key_env)
        given, failures, spent = rate_all(judge, cards, order)
        ratings[judge.name] = given
        failed[judge.name] = len(failures)
        if spent:
            stopped = f"budget of {settings.budget:,} tokens used up; the same command continues"
        if len(failures) > MOST_FAILED * len(order):
            raise UserError(
                f"{judge.name} gave {len(failures)} of {len(order)} ratings that cannot be used "
                f"(last: {failures[-1]}); it cannot judge."
            )
    if settings.record:
        cache.record(settings.record, {"judges": judges, "seed": seed})
    version, _ = prompt_files.load("concept")
    return {
        "prompt": version,
        "cards": len(cards),
        "failed": failed,
        "stopped": stopped,
        "seed": seed,
        "total": cache.total(),
        **statistics(ratings, order),
    }


def questions(cards, seed):
    """[(item, method)], every concept of every card, in an order that gives nothing away."""
    pairs = [(i, method) for i, card in enumerate(cards) for method in card["concepts"]]
    return [pairs[i] for i in np.random.default_rng(seed).permutation(len(pairs))]


def rate_all(judge, cards, order):
    """({(item, method): rating}, [why a rating failed], whether the budget ended it) of a judge."""
    ratings, failures = {}, []
    try:
        for i, method in track(order, judge.name[:9]):
            try:
                ratings[i, method] = rate(judge, cards[i], cards[i]["concepts"][method])
            except NoAnswer as error:
                failures.append(str(error))
    except BudgetSpent:
        return ratings, failures, True
    return ratings, failures, False


def rate(judge, card, words):
    """A judge's rating, 1 to 3, of a concept's words on one text. Raises NoAnswer.

    1 without asking for a concept without words, as in the authors' code.
    """
    if not words:
        return 1
    prompt = prompt_files.fill(
        "concept",
        judge.style,
        text=prompt_files.json_string(card["text"]),
        answer=card["answer"],
        classes=", ".join(card["classes"]),
        words=prompt_files.json_string(words[:TOP]),
    )
    if f"{judge.style} logprobs" in judge.can["can"]:
        logprobs = judge.ask({"ask": "next", **prompt})["next"]
        known = {rating: logprobs[str(rating)] for rating in SCALE if str(rating) in logprobs}
        if known:
            return max(known, key=known.get)
        raise NoAnswer("none of 1, 2, 3 among the likely answers")
    answer = judge.ask({"ask": "text", "most": 4, **prompt})["text"]
    number = re.search(r"[123]", answer)
    if not number:
        raise NoAnswer(f"no rating in {answer[:40]!r}")
    return int(number[0])


# ---- agreement -----------------------------------------------------------------------------------


def statistics(ratings, order):
    """Ratings by method and judge, and how well the judges agree.

    ratings: {judge: {(item, method): 1..3}}; order: all (item, method). agreement, None with one
    judge: krippendorff's alpha with interval distances; pearson, the mean over pairs of judges;
    spearman, the same of their rankings of the methods; kendall_w of these rankings.
    """
    methods = list(dict.fromkeys(method for _, method in sorted(order)))
    table = {method: {} for method in methods}
    for method in methods:
        for judge, given in ratings.items():
            table[method][judge] = summary([v for (_, m), v in given.items() if m == method])
    return {"methods": table, "agreement": agreement(ratings, order, table)}


def summary(values):
    """{"n", "mean", "shares" by rating} of ratings; only n without any."""
    if not values:
        return {"n": 0}
    shares = {str(rating): values.count(rating) / len(values) for rating in SCALE}
    return {"n": len(values), "mean": float(np.mean(values)), "shares": shares}


def agreement(ratings, order, table):
    """The agreement of `statistics`; None for fewer than two judges."""
    if len(ratings) < 2:
        return None
    matrix = np.array([[given.get(pair, np.nan) for pair in order] for given in ratings.values()])
    means = []
    for judge in ratings:
        means.append([by_judge[judge].get("mean", np.nan) for by_judge in table.values()])
    means = np.array(means)
    by_item, by_method = [], []
    for a, b in itertools.combinations(range(len(matrix)), 2):
        both = np.isfinite(matrix[[a, b]]).all(0)
        by_item.append(pearson(matrix[a, both], matrix[b, both]))
        by_method.append(spearman(means[a], means[b]))
    return {
        "krippendorff": krippendorff(matrix),
        "pearson": mean_of(by_item),
        "spearman": mean_of(by_method),
        "kendall_w": kendall(means),
    }


def mean_of(correlations):
    """Mean of the correlations, (values, reasons) each, that are defined; None if none is."""
    defined = [float(values[0]) for values, reasons in correlations if not reasons[0]]
    return float(np.mean(defined)) if defined else None


def krippendorff(matrix):
    """Krippendorff's alpha with squared differences, 1 - D_observed / D_expected.

    matrix: (judges, units), NaN where unrated; a unit with one rating does not count. None where
    all ratings are the same.
    """
    units = [column[np.isfinite(column)] for column in np.asarray(matrix, float).T]
    units = [unit for unit in units if len(unit) > 1]
    if not units:
        return None
    values = np.concatenate(units)
    n = len(values)
    observed = sum(pair_distances(unit) / (len(unit) - 1) for unit in units) / n
    expected = pair_distances(values) / (n * (n - 1))
    return float(1 - observed / expected) if expected else None


def pair_distances(values):
    """Sum of squared differences over all ordered pairs of values."""
    return ((values[:, None] - values) ** 2).sum()


def kendall(scores):
    """Kendall's W, with ties, of the scores (m, n) that m judges give n methods.

    None for fewer than two of either, and where each judge ranks all alike.
    """
    scores = np.asarray(scores, float)
    m, n = scores.shape
    if m < 2 or n < 2 or not np.isfinite(scores).all():
        return None
    by_judge = ranks(scores.T)  # (n, m)
    ties = 0
    for judge in scores:
        _, count = np.unique(judge, return_counts=True)
        ties += (count**3 - count).sum()
    totals = by_judge.sum(1)
    spread = ((totals - by_judge.sum() / n) ** 2).sum()
    largest = m * m * (n**3 - n) - m * ties
    return float(12 * spread / largest) if largest else None
