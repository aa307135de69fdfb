"""A survey that anyone can run: packet.html asks people and saves answers, `score` counts them.

The question is CLVQ-VAE's: from the words of a concept alone, what did the model answer? Each
question shows the concept of one test text's salient word; people choose among the classes. Texts
are drawn by the seed, half of them where the model was right and half where it was wrong as far as
there are enough, and every class equally often; methods are mixed and never named. Chance is one
divided by the number of classes. Without a browser: packet.csv is a sheet to fill in.
"""

import csv
import hashlib
import io
import json
from pathlib import Path

import numpy as np

from crate_mini import UserError
from crate_mini.concepts.report import stratified
from crate_mini.console import results
from crate_mini.plots.html import asset, html, quiz_script
from crate_mini.stats import wilson

ITEMS = 40  # questions of a packet: ±15 points at 95 %
FORMULA_SIGNS = ("=", "+", "-", "@", "\t")  # a cell that starts with one is a formula
BODY = (
    '<main><header class="task"><p class="eyebrow">crate_mini · what did the model answer?</p>'
    '</header><div id="task" class="task"></div></main>'
)


# ---- asking --------------------------------------------------------------------------------------


def questions(cards, methods, classes, seed=0, n=ITEMS):
    """n questions, JSON-able, in an order drawn by the seed; each card is asked about once at most.

    cards: from report.cards; n // len(methods) of them for each method. A concept without words
    asks nothing.
    """
    groups = [f"{card['answer']} {card['right']}" for card in cards]
    order = stratified(groups, len(cards), seed).tolist()
    asked = []
    for method in methods:
        chosen = [i for i in order if cards[i]["concepts"][method]][: n // len(methods)]
        order = [i for i in order if i not in chosen]
        asked += [question(cards[i], i, method, classes) for i in chosen]
    return [asked[i] for i in np.random.default_rng(seed).permutation(len(asked))]


def question(card, i, method, classes):
    return {
        "task": "concept",
        "method": method,
        "right": bool(card["right"]),
        "item": i,
        "given": card["concepts"][method],
        "options": list(classes),
        "answer": list(classes).index(card["answer"]),
    }


def packet(asked, title):
    """(page, sheet, key) as bytes, from `questions`.

    page: what people open. sheet: a CSV to fill in by hand. key: what `score` needs and people must
    not see; of methods and right answers the page holds only its digest.
    """
    content = results.sealed({"schema": 1, "about": title, "questions": asked})
    key = json.dumps(content, indent=1).encode()
    shown = [{"given": q["given"], "options": q["options"]} for q in asked]
    data = {"page": hashlib.sha256(key).hexdigest(), "about": title, "questions": shown}
    script = quiz_script() + asset("crate_mini.concepts", "survey.js")
    page = html(f"{title} · questions", BODY, data, script)
    return page, sheet(shown), key


def sheet(shown):
    """The questions as a CSV, with an empty column for the choice."""
    file = io.StringIO()
    rows = csv.writer(file)
    rows.writerow(["question", "words", "choose one of", "choice"])
    for number, q in enumerate(shown, 1):
        rows.writerow([number, in_a_cell(q["given"]), " | ".join(q["options"]), ""])
    return file.getvalue().encode()


def in_a_cell(words):
    """Words as the sheet shows them, quoted if a spreadsheet would take them for a formula."""
    text = " ".join(words)
    return f"'{text}" if text.startswith(FORMULA_SIGNS) else text


# ---- counting ------------------------------------------------------------------------------------


def score(key, *answers):
    """Count people's answers, over all, by method, and by whether the model was right.

    key: packet-key.json. answers: files that the page saved (.json), or filled sheets (.csv) with
    the name of a class under choice. Returns {group: {"n", "right", "accuracy", "ci95" (Wilson),
    "chance", "unanswered", "people"}}. Raises UserError for a file that cannot be read, that
    answers another packet, or that chooses what is not a class.
    """
    writes = "what `python interpret.py concepts CKPT` writes as packet-key.json"
    asked = results.read_json(key, expected=writes).get("questions")
    raw = results.read_bytes(key)
    if not are_questions(asked):
        raise UserError(f"{key} is not the key of a packet; expected {writes}.")
    digest = hashlib.sha256(raw).hexdigest()
    choices = [read_choices(path, asked, digest) for path in answers]
    methods = dict.fromkeys(q["method"] for q in asked)
    return {
        "all": count(asked, choices, asked),
        **{m: count(asked, choices, [q for q in asked if q["method"] == m]) for m in methods},
        "model right": count(asked, choices, [q for q in asked if q["right"]]),
        "model wrong": count(asked, choices, [q for q in asked if not q["right"]]),
    }


def are_questions(asked):
    """Whether the value is a list of questions, as `question` makes them."""
    if not isinstance(asked, list):
        return False
    for q in asked:
        if not isinstance(q, dict) or not {"method", "right", "given", "options", "answer"} <= set(
            q
        ):
            return False
        lists = isinstance(q["given"], list) and isinstance(q["options"], list)
        if not lists or q["answer"] not in range(len(q["options"])):
            return False
    return True


def count(asked, choices, group):
    """The counts of `score` for a group of the questions; choices: a list for each person."""
    hits, unanswered = [], 0
    for person in choices:
        for choice, q in zip(person, asked):
            if q not in group:
                continue
            if choice is None:
                unanswered += 1
            else:
                hits.append(choice == q["answer"])
    return {
        "n": len(hits),
        "right": sum(hits),
        "unanswered": unanswered,
        "accuracy": sum(hits) / len(hits) if hits else None,
        "ci95": wilson(sum(hits), len(hits)),
        "people": len(choices),
        "chance": 1 / len(asked[0]["options"]) if asked else None,
    }


def read_choices(path, asked, digest):
    """The number of the class that one person chose, or None, for each question."""
    try:
        text = results.read_bytes(path).decode("utf-8-sig")
        if Path(path).suffix.lower() == ".csv":
            return sheet_choices(text, asked, path)
        return page_choices(text, asked, digest, path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "it holds something else"
        raise UserError(
            f"{path} cannot be read as answers: {reason}; give what the page saved, or the "
            "filled sheet."
        ) from None


def sheet_choices(text, asked, path):
    rows = {int(row["question"]): row for row in csv.DictReader(io.StringIO(text))}
    same = 0
    for number, row in rows.items():
        if 0 < number <= len(asked):
            expected = in_a_cell(asked[number - 1]["given"])
            same += row["words"].strip() == expected.strip()
    if 2 * same < len(rows):  # not all: a spreadsheet makes 3.1 of 3.10
        raise other_packet(path)
    choices = []
    for number, q in enumerate(asked, 1):
        name = rows[number]["choice"].strip() if number in rows else ""
        choices.append(q["options"].index(name) if name else None)
    return choices


def page_choices(text, asked, digest, path):
    saved = json.loads(text)
    if saved["page"] != digest:
        raise other_packet(path)
    choices = saved["choices"]
    fitting = len(choices) == len(asked)
    for choice, q in zip(choices, asked):
        fitting = fitting and (choice is None or choice in range(len(q["options"])))
    if not fitting:
        raise ValueError("choices that do not fit the questions")
    return choices


def other_packet(path):
    return UserError(f"{path} answers another packet than this key's; score it with its own key.")
