"""Does the trained network do what the theory says? The numbers of layers.json, put into words.

Each layer is judged on four aspects, and every sentence is computed from the numbers next to it:

    attention   does the coding rate R^c fall?
    ISTA steps  does each of them lower the lasso objective?
    optimum     how far are the codes from the best possible ones?
    step size   is eta |D|^2 below 2, so that no step can raise the objective?

Only three of them decide the overall answer: a layer should move towards the optimum, and no theory
says that a few steps reach it.
"""

import textwrap

LIMIT = 2  # of eta |D|^2
SMALL = 5e-3  # a rate hardly changes if it changes by no more than this share of itself,
SMALLEST = 0.05  # or by no more than this, in nats: the printed rates would be the same
ROUNDING = 1e-6  # an objective stays if it changes by no more than this share of that at a = 0
REACHED = 0.99  # of the way from a = 0 to the best codes
WIDTH = 100  # of a printed line

QUESTION = "does the trained network do what the theory says?"
THEORY = {
    "attention": "should lower R^c, the nats it takes to describe the tokens within the heads' "
    "subspaces, while R(Z), the nats for the stream as a whole, stays large.",
    "ISTA steps": "should each lower the objective of the codes a: half the squared error of D a, "
    "the input rebuilt from the codes, plus lam times their sum.",
    "optimum": "the codes with the lowest objective; a layer only takes steps towards them.",
    "step size": "eta |D|^2, the step size times the squared norm of the dictionary, should be "
    f"below {LIMIT}: then no step can raise the objective (up to 1 by the classical argument). "
    "Above it, steps may diverge.",
}
ANSWERS = {"yes": "Yes.", "in part": "Only in part.", "no": "No."}
VERBS = {"falls": "compresses", "rises": "expands", "stays": "hardly changes R^c"}


def judge(result):
    """The verdict on the trained model in `result`, the content of layers.json; JSON-able.

    Returns a dict:
    question; theory: {aspect: what the theory asks of it}; scope: sentences about what does not
        apply to this kind of model, or only with care.
    layers: {"layer", "brief", aspect: {"holds", its numbers, "sentence"}} of each layer. "holds"
        tells whether the layer does what the theory says; an aspect that does not apply is None.
    answer: "yes", "in part" or "no"; overall: the closing sentences.
    """
    config = result["checkpoint"]["config"]
    layers = [_judge_layer(layer, config) for layer in result["trained"]]
    answer = _answer(layers)
    return {
        "question": QUESTION,
        "theory": {name: THEORY[name] for name in THEORY if layers[0][name]},
        "scope": scope(config),
        "layers": layers,
        "answer": answer,
        "overall": _overall(answer, layers, result["untrained"]),
    }


def scope(config):
    """Sentences about what the aspects mean in a model of this config, if not the usual."""
    sentences = []
    if config["attention"] == "mhsa":
        sentences.append(
            "This attention has no subspaces U; its value projections stand in for them."
        )
    if config["sparsifier"] != "ista":
        sentences.append(
            "An MLP has no objective, so ISTA steps, optimum and step size do not apply."
        )
        return sentences
    if config["separate_decoder"]:
        sentences.append(
            "D only encodes here, and another matrix writes to the stream: the objective judges "
            "the codes, not what is written."
        )
    if config["residual"]:
        sentences.append("The decoded codes are added to the stream instead of replacing it.")
    changes = changes_to_codes(config)
    if changes:
        sentences.append(
            f"After its last ISTA step the model changes the codes ({changes}), which the "
            "objective does not ask for: the optimum is judged on the codes in use."
        )
    return sentences


def changes_to_codes(config):
    """What a model does to its codes after the last ISTA step, in words; "" if nothing."""
    changes = []
    if config.get("debias"):
        changes.append("debias adds the last threshold back")
    if config.get("top_k"):
        changes.append(f"top-k keeps the {config['top_k']} largest")
    return ", ".join(changes)


# ---- the aspects of a layer ----------------------------------------------------------------------


def _judge_layer(layer, config):
    """The four aspects of a layer, and all of them in one line."""
    aspects = {
        "attention": judge_attention(layer),
        "ISTA steps": None,
        "optimum": None,
        "step size": None,
    }
    if layer["lasso"]:
        aspects["ISTA steps"] = judge_steps(layer["lasso"])
        aspects["optimum"] = judge_optimum(layer["optimum"], changes_to_codes(config))
        size = layer["dictionary"]["eta_norm2"]
        aspects["step size"] = judge_step_size(size, layer["optimum"]["own_steps"])
    briefs = [aspect.pop("brief") for aspect in aspects.values() if aspect]
    return {"layer": layer["layer"], "brief": "; ".join(briefs), **aspects}


def judge_attention(layer):
    """Does R^c fall from before to after attention?"""
    before, after = (rates["U"]["mean"] for rates in layer["rate"].values())
    changes = {}
    for basis in ("U", "orthonormal U", "whole"):
        start, end = (rates[basis]["mean"] for rates in layer["rate"].values())
        changes[basis] = end - start
    small = max(SMALL * before, SMALLEST)
    direction = direction_of(changes["U"], small)
    orthonormal = direction_of(changes["orthonormal U"], small)
    subject = "it goes" if direction == "stays" else "R^c goes"
    ci95 = layer.get("change", {}).get("U", {}).get("ci95")  # old files have none
    interval = f", 95 % {signed(ci95[0])} to {signed(ci95[1])}" if ci95 else ""
    sentence = (
        f"{VERBS[direction]}: {subject} from {before:.1f} to {after:.1f} nats "
        f"({signed(changes['U'])}{interval})"
    )
    if direction != "stays":
        falling = layer["windows_compressed"]["U"]
        agreeing = falling if direction == "falls" else layer["windows"] - falling
        sentence += f" and {direction} in {agreeing:,} of {count(layer['windows'], 'window')}"
    if orthonormal != direction:
        sentence += f"; in orthonormal bases it changes by {signed(changes['orthonormal U'])}"
    sentence += f". R(Z) changes by {signed(changes['whole'])}."
    return {
        "holds": direction == "falls",
        "before": before,
        "after": after,
        "change": changes["U"],
        "change_ci95": ci95,
        "change_orthonormal": changes["orthonormal U"],
        "change_whole": changes["whole"],
        "direction": direction,
        "sentence": sentence,
        "brief": f"attention {VERBS[direction]}, {before:.1f} to {after:.1f} nats",
    }


def judge_steps(objectives):
    """Does each ISTA step lower the objective? objectives: at a = 0 and after each step."""
    directions = []
    for before, after in zip(objectives, objectives[1:]):
        directions.append(direction_of(after - before, ROUNDING * objectives[0]))
    verbs = {"falls": "lower", "rises": "raise", "stays": "do not change"}
    clauses = []
    for direction, verb in verbs.items():
        steps = [i for i, found in enumerate(directions, 1) if found == direction]
        if len(steps) == 1:
            verb = {"do not change": "does not change"}.get(verb, f"{verb}s")
        if steps:
            clauses.append(f"{which(steps, len(directions), 'step', 1)} {verb} the objective")
    values = listed([f"{value:.3f}" for value in objectives[1:]])
    return {
        "holds": "rises" not in directions,
        "objectives": objectives,
        "directions": directions,
        "sentence": f"{', '.join(clauses)}: per coordinate it is {objectives[0]:.3f} for zero "
        f"codes, then {values}.",
        "brief": ", ".join(clauses),
    }


def judge_optimum(optimum, changes=""):
    """How far are the codes from the best ones? changes: what is done to them after the steps."""
    start = optimum["start"]
    codes, best = optimum["codes"], optimum["best"]
    share = None
    if start - best["objective"] > ROUNDING * start:
        share = (start - codes["objective"]) / (start - best["objective"])
    subject = "the codes in use" if changes else "the codes"
    if share is None:
        headline = "zero codes are already the best"
    elif share >= REACHED:
        headline = f"{subject} are as good as the best ones"
    elif share >= 0:
        headline = f"{subject} stop {percent(share)} of the way from zero to the best ones"
    else:
        headline = f"{subject} are worse than zero codes"
    sentence = (
        f"{headline}: objective {codes['objective']:.3f} with {percent(codes['density'])} of them "
        f"active; the best, {best['objective']:.3f} with {percent(best['density'])} "
        f"(on {count(optimum['tokens'], 'token')})."
    )
    if not optimum["converged"]:
        sentence += (
            f" The search for them has not converged in {optimum['iterations']:,} iterations: the "
            f"lowest objective may be up to {optimum['gap']:.2g} lower."
        )
    return {
        "holds": None if share is None else share >= REACHED,
        "share_of_the_way": share,
        **{name: optimum[name] for name in ("codes", "best", "gap", "converged", "tokens")},
        "sentence": sentence,
        "brief": headline,
    }


def judge_step_size(size, own_steps):
    """Is eta |D|^2, `size`, below the limit? own_steps: what more steps would do (optimum.py)."""
    inside = size < LIMIT
    place = f"within the limit {LIMIT}" if inside else f"beyond the limit {LIMIT}"
    sentence = f"eta |D|^2 = {size:.2f} is {place}"
    would = "would" if own_steps["exceeds_start"] else "would not"
    sentence += (
        f"; {count(own_steps['steps'], 'step')} of this size {would} take the objective above that "
        "of zero codes"
    )
    if own_steps["lowest_step"]:
        sentence += f" (lowest: {own_steps['lowest']:.3f} after {own_steps['lowest_step']})"
    return {
        "holds": inside,
        "eta_norm2": size,
        "limit": LIMIT,
        "own_steps": own_steps,
        "sentence": f"{sentence}.",
        "brief": f"eta |D|^2 = {size:.2f}, {place}",
    }


def direction_of(change, small):
    """What a number does: "falls", "rises", or "stays" if it changes by no more than `small`."""
    if abs(change) <= small:
        return "stays"
    return "falls" if change < 0 else "rises"


# ---- all layers together -------------------------------------------------------------------------


def _answer(layers):
    """Whether all layers do all that applies to them ("yes"), part of it, or nothing ("no")."""
    outcomes = []
    for layer in layers:
        deciding = [layer[name] for name in ("attention", "ISTA steps", "step size")]
        outcomes += [aspect["holds"] for aspect in deciding if aspect]
    if all(outcomes):
        return "yes"
    return "in part" if any(outcomes) else "no"


def _overall(answer, layers, untrained):
    """The answer, and a sentence about each aspect of all layers."""
    sentences = [ANSWERS[answer], _all_attention(layers)]
    if layers[0]["ISTA steps"] is None:
        sentences[0] = f"{ANSWERS[answer].removesuffix('.')}, as far as the theory applies."
        sentences.append("An MLP has no objective, so nothing else can be judged.")
        return " ".join(sentences)
    sizes = [layer["dictionary"]["eta_norm2"] for layer in untrained]
    sentences += [_all_steps(layers), _all_optima(layers), *_all_step_sizes(layers, sizes)]
    return " ".join(sentences)


def _all_attention(layers):
    clauses = []
    for direction, verb in VERBS.items():
        numbers = [x["layer"] for x in layers if x["attention"]["direction"] == direction]
        if numbers:
            clauses.append(f"{verb} in {which(numbers, len(layers))}")
    return f"Attention {listed(clauses)}."


def _all_steps(layers):
    failing = [layer["layer"] for layer in layers if not layer["ISTA steps"]["holds"]]
    if failing:
        return f"An ISTA step raises its objective in {which(failing, len(layers))}."
    directions = {found for layer in layers for found in layer["ISTA steps"]["directions"]}
    if directions == {"falls"}:
        return "Every ISTA step lowers its objective."
    return "No ISTA step raises its objective."


def _all_optima(layers):
    shares = {}
    for layer in layers:
        share = layer["optimum"]["share_of_the_way"]
        if share is not None:
            shares[layer["layer"]] = share
    if not shares:
        return "Zero codes are already the best."
    worse = [number for number, share in shares.items() if share < 0]
    if worse:
        return f"The codes are worse than zero codes in {which(worse, len(layers))}."
    optima = [layer["optimum"] for layer in layers]
    active = span([optimum["codes"]["density"] for optimum in optima], percent)
    needed = span([optimum["best"]["density"] for optimum in optima], percent)
    if min(shares.values()) >= REACHED:
        return f"The codes are as good as the best ones, with {active} of them active."
    return (
        f"The codes go {span(shares.values(), percent)} of the way from zero to the best ones, "
        f"with {active} of them active where the best need {needed}."
    )


def _all_step_sizes(layers, untrained_sizes):
    aspects = {layer["layer"]: layer["step size"] for layer in layers}
    outside = [number for number, aspect in aspects.items() if not aspect["holds"]]
    if not outside:
        sizes = span([aspect["eta_norm2"] for aspect in aspects.values()], two_digits)
        return [f"The dictionary is in the stable range: eta |D|^2 = {sizes}, below {LIMIT}."]
    sizes = span([aspects[number]["eta_norm2"] for number in outside], two_digits)
    started_inside = max(untrained_sizes) < LIMIT
    sentence = (
        f"In {which(outside, len(layers))} the dictionary "
        f"{'has left' if started_inside else 'is outside'} the stable range: eta |D|^2 = {sizes}, "
        f"above {LIMIT}"
    )
    sentence += _after_more_steps({number: aspects[number]["own_steps"] for number in outside})
    sentences = [f"{sentence}."]
    if started_inside:
        sizes = span(untrained_sizes, two_digits)
        sentences.append(f"Training took it there: at the start eta |D|^2 was {sizes}.")
    return sentences


def _after_more_steps(own_steps):
    """What steps of a size beyond the limit do, as a clause; own_steps: {layer: own_steps}."""
    rises = {}
    for number, steps in own_steps.items():
        if steps["exceeds_start"]:
            rises[number] = steps["exceeds_start"]
    if not rises:
        taken = max(steps["steps"] for steps in own_steps.values())
        return (
            f"; even so, {taken} steps of this size do not take the objective above that of zero "
            "codes"
        )
    # Named only where it is not all of the layers just named.
    where = "" if len(rises) == len(own_steps) else f" in {which(list(rises), 0)}"
    return (
        f"; steps of this size do not converge{where}, but take the objective above that of zero "
        f"codes (after {max(rises.values())} at most)"
    )


# ---- words ---------------------------------------------------------------------------------------


def count(n, noun):
    """1 window, 193 windows."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def percent(share):
    """A share as a whole percentage."""
    return f"{100 * share:.0f} %"


def signed(change):
    """A change with its sign and one digit after the point; 0.0 has none."""
    text = f"{change:+.1f}"
    return text[1:] if float(text) == 0 else text


def two_digits(value):
    """A number with two digits after the point."""
    return f"{value:.2f}"


def span(values, text):
    """The least and the largest value as `text` writes them, once if they read the same."""
    least, largest = text(min(values)), text(max(values))
    if least == largest:
        return least
    if least.endswith(" %"):
        least = least.removesuffix(" %")
    return f"{least} to {largest}"


def listed(words):
    """a; a and b; a, b and c."""
    if len(words) < 3:
        return " and ".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def which(numbers, total, noun="layer", first=0):
    """Some of `total` layers, numbered from `first`: layer 0, layers 1 and 2, all 3 layers."""
    if len(numbers) == total > 1:
        return f"both {noun}s" if total == 2 else f"all {total} {noun}s"
    if len(numbers) == 1:
        return f"{noun} {numbers[0]}"
    runs = []  # [first, last] of consecutive numbers
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    words = []
    for begin, end in runs:
        if end - begin < 2:
            words += [str(number) for number in range(begin, end + 1)]
        else:
            words.append(f"{begin} to {end}")
    return f"{noun}s {listed(words)}"


# ---- on paper ------------------------------------------------------------------------------------


def text(verdict):
    """The verdict as lines to print."""
    lines = [f"VERDICT: {verdict['question']}", ""]
    for name, sentence in verdict["theory"].items():
        lines += _wrapped("theory" if name == "attention" else "", name, sentence)
    for i, sentence in enumerate(verdict["scope"]):
        lines += _wrapped("note" if i == 0 else "", "", sentence)
    for layer in verdict["layers"]:
        lines.append("")
        for name in verdict["theory"]:
            title = f"layer {layer['layer']}" if name == "attention" else ""
            lines += _wrapped(title, name, layer[name]["sentence"])
    return "\n".join([*lines, "", *_wrapped("overall", "", verdict["overall"])])


def _wrapped(title, name, sentence):
    """A sentence in lines, after two columns that the first line fills."""
    begin = f"{title:<10}{name:<12}" if name else f"{title:<10}"
    indent = " " * len(begin)
    return textwrap.wrap(sentence, WIDTH, initial_indent=begin, subsequent_indent=indent)


def headline(verdict, width):
    """The verdict as a few lines of at most `width` characters, to stand above a figure."""
    lines = []
    for layer in verdict["layers"]:
        begin = f"layer {layer['layer']}: "
        lines += textwrap.wrap(begin + layer["brief"], width, subsequent_indent=" " * 9)
    for sentence in verdict["scope"]:
        lines += textwrap.wrap(sentence, width)
    return "\n".join([*lines, "", *textwrap.wrap(verdict["overall"], width)])
