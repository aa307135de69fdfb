"""The results of `interpret.py concepts`: one JSON-able dict, tables, and concepts to show.

`run` is always a pipeline.Pipeline whose stages are done.
"""

from dataclasses import asdict

import numpy as np

from crate_mini.concepts import codebook_checks, concept_words, faithfulness
from crate_mini.concepts.types import SPLITS
from crate_mini.training import checkpoint

CONTEXT = 12  # words shown on each side of a marked one
EXAMPLES = 3  # texts shown with a code
PEOPLE = "not run: send people packet.html or packet.csv, then count their files with --answers"
COLUMNS = {  # of the table of codebooks: name and width
    "perplexity": 11,
    "active": 8,
    "explained": 11,
    "stability": 11,
    "as clvq": 9,
    "as start": 10,
    "proxy own": 11,
    "another": 9,
    "random": 8,
    "majority": 10,
}


# ---- concepts.json -------------------------------------------------------------------------------


def collect(run):
    """The content of concepts.json: results of all stages, and what was not run."""
    first = str(run.seeds[0])
    not_run = {}
    if "ward" not in run.methods:
        not_run["ward"] = "not run: not asked for or no scikit-learn"
    return {
        **checkpoint.result_header("interpret.py", run.ckpt, run.meta, run.model.lm),
        "seed": run.seeds[0],
        "seeds": run.seeds,
        "settings": asdict(run.settings),
        "layers": run.layers,
        "k": run.k,
        "classes": run.vectors.classes,
        "labelled": run.facts["labelled"],
        "classifier": run.facts["test"],
        "words": {split: int(run.vectors.rows(split).sum()) for split in SPLITS},
        "salience": run.salience.facts(run.settings.gap),
        "controls": run.controls,
        "methods": {method: collect_method(run, method) for method in run.methods},
        "not_run": not_run,
        "shared": run.by_seed[first]["shared"],
        "by_seed": run.by_seed,
        "judge": run.ratings,
        "people": PEOPLE,
    }


def collect_method(run, method):
    """The entry of one method in concepts.json; its codes to show are those of the first seed."""
    by_seed = {str(seed): run.codes[method, seed] for seed in run.seeds}
    every = list(by_seed.values())
    settings = {name: value for name, value in every[0].settings.items() if name != "made"}
    health, explained, proxy, agreement = {}, {}, {}, {}
    for seed, codes in by_seed.items():
        agreement[seed] = agreements(run, codes)
        health[seed] = {name: v for name, v in codes.health.items() if name != "epochs"}
        explained[seed] = codebook_checks.explained_by_codes(run.vectors, codes)
        proxy[seed] = run.by_seed[seed]["proxy"][method]
    stability = "not run: one seed"
    if len(every) > 1:
        stability = codebook_checks.stability(every, run.vectors.rows("test"))
    return {
        "settings": settings,
        "health": health,
        "epochs": every[0].health.get("epochs"),
        "explained_by_codes": explained,
        "stability": stability,
        "agreement": agreement,
        "faithfulness": run.by_seed[str(run.seeds[0])]["methods"][method],
        "naive_bayes_proxy": proxy,
        **shown_codes(run, method),
    }


def agreements(run, codes):
    """Adjusted mutual information of Codes with clvq's of the same seed, and with their own start.

    {"clvq": over the test words, None for clvq itself and where it was not run; "start": None for
    a method whose training has no codes to start from}.
    """
    other = run.codes.get(("clvq", codes.seed))
    with_clvq = None
    if other is not None and codes.method != "clvq":
        with_clvq = codebook_checks.agreement_on_test(
            run.vectors, codes.assignment, other.assignment
        )
    return {"clvq": with_clvq, "start": codes.health.get("ami_start")}


# ---- concepts to show ----------------------------------------------------------------------------


def shown_codes(run, method):
    """Codes of a method for the page: --shown of those that have words, drawn by the first seed."""
    codes = run.codes[method, run.seeds[0]]
    words = concept_words.words_of_codes(codes, run.vectors)
    mix = concept_words.class_mix(codes, run.vectors)
    with_words = [j for j in range(len(words)) if words[j]]
    rng = np.random.default_rng(run.seeds[0])
    n_shown = min(run.settings.shown, len(with_words))
    drawn = sorted(rng.choice(with_words, n_shown, replace=False).tolist())
    train = run.vectors.rows("train")
    shown = []
    for j in drawn:
        shown.append(
            {
                "code": j,
                "size": int(train[codes.assignment == j].sum()),
                "words": words[j][: concept_words.TOP],
                "mix": mix[j].tolist(),
                "examples": examples(run, codes, j, rng),
            }
        )
    return {
        "codes": shown,
        "with_members": len(with_words),
        "wordless": concept_words.count_wordless(words),
    }


def examples(run, codes, j, rng):
    """EXAMPLES words of code j in their texts: salient ones first, then training words, drawn."""
    rows = np.flatnonzero(codes.assignment == j)
    salient = rows[np.isin(rows, run.salient_texts.row)]
    training = rng.permutation(rows[run.vectors.rows("train")[rows]])
    named = [(row, "salient") for row in salient] + [(row, "training text") for row in training]
    return [example(run, int(row), kind) for row, kind in named[:EXAMPLES]]


def example(run, row, kind):
    """A word, by its row in Vectors, with the words around it and the class of its text."""
    vectors = run.vectors
    s = int(vectors.sentence[row])
    position = int(vectors.position[row])
    first = max(0, position - CONTEXT)
    label = vectors.classes[vectors.label[s]]
    answer = vectors.classes[run.answers[s]]
    return {
        "words": run.text.words[s][first : position + CONTEXT + 1],
        "at": position - first,
        "kind": f"{label}, answered {answer}; {kind}",
    }


def cards(run):
    """The items for people and judges: test texts with the words of their concepts.

    [{"text", "answer", "right", "classes", "concepts": {method: words}}], spread evenly over the
    answers, right and wrong, as far as there are enough texts.
    """
    vectors, texts = run.vectors, run.salient_texts
    answers = run.answers[texts.text]
    right = answers == vectors.label[texts.text]
    codes = {method: run.codes[method, run.seeds[0]] for method in run.methods}
    words = {method: concept_words.top_words(c, vectors) for method, c in codes.items()}
    groups = [f"{answer} {is_right}" for answer, is_right in zip(answers, right)]
    listed = []
    for i in stratified(groups, len(groups), run.seeds[0]).tolist():
        concepts = {}
        for method, c in codes.items():
            concepts[method] = words[method][c.assignment[texts.row[i]]]
        listed.append(
            {
                "text": " ".join(run.text.words[texts.text[i]]),
                "answer": vectors.classes[answers[i]],
                "right": bool(right[i]),
                "classes": vectors.classes,
                "concepts": concepts,
            }
        )
    return listed


def stratified(groups, n, seed):
    """Indices of n items (or all), as many of each group (n,) as of the others while it has any."""
    groups = np.asarray(groups)
    order = np.random.default_rng(seed).permutation(len(groups))
    turn = np.empty(len(groups), np.int64)  # its place within its group
    for group in np.unique(groups):
        members = order[groups[order] == group]
        turn[members] = np.arange(len(members))
    return order[np.argsort(turn[order], kind="stable")][:n]


# ---- tables --------------------------------------------------------------------------------------


def table(result):
    """concepts.json as text: each form of faithfulness, then a line for each method."""
    outcomes = {name: method["faithfulness"] for name, method in result["methods"].items()}
    parts = [faithfulness.table(outcomes, result["shared"], form) for form in result["shared"]]
    lines = ["method  " + "".join(name.rjust(width) for name, width in COLUMNS.items())]
    for name, method in result["methods"].items():
        numbers = codebook_numbers(method, str(result["seed"]))
        cells = [cell(number, width) for number, width in zip(numbers, COLUMNS.values())]
        lines.append(f"{name:<8}" + "".join(cells))
    if at_chance(result["classifier"]):
        parts.insert(0, chance_sentence(result["classifier"]))
    judge = result["judge"] if isinstance(result["judge"], str) else "in judge.json"
    end = f"language-model judges: {judge}\npeople: {result['people']}"
    return "\n\n".join([*parts, "\n".join(lines), end])


def codebook_numbers(method, seed):
    """The numbers of COLUMNS for one method, None where there is none."""
    usage = method["health"][seed]["test"]
    stability = method["stability"]
    proxy = method["naive_bayes_proxy"][seed]
    guessed = [proxy["agreement"][name] for name in ("own", "another", "random words")]
    return [
        usage["perplexity"],
        usage["active"],
        method["explained_by_codes"][seed],
        stability["mean"] if isinstance(stability, dict) else None,
        *method["agreement"][seed].values(),
        *guessed,
        proxy["majority"],
    ]


def cell(number, width):
    return "-".rjust(width) if number is None else f"{number:{width}.3g}"


def completeness(facts):
    """Salience.facts in one line: points on the paths, and how far attributions add up."""
    points = [int(n) for n in facts["nodes"]]
    return (
        f"salience  {min(points)} to {max(points)} points; attributions miss the logit by "
        f"{facts['gap_mean']:.2%} on average and {facts['gap_max']:.2%} at most; {facts['above']} "
        f"of {facts['texts']} texts miss it by more than {facts['tolerance']:.2%}"
    )


def at_chance(test):
    """Whether the 95 % interval of a classifier's accuracy reaches down to chance."""
    return test["ci95"][0] <= test["chance"]


def chance_sentence(test):
    """What it means for everything else that a classifier is at chance."""
    low, high = test["ci95"]
    return (
        f"This classifier is at chance: accuracy {test['accuracy']:.3f} (95 %: {low:.3f} to "
        f"{high:.3f}; chance {test['chance']:.3f}). It has nothing to lose, so no ablation below "
        "shows that it relies on a concept."
    )


def people_table(scores):
    """The answers of people, survey.score, as text."""
    lines = ["                 right  accuracy  95 % (Wilson)   chance  unanswered"]
    for name, score in scores.items():
        right = f"{score['right']} of {score['n']}"
        low, high = score["ci95"]
        accuracy = share(score["accuracy"])
        chance = share(score["chance"])
        lines.append(
            f"{name:<12}{right:>10}{accuracy:>10}  {low:.3f} to {high:.3f}{chance:>9}"
            f"{score['unanswered']:>12}"
        )
    return "\n".join(lines)


def share(value):
    return "-" if value is None else f"{value:.3f}"
