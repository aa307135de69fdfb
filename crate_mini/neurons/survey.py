"""Questions for people: human.html asks, `score` counts what was answered.

Two tasks about the same neurons, drawn at random by the seed among those that fire and have a label:
    intruder   five excerpts, four of one neuron and one of another: which does not belong? (chance 1/5)
    label      held-out excerpts and four labels, three of other neurons: which describes them? (chance 1/4)
Both after topic models' word intrusion (Chang et al. 2009) and its use for neurons in Transluce's and
EleutherAI's studies. Whoever answers sees no score. The page saves its answers as a JSON file.
"""

import hashlib
import json
import math
from html import escape
from pathlib import Path

import numpy as np

from crate_mini import UserError
from crate_mini.data.tokenizer import visible
from crate_mini.neurons.page import checkpoint_name, label_text, read
from crate_mini.plots.html import asset, html, quiz_script

SHOWN = 4  # excerpts of the neuron in a question
DECOYS = 3  # labels of other neurons
CHANCE = {"intruder": 1 / (SHOWN + 1), "label": 1 / (DECOYS + 1)}


def wilson(right, n, z=1.959963984540054):
    """(low, high) of Wilson's score interval for `right` of n; z = 1.96 is 95 %. (0, 1) when n is 0."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = right / n, z * z / n
    middle, half = p + z2 / 2, z * math.sqrt(p * (1 - p) / n + z2 / (4 * n))
    return max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))


def held_out(neuron):
    """The top excerpts that no table or label was made from."""
    return [e for e in neuron.get("top") or [] if e.get("part") == "score"]


def _pick(rng, found, n):
    """n of a list, at random, in their order."""
    return [found[i] for i in sorted(rng.choice(len(found), n, replace=False))]


def questions(neurons, token, seed, n):
    """Questions of both tasks about n neurons, JSON-able; `answer` is the number of the right option.

    Decoys come from the same site. A decoy whose excerpt or label is one of the neuron's own is drawn again.
    """
    rng = np.random.default_rng(seed)
    fit = [x for x in neurons if len(held_out(x)) >= SHOWN and (x.get("label") or {}).get("tokens")]
    sites = {
        site: [x for x in fit if x["site"] == site]
        for site in dict.fromkeys(x["site"] for x in fit)
    }
    asked = [fit[i] for i in rng.permutation(len(fit))[:n]]
    found = {"intruder": [], "label": []}
    for x in asked:
        others = [y for y in sites[x["site"]] if y is not x]
        for make, task in ((_intruder, "intruder"), (_label, "label")):
            question = make(x, [others[i] for i in rng.permutation(len(others))], token, rng)
            if question:
                found[task].append(
                    {"task": task, "site": x["site"], "neuron": x["neuron"], **question}
                )
    return found["intruder"] + [found["label"][i] for i in rng.permutation(len(found["label"]))]


def _shown(e, token, top=None):
    """An excerpt as the page gets it: texts, the peak, and with `top` the values as shares of it."""
    shares = (
        {} if top is None else {"values": [round(min(1, max(0, v / top)), 2) for v in e["acts"]]}
    )
    return {"tokens": [token(t) if t >= 0 else "" for t in e["tokens"]], "at": e["at"], **shares}


def _intruder(x, others, token, rng):
    """Four of x's excerpts and one of the first of `others` that has another text; None if none has."""
    own = _pick(rng, held_out(x), SHOWN)
    texts = [e["tokens"] for e in x["top"]]
    strange = next((e for y in others for e in held_out(y) if e["tokens"] not in texts), None)
    if strange is None:
        return None
    at = int(rng.integers(SHOWN + 1))
    return {"options": [_shown(e, token) for e in [*own[:at], strange, *own[at:]]], "answer": at}


def _label(x, others, token, rng):
    """x's excerpts, and its label among three of others; None if there are not three that differ."""
    own = label_text(x["label"], token, 10)
    labels = list(dict.fromkeys(label_text(y["label"], token, 10) for y in others))
    decoys = [text for text in labels if text != own][:DECOYS]
    if len(decoys) < DECOYS:
        return None
    at = int(rng.integers(DECOYS + 1))
    return {
        "given": [_shown(e, token, x["max"]) for e in _pick(rng, held_out(x), SHOWN)],
        "options": [*decoys[:at], own, *decoys[at:]],
        "answer": at,
    }


def page(folder, token, seed=0, n=30):
    """human.html of a result folder, as bytes: equal for equal inputs; token, errors as for `pages.index`.

    None when too few neurons have a label and held-out excerpts to ask about.
    """
    record, _, neurons = read(folder)
    asked = questions(neurons, lambda i: visible(token(i)), seed, n)
    if not asked:
        return None
    name, checkpoint = checkpoint_name(record), record.get("checkpoint") or {}
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    data = {
        "page": digest,
        "model": name,
        "sha256": checkpoint.get("sha256"),
        "seed": seed,
        "questions": asked,
    }
    body = (
        f'<main><header class="task"><p class="eyebrow">crate_mini · what people see in neurons</p>'
        f'<h1>{escape(name)}</h1></header><div id="task" class="task"></div></main>'
    )
    return html(
        f"{name} · questions", body, data, quiz_script() + asset("crate_mini.neurons", "survey.js")
    )


def score(path):
    """{task: {"n", "right", "accuracy", "ci95" (Wilson), "chance", "unanswered"}} of a file of answers.

    Raises UserError for a file that is missing or no answers of human.html.
    """
    try:
        answers = json.loads(Path(path).read_text(encoding="utf-8"))["answers"]
        found = {task: [a for a in answers if a["task"] == task] for task in CHANCE}
        counts = {
            t: (len(f), [a["choice"] == a["answer"] for a in f if a["choice"] is not None])
            for t, f in found.items()
        }
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{path} cannot be read as answers ({type(e).__name__}); human.html saves such a "
            "file; `python interpret.py report CKPT --answers answers.json` reads it."
        ) from None
    return {
        task: {
            "n": len(right),
            "right": sum(right),
            "unanswered": asked - len(right),
            "accuracy": sum(right) / len(right) if right else None,
            "ci95": wilson(sum(right), len(right)),
            "chance": CHANCE[task],
        }
        for task, (asked, right) in counts.items()
    }


def table(found):
    """`score` as text."""
    lines = ["task           right  accuracy  95 % (Wilson)   chance  unanswered"]
    for task, s in found.items():
        accuracy = "-" if s["accuracy"] is None else f"{s['accuracy']:.3f}"
        right, (low, high) = f"{s['right']} of {s['n']}", s["ci95"]
        lines.append(
            f"{task:<8}{right:>12}{accuracy:>10}  {low:.3f} to {high:.3f}{s['chance']:>8.2f}"
            f"{s['unanswered']:>12}"
        )
    return "\n".join(lines)
