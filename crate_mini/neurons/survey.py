"""Questions for people: human.html asks them, `score` counts the answers.

Two tasks on the same neurons, drawn by the seed from those that fire and have a label:
    intruder   five excerpts, four of one neuron and one of another: which does not belong?
    label      held-out excerpts and four labels, three of other neurons: which describes them?
Chance is 1/5 and 1/4. Both tasks follow word intrusion for topic models (Chang et al. 2009), as
Transluce and EleutherAI use it for neurons. The page shows no score and saves the answers as JSON.
"""

import hashlib
import json
from html import escape

import numpy as np

from crate_mini import UserError
from crate_mini.console.results import read_bytes
from crate_mini.data.tokenizer import visible
from crate_mini.neurons.labels import LABEL_TOKENS, label_text
from crate_mini.neurons.score_files import checkpoint_name
from crate_mini.plots.html import asset, html, quiz_script
from crate_mini.stats import wilson

SHOWN = 4  # excerpts of the neuron in a question
DECOYS = 3  # labels of other neurons
CHANCE = {"intruder": 1 / (SHOWN + 1), "label": 1 / (DECOYS + 1)}


def page(scored, token_bytes, seed=0, n=30):
    """human.html of Scored neurons, as bytes, with questions on n of them.

    token_bytes: from an id to its bytes. Equal inputs give equal bytes. None if no neuron has a
    label and enough held-out excerpts.
    """
    record, _, neurons = scored

    def token_text(id):
        return visible(token_bytes(id))

    asked = questions(neurons, token_text, seed, n)
    if not asked:
        return None
    name = checkpoint_name(record)
    data = {
        "page": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        "model": name,
        "sha256": (record.get("checkpoint") or {}).get("sha256"),
        "seed": seed,
        "questions": asked,
    }
    body = (
        '<main><header class="task"><p class="eyebrow">crate_mini · what people see in neurons</p>'
        f'<h1>{escape(name)}</h1></header><div id="task" class="task"></div></main>'
    )
    script = quiz_script() + asset("crate_mini.neurons", "survey.js")
    return html(f"{name} · questions", body, data, script)


def questions(neurons, token_text, seed, n):
    """Questions of both tasks on up to n neurons, JSON-able.

    "answer" is the place of the right option. The other neurons in a question come from the same
    site; an excerpt or label of theirs that equals one of the neuron's own is skipped.
    """
    rng = np.random.default_rng(seed)
    usable = []
    for neuron in neurons:
        if len(held_out(neuron)) >= SHOWN and (neuron.get("label") or {}).get("tokens"):
            usable.append(neuron)
    intruders, labels = [], []
    for i in rng.permutation(len(usable))[:n]:
        neuron = usable[i]
        others = [
            other for other in usable if other["site"] == neuron["site"] and other is not neuron
        ]
        for task, make, asked in (
            ("intruder", _intruder, intruders),
            ("label", _label, labels),
        ):
            shuffled = [others[k] for k in rng.permutation(len(others))]
            question = make(neuron, shuffled, token_text, rng)
            if question:
                source = {"task": task, "site": neuron["site"], "neuron": neuron["neuron"]}
                asked.append({**source, **question})
    return intruders + [labels[i] for i in rng.permutation(len(labels))]


def held_out(neuron):
    """The top excerpts that neither a table nor a label was made from."""
    return [excerpt for excerpt in neuron.get("top") or [] if excerpt.get("part") == "score"]


def _intruder(neuron, others, token_text, rng):
    """Four excerpts of the neuron, and one of another neuron with different text.

    None if no other neuron has such an excerpt.
    """
    options = _draw(rng, held_out(neuron), SHOWN)
    texts = [excerpt["tokens"] for excerpt in neuron["top"]]
    strangers = (excerpt for other in others for excerpt in held_out(other))
    intruder = next((excerpt for excerpt in strangers if excerpt["tokens"] not in texts), None)
    if intruder is None:
        return None
    answer = int(rng.integers(SHOWN + 1))
    options.insert(answer, intruder)
    return {"options": [_shown(excerpt, token_text) for excerpt in options], "answer": answer}


def _label(neuron, others, token_text, rng):
    """Excerpts of the neuron, and its label among three labels of others.

    None if fewer than three other labels differ from it.
    """
    label = label_text(neuron["label"], token_text, LABEL_TOKENS)
    decoys = {}  # as an ordered set
    for other in others:
        decoys[label_text(other["label"], token_text, LABEL_TOKENS)] = None
    options = [text for text in decoys if text != label][:DECOYS]
    if len(options) < DECOYS:
        return None
    answer = int(rng.integers(DECOYS + 1))
    options.insert(answer, label)
    excerpts = _draw(rng, held_out(neuron), SHOWN)
    given = [_shown(excerpt, token_text, neuron["max"]) for excerpt in excerpts]
    return {"given": given, "options": options, "answer": answer}


def _draw(rng, items, n):
    """n items of a list, drawn at random, in their order."""
    return [items[i] for i in sorted(rng.choice(len(items), n, replace=False))]


def _shown(excerpt, token_text, largest=None):
    """An excerpt for the page: texts and the place of the peak.

    With `largest` also its activations, as shares of that.
    """
    shown = {
        "tokens": [token_text(id) if id >= 0 else "" for id in excerpt["tokens"]],
        "at": excerpt["at"],
    }
    if largest is not None:
        shares = [min(1, max(0, value / largest)) for value in excerpt["acts"]]
        shown["values"] = [round(share, 2) for share in shares]
    return shown


# ---- answers -------------------------------------------------------------------------------------


def score(path):
    """{task: counts} of a file of answers that human.html saved.

    Counts are "n" answered, "right", "unanswered", "accuracy", "ci95" (Wilson) and "chance".
    Raises UserError for a file that is missing or does not hold such answers.
    """
    try:
        answers = json.loads(read_bytes(path))["answers"]
        return {task: _count(answers, task) for task in CHANCE}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it holds something else"
        raise UserError(
            f"{path} cannot be read as answers: {reason}; expected a file that "
            "human.html saved, for `python interpret.py report CKPT --answers answers.json`."
        ) from None


def _count(answers, task):
    """The counts of one task."""
    asked = [answer for answer in answers if answer["task"] == task]
    correct = []
    for answer in asked:
        if answer["choice"] is not None:
            correct.append(answer["choice"] == answer["answer"])
    n, right = len(correct), sum(correct)
    return {
        "n": n,
        "right": right,
        "unanswered": len(asked) - n,
        "accuracy": right / n if n else None,
        "ci95": wilson(right, n),
        "chance": CHANCE[task],
    }


def table(counts):
    """The result of `score` as text."""
    lines = ["task           right  accuracy  95 % (Wilson)   chance  unanswered"]
    for task, count in counts.items():
        right = f"{count['right']} of {count['n']}"
        accuracy = "-" if count["accuracy"] is None else f"{count['accuracy']:.3f}"
        low, high = count["ci95"]
        lines.append(
            f"{task:<8}{right:>12}{accuracy:>10}  {low:.3f} to {high:.3f}{count['chance']:>8.2f}"
            f"{count['unanswered']:>12}"
        )
    return "\n".join(lines)
