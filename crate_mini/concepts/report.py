"""What a run of `interpret.py concepts` found, as one JSON-able dict, and as tables for people."""

import numpy as np

from crate_mini import results as evidence
from crate_mini.concepts import codebook_checks as health
from crate_mini.concepts import faithfulness, members
from crate_mini.concepts.llm_ratings import stratified
from crate_mini.concepts.types import SPLITS

AROUND = 12  # words of a text shown on both sides of a marked one
EXAMPLES = 3  # texts shown with a code


def cards(run):
    """[{"text", "answer", "right", "classes", "concepts": {method: words}}] of the test texts with a salient
    word, as evenly as there are over answers and whether they are right; run: stages.Concepts."""
    said = run.said[run.found.text]
    right = said == run.v.label[run.found.text]
    codes = {m: run.codes[m, run.seeds[0]] for m in run.methods}
    words = {
        m: [[w for w, _ in own[: members.TOP]] for own in members.members(c, run.v)]
        for m, c in codes.items()
    }
    order = stratified([f"{a} {r}" for a, r in zip(said, right)], len(said), run.seeds[0])
    return [
        {
            "text": " ".join(run.text.words[run.found.text[i]]),
            "answer": run.v.classes[said[i]],
            "right": bool(right[i]),
            "classes": run.v.classes,
            "concepts": {m: words[m][c.assignment[run.found.row[i]]] for m, c in codes.items()},
        }
        for i in order.tolist()
    ]


def pictured(run, method):
    """Codes of a method for the page: `shown` of those that have words, drawn by the first seed."""
    codes = run.codes[method, run.seeds[0]]
    own, mix = members.members(codes, run.v), members.class_mix(codes, run.v)
    there = [j for j, words in enumerate(own) if words]
    rng = np.random.default_rng(run.seeds[0])
    drawn = sorted(rng.choice(there, min(run.s.shown, len(there)), replace=False).tolist())
    salient = dict(zip(run.found.row.tolist(), run.found.text.tolist()))
    train = run.v.rows("train")
    out = []
    for j in drawn:
        rows = np.flatnonzero(codes.assignment == j)
        first = [(i, "salient") for i in rows.tolist() if i in salient]
        rest = [(i, "training text") for i in rows[train[rows]].tolist()]
        picked = [rest[i] for i in rng.permutation(len(rest))]
        out.append(
            {
                "code": j,
                "size": int(train[rows].sum()),
                "words": own[j][: members.TOP],
                "mix": mix[j].tolist(),
                "examples": [example(run, *e) for e in (first + picked)[:EXAMPLES]],
            }
        )
    return {"codes": out, "with_members": len(there), "wordless": members.wordless(own)}


def example(run, row, why):
    """The words around one of the Vectors' rows, with its place among them, and what the text is."""
    s, at = int(run.v.sentence[row]), int(run.v.position[row])
    first = max(0, at - AROUND)
    told = f"{run.v.classes[run.v.label[s]]}, answered {run.v.classes[run.said[s]]}; {why}"
    return {"words": run.text.words[s][first : at + AROUND + 1], "at": at - first, "kind": told}


def collect(run):
    """concepts.json: all that the stages found; what was not run says so."""
    first, methods = str(run.seeds[0]), {}
    rows = run.v.rows("test")
    for m in run.methods:
        every = [run.codes[m, seed] for seed in run.seeds]
        methods[m] = {
            "settings": {k: v for k, v in every[0].settings.items() if k != "made"},
            "health": {
                str(seed): {k: v for k, v in c.health.items() if k != "epochs"}
                for seed, c in zip(run.seeds, every)
            },
            "epochs": every[0].health.get("epochs"),
            "explained_by_codes": {
                str(seed): health.explained_by_codes(run.v, c) for seed, c in zip(run.seeds, every)
            },
            "stability": health.stability(every, rows) if every[1:] else "not run: one seed",
            "faithfulness": run.judged["seeds"][first]["methods"][m],
            "naive_bayes_proxy": {
                seed: found["proxy"][m] for seed, found in run.judged["seeds"].items()
            },
            **pictured(run, m),
        }
    return {
        **evidence.header("interpret.py", run.ckpt, run.meta, run.model.lm),
        "seed": run.seeds[0],
        "seeds": run.seeds,
        "layers": run.layers,
        "k": run.k,
        "classes": run.v.classes,
        "labelled": run.facts["labelled"],
        "classifier": run.facts["test"],
        "words": {split: int(run.v.rows(split).sum()) for split in SPLITS},
        "salience": run.salient.facts(run.s.nodes),
        "controls": run.told["explained"],
        "methods": methods,
        "not_run": {}
        if "ward" in run.methods
        else {"ward": "not run: not asked for or no scikit-learn"},
        "shared": run.judged["seeds"][first]["shared"],
        "by_seed": run.judged["seeds"],
        "judge": run.rated,
        "people": "not run: packet.html and packet.csv ask them, --answers counts",
    }


def table(found):
    """All forms of faithfulness, then one line a method, as text."""
    methods = {m: of["faithfulness"] for m, of in found["methods"].items()}
    parts = [faithfulness.table(methods, found["shared"], form) for form in found["shared"]]
    names, widths = (
        (
            "perplexity",
            "active",
            "explained",
            "stability",
            "proxy own",
            "another",
            "random",
            "majority",
        ),
        (11, 8, 11, 11, 11, 9, 8, 10),
    )
    lines = ["method  " + "".join(name.rjust(w) for name, w in zip(names, widths))]
    for m, of in found["methods"].items():
        own, proxy = (
            of["health"][str(found["seed"])]["test"],
            of["naive_bayes_proxy"][str(found["seed"])],
        )
        stable = of["stability"]["mean"] if isinstance(of["stability"], dict) else None
        numbers = [
            own["perplexity"],
            own["active"],
            of["explained_by_codes"][str(found["seed"])],
            stable,
            *(proxy["agreement"][k] for k in ("own", "another", "random words")),
            proxy["majority"],
        ]
        lines.append(
            f"{m:<8}"
            + "".join("-".rjust(w) if n is None else f"{n:{w}.3g}" for n, w in zip(numbers, widths))
        )
    state = found["judge"] if isinstance(found["judge"], str) else "in judge.json"
    return "\n\n".join(
        [*parts, "\n".join(lines), f"language-model judges: {state}\npeople: {found['people']}"]
    )


def people(found):
    """concept_packet.score as text."""
    lines = ["                 right  accuracy  95 % (Wilson)   chance  unanswered"]
    for name, s in found.items():
        right, (low, high) = f"{s['right']} of {s['n']}", s["ci95"]
        accuracy, chance = ("-" if v is None else f"{v:.3f}" for v in (s["accuracy"], s["chance"]))
        lines.append(
            f"{name:<12}{right:>10}{accuracy:>10}  {low:.3f} to {high:.3f}{chance:>9}"
            f"{s['unanswered']:>12}"
        )
    return "\n".join(lines)
