"""Does the classifier use a concept? Remove the code of the salient word and see what is lost.

A form says where the direction is removed, and what answers then:

    probe, read-out     from the state that the head reads, at the lower layer; probes answer (the
                        authors' form for BERT)
    probe, mean         from the mean of the words' states; probes answer (their form for LLaMA)
    last                inside the model, from the state that the head reads, at the lower layer;
                        all blocks above and the real head answer
    all                 inside the model, from every position

A variant says which direction: the text's own code, or one of the controls, which any rank-one
ablation would pass (ablate.VARIANTS). "retrained" is not a separate ablation: a new probe on the
states without the own code (inside the model: on what the head then reads) shows whether the
information is gone or has only moved. Accuracy below that of any constant answer is not lost
information but a sign flip: the opposite answers are right.
"""

import numpy as np
import torch
import torch.nn.functional as F

from crate_mini import stats
from crate_mini.concepts.ablate import (
    VARIANTS,
    UpperLayers,
    code_directions,
    shared_directions,
    without,
)
from crate_mini.concepts.probe import Probes

FOLDS = 20  # of the probes
DRAWS = 1000  # of the bootstrap over texts
PROBES = {"probe, read-out": "h", "probe, mean": "mean"}  # form: field of SalientTexts
FORMS = (*PROBES, "last", "all")
AGAINST = ("another", "same class", "mean", "raw", "gaussian")  # must do less harm than the code
COLUMN = 23  # characters, in `table`


# ---- statistics of one ablation ------------------------------------------------------------------


def interval(values):
    """95 % interval of the mean of values (n,) of texts, redrawn; of one text its value, twice."""
    return stats.bootstrap_interval([values], DRAWS) or [float(values[0])] * 2


def outcome(right, intact, chance, fold=None, least=None):
    """The effect of an ablation on accuracy: a JSON-able dict.

    right, intact: (n,) bool, with and without it. chance, least: shares of the largest and of the
    smallest class (equal if not given); an answer that knows nothing of the text is right as often
    as one of them, or between. fold: (n,), for the spread over folds.
    """
    accuracy = right.mean()
    intact_accuracy = intact.mean()
    drop = intact.astype(float) - right
    ci95 = list(stats.wilson(int(right.sum()), len(right)))
    drop_ci95 = interval(drop)
    intact_low, _ = stats.wilson(int(intact.sum()), len(intact))
    least = chance if least is None else least
    relative = (intact_accuracy - accuracy) / intact_accuracy if intact_accuracy else None
    result = {
        "n": len(right),
        "accuracy": float(accuracy),
        "ci95": ci95,
        "chance": chance,
        "drop": float(intact_accuracy - accuracy),
        "drop_ci95": drop_ci95,
        "relative_drop": None if relative is None else float(relative),
        "verdict": verdict(ci95, drop_ci95, intact_low, chance, least),
    }
    if fold is not None:
        means = [right[fold == f].mean() for f in np.unique(fold)]
        result |= {"folds": len(means), "std_over_folds": float(np.std(means))}
    return result


def verdict(ci95, drop_ci95, intact_low, chance, least):
    """An ablation in words.

    ci95, drop_ci95: intervals of the accuracy and of its drop; intact_low: lower end of the
    interval of the accuracy without the ablation.
    """
    low, high = ci95
    if intact_low <= chance:
        return "nothing to lose"
    if high < least:
        return "sign flip"
    if low <= chance:
        return "at chance"
    if drop_ci95[0] > 0:
        return "drop"
    return "no drop"


# ---- all ablations -------------------------------------------------------------------------------


class Ablations:
    """All ablations of one classifier on its SalientTexts, with one seed.

    n_all: on how many of the texts, the first, the form "all" is run, which costs most; 0: it is
    left out.
    """

    def __init__(self, model, vectors, texts, seed, folds=FOLDS, n_all=200):
        self.vectors = vectors
        self.texts = texts
        self.seed = seed
        self.folds = folds
        self.n_classes = len(vectors.classes)
        self.n_all = min(n_all, len(texts.row))
        layer = vectors.facts["layers"][0]
        self.upper = UpperLayers(model, texts, layer)
        self.upper_all = UpperLayers(model, texts.first(self.n_all), layer) if self.n_all else None
        self.probes = {}
        self.intact = {}  # form: (n,) bool, right without any ablation
        for form in PROBES:
            self.probes[form] = self._new_probes(self._states(form))
            self.intact[form] = self.probes[form].right(self._states(form))
        self.predicted = {}  # form: (n,) class that the intact model predicts
        self.confidence = {}  # form: (n,) its probability
        for form, (logits, _) in self._intact_results().items():
            self.intact[form] = self._right(logits)
            self.predicted[form] = logits.argmax(1)
            self.confidence[form] = probability(logits, self.predicted[form])

    def _states(self, form):
        """(n, d): the states that the probes of a form read."""
        return getattr(self.texts, PROBES[form])

    def _new_probes(self, states):
        """Probes trained on states (n, d) of the first n texts."""
        label = self.texts.label[: len(states)]
        return Probes(states, label, self.n_classes, self.folds, self.seed)

    def _intact_results(self):
        """{form: (logits, read)} of the model itself, with a direction of length 0 removed."""
        nothing = torch.zeros_like(self.texts.h)
        results = {"last": self.upper.remove_from_last([nothing])[0]}
        if self.n_all:
            results["all"] = self.upper_all.remove_everywhere(nothing[: self.n_all])
        return results

    def _right(self, logits):
        return (logits.argmax(1) == self.texts.label[: len(logits)]).numpy()

    def _outcome(self, right, form, fold=None):
        """The `outcome` of an ablation; chance is counted among the texts that the form uses."""
        label = self.texts.label[: len(right)]
        shares = torch.bincount(label, minlength=self.n_classes) / len(right)
        chance, least = shares.max().item(), shares.min().item()
        return outcome(right, self.intact[form], chance, fold, least)

    def run(self, directions):
        """Remove each of the directions {variant: (n, d)} in every form.

        Returns three dicts by form: {variant: (n,) bool, right}, {variant: outcome}, and the states
        without the own code (n, d), on which new probes can be trained; None without that variant.
        """
        right, outcomes, states = {}, {}, {}
        for form in PROBES:
            right[form], outcomes[form], states[form] = self._run_probes(form, directions)
        results = {"last": self.upper.remove_from_last(list(directions.values()))}
        if self.n_all:
            results["all"] = [
                self.upper_all.remove_everywhere(u[: self.n_all]) for u in directions.values()
            ]
        for form, by_direction in results.items():
            by_variant = dict(zip(directions, by_direction))
            right[form], outcomes[form], states[form] = self._judge_model(form, by_variant)
        return right, outcomes, states

    def _run_probes(self, form, directions):
        """The results of `run` for one form in which probes answer."""
        probes, states = self.probes[form], self._states(form)
        right, outcomes = {}, {}
        for variant, u in directions.items():
            right[variant] = probes.right(without(states, u))
            outcomes[variant] = self._outcome(right[variant], form, probes.fold.numpy())
        own = directions.get("own")
        return right, outcomes, None if own is None else without(states, own)

    def _judge_model(self, form, results):
        """The results of `run` for one form in which the model answers; results: by variant."""
        right, outcomes = {}, {}
        for variant, (logits, _) in results.items():
            right[variant] = self._right(logits)
            change = probability(logits, self.predicted[form]) - self.confidence[form]
            outcomes[variant] = {
                **self._outcome(right[variant], form),
                "probability_change": float(change.mean()),
                "probability_change_ci95": interval(change),
            }
        states = results["own"][1] if "own" in results else None
        return right, outcomes, states

    def shared_controls(self):
        """The controls without codes: (right, {form: {variant: outcome}}), "intact" among them."""
        directions = shared_directions(self.vectors, self.texts, self.seed)
        right, outcomes, _ = self.run(directions)
        for form, by_variant in outcomes.items():
            fold = self.probes[form].fold.numpy() if form in PROBES else None
            by_variant["intact"] = self._outcome(self.intact[form], form, fold)
        return right, outcomes

    def of_codes(self, codes, shared_right):
        """The ablations of one method's Codes; shared_right: the first of `shared_controls`.

        Returns {form: {variant: outcome}, "partners": share of equal codes by variant, "survives":
        {form: {control: ...}}}: for each control of AGAINST how much more often the answer is right
        without the control's direction than without the own code, and whether that is above 0.
        """
        directions, equal = code_directions(codes, self.vectors, self.texts, self.seed)
        right, outcomes, states = self.run(directions)
        survives = {}
        for form, by_variant in right.items():
            if len(states[form]) >= 2 * self.folds:
                probes = self._new_probes(states[form])
                fold = probes.fold.numpy()
                retrained = self._outcome(probes.right(states[form]), form, fold)
                outcomes[form]["retrained"] = retrained
            survives[form] = compare(by_variant["own"], {**by_variant, **shared_right[form]})
        return {**outcomes, "partners": equal, "survives": survives}


def probability(logits, classes):
    """(n,) probability of the given class (n,) of each text, from logits (n, C)."""
    return F.softmax(logits, 1).gather(1, classes[:, None])[:, 0].numpy()


def compare(own, controls):
    """{control of AGAINST: {"difference", "ci95", "passes"}} of right answers, (n,) bool each.

    The own code passes if its ablation does more harm than the control's, by the whole interval.
    """
    results = {}
    for name in AGAINST:
        difference = controls[name] - own.astype(float)
        ci95 = interval(difference)
        results[name] = {
            "difference": float(difference.mean()),
            "ci95": ci95,
            "passes": ci95[0] > 0,
        }
    return results


# ---- the table -----------------------------------------------------------------------------------


def table(methods, shared, form):
    """Accuracy and verdict by variant and method in one form, as text.

    methods: {name: outcomes of its codes}. shared: outcomes of the controls without codes.
    """
    intact = shared[form]["intact"]
    lines = [
        f"{form}: intact {intact['accuracy']:.3f}, chance {intact['chance']:.3f}, n {intact['n']}",
        table_row("taken out", methods),
    ]
    for variant in (*VARIANTS, "retrained"):
        cells = []
        for outcomes in methods.values():
            result = outcomes[form].get(variant) or shared[form].get(variant)
            cells.append(f"{result['accuracy']:.3f} {result['verdict']}" if result else "-")
        lines.append(table_row(variant, cells))
    return "\n".join(lines)


def table_row(name, cells):
    return f"{name:<18}" + "".join(f"{cell:>{COLUMN}}" for cell in cells)
