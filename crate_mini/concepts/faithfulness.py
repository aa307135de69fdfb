"""Does the classifier use a concept? Take the code of the salient word out and see what is left, twice:

    probe, read-out     the original's form: out of a text's state at the lower layer, judged by probes; that
    probe, mean         state is the read-out's (as it does for BERT) or the mean of the words' (for LLaMA)
    last                inside the model: out of the read-out's place at that layer; all blocks above and the
                        real head run on
    all                 inside the model, out of every place

beside controls that any rank-one cut would pass (ablate.VARIANTS). "retrained" is no cut of its own: a new
probe on the states without the own code (inside the model: on what the head reads then) tells whether what
was lost is gone or only moved. Accuracy below what any constant answer has is no lost information but a sign
flip: whoever turns the answers round has it again.
"""

import numpy as np
import torch
import torch.nn.functional as F

from crate_mini.concepts.ablate import VARIANTS, Above, code_directions, shared_directions, without
from crate_mini.concepts.probe import Probes
from crate_mini.neurons.survey import wilson

FOLDS, DRAWS = 20, 1000  # of the probes; of the bootstrap over texts
PROBES = {"probe, read-out": "h", "probe, mean": "mean"}  # form: field of Items
FORMS = (*PROBES, "last", "all")
AGAINST = (
    "another",
    "same class",
    "mean",
    "raw",
    "gaussian",
)  # what the own code must do more harm than


def bootstrap(values, seed=0):
    """95 % interval of the mean of values (n,), texts redrawn."""
    values = np.asarray(values, float)
    rows = np.random.default_rng(seed).integers(0, len(values), (DRAWS, len(values)))
    return np.percentile(values[rows].mean(1), [2.5, 97.5]).tolist()


def outcome(right, intact, chance, fold=None, least=None):
    """What a cut does: right, intact (n,) bool with and without it; fold (n,) for the spread over folds.

    chance, least: shares of the largest and the smallest class (the same if not given); whoever knows nothing
    of the text is right as often as one of them, or between.
    verdict: "nothing to lose" (chance lies within the interval of the accuracy without the cut), "sign flip"
    (accuracy below least, its interval too), "at chance" (not above chance by its interval), "drop" (the
    drop's interval is above 0), else "no drop".
    """
    p, whole, drop = right.mean(), intact.mean(), intact.astype(float) - right
    low, high = wilson(int(right.sum()), len(right))
    between = bootstrap(drop)
    least = chance if least is None else least
    verdict = (
        "nothing to lose"
        if wilson(int(intact.sum()), len(intact))[0] <= chance
        else "sign flip"
        if high < least
        else "at chance"
        if low <= chance
        else "drop"
        if between[0] > 0
        else "no drop"
    )
    found = {
        "n": len(right),
        "accuracy": float(p),
        "ci95": [low, high],
        "chance": chance,
        "drop": float(whole - p),
        "drop_ci95": between,
        "relative_drop": float((whole - p) / whole) if whole else None,
        "verdict": verdict,
    }
    if fold is not None:
        means = [right[fold == f].mean() for f in np.unique(fold)]
        found |= {"folds": len(means), "std_over_folds": float(np.std(means))}
    return found


class Trial:
    """All cuts of one classifier on its Items; `shared`: the controls without codes, `codes`: one method's.

    whole: how many of the items the form "all" is run on, which costs the most (the first; 0: none).
    """

    def __init__(self, model, vectors, found, seed, folds=FOLDS, whole=200):
        self.vectors, self.found, self.seed, self.folds = vectors, found, seed, folds
        self.C, layer = len(vectors.classes), vectors.facts["layers"][0]
        self.above = Above(model, found, layer)
        self.whole = min(whole, len(found.row))
        self.few = Above(model, found.first(self.whole), layer) if self.whole else None
        self.states = {form: getattr(found, name) for form, name in PROBES.items()}
        self.probes = {
            form: Probes(x, found.label, self.C, folds, seed) for form, x in self.states.items()
        }
        nothing = torch.zeros_like(found.h)
        read = {"last": self.above.last([nothing])[0]}
        if self.whole:
            read["all"] = self.few.all(nothing[: self.whole])
        self.intact = {
            **{form: self.probes[form].right(x) for form, x in self.states.items()},
            **{k: self.right(v) for k, v in read.items()},
        }
        self.predicted = {k: v[0].argmax(1) for k, v in read.items()}
        self.sure = {k: self.probability(v, self.predicted[k]) for k, v in read.items()}

    def right(self, result):
        return (result[0].argmax(1) == self.found.label[: len(result[0])]).numpy()

    def judged(self, right, form, fold=None):
        """The `outcome` of a form, with the classes' shares among its own texts."""
        shares = torch.bincount(self.found.label[: len(right)], minlength=self.C) / len(right)
        return outcome(right, self.intact[form], shares.max().item(), fold, shares.min().item())

    @staticmethod
    def probability(result, of):
        """(n,) of the class `of` (n,) in a result's logits."""
        return F.softmax(result[0], 1).gather(1, of[:, None])[:, 0].numpy()

    def run(self, directions):
        """{form: {variant: (n,) bool right}} and {form: {variant: outcome}} of {variant: (n, d) directions};
        the third: {form: (n, d) states without the own code}, for what is trained anew."""
        right, told, read = {}, {}, {}
        for form, x in self.states.items():
            probes = self.probes[form]
            right[form] = {v: probes.right(without(x, u)) for v, u in directions.items()}
            told[form] = {
                v: self.judged(r, form, probes.fold.numpy()) for v, r in right[form].items()
            }
            read[form] = without(x, directions["own"]) if "own" in directions else None
        results = {"last": dict(zip(directions, self.above.last(list(directions.values()))))}
        if self.whole:
            results["all"] = {v: self.few.all(u[: self.whole]) for v, u in directions.items()}
        for form, found in results.items():
            right[form] = {v: self.right(result) for v, result in found.items()}
            told[form] = {v: self.judged(r, form) for v, r in right[form].items()}
            for v, result in found.items():
                change = self.probability(result, self.predicted[form]) - self.sure[form]
                told[form][v] |= {
                    "probability_change": float(change.mean()),
                    "probability_change_ci95": bootstrap(change),
                }
            read[form] = found["own"][1] if "own" in found else None
        return right, told, read

    def shared(self):
        """The controls that no codebook enters: (right, {form: {variant: outcome}}), intact among them."""
        right, told, _ = self.run(shared_directions(self.vectors, self.found, self.seed))
        for form, found in told.items():
            fold = self.probes[form].fold.numpy() if form in PROBES else None
            found["intact"] = self.judged(self.intact[form], form, fold)
        return right, told

    def codes(self, codes, shared):
        """One method: {form: {variant: outcome}, "partners": shares of equal codes, "survives": {form: ..}}.

        shared: the first that `shared` returned. survives: for each control of AGAINST, how much more often
        the answer is right without the control's direction than without the own code's, with its interval,
        and whether that is above 0.
        """
        directions, equal = code_directions(codes, self.vectors, self.found, self.seed)
        right, told, read = self.run(directions)
        told["partners"], told["survives"] = equal, {}
        for form in right:
            label = self.found.label[: len(read[form])]
            if len(label) >= 2 * self.folds:
                anew = Probes(read[form], label, self.C, self.folds, self.seed)
                told[form]["retrained"] = self.judged(
                    anew.right(read[form]), form, anew.fold.numpy()
                )
            own, every = right[form]["own"].astype(float), {**right[form], **shared[form]}
            told["survives"][form] = {}
            for name in AGAINST:
                more = every[name] - own
                between = bootstrap(more)
                told["survives"][form][name] = {
                    "difference": float(more.mean()),
                    "ci95": between,
                    "passes": between[0] > 0,
                }
        return told


def table(methods, shared, form):
    """Accuracy by method and cut in one form, with what it is called, as text for people."""
    names = [*VARIANTS, "retrained"]
    lines = [
        f"{form}: intact {shared[form]['intact']['accuracy']:.3f}, chance "
        f"{shared[form]['intact']['chance']:.3f}, n {shared[form]['intact']['n']}"
    ]
    lines += [f"{'taken out':<18}" + "".join(f"{method:>23}" for method in methods)]
    for name in names:
        cells = []
        for found in methods.values():
            one = found[form].get(name) or shared[form].get(name)
            cells.append("-" if one is None else f"{one['accuracy']:.3f} {one['verdict']}")
        lines.append(f"{name:<18}" + "".join(f"{cell:>23}" for cell in cells))
    return "\n".join(lines)
