"""A study with people that anyone can run: packet.html asks, saves answers as JSON, `score` counts them.

The question is CLVQ-VAE's: from a concept's words alone, what did the model say? Each item is the concept of
one test text's salient word; people choose among the classes. Items are drawn by the seed, half of them where
the model was right and half where it was wrong as far as there are such, every class as often; methods are
mixed and nowhere named. Chance is one in as many as there are classes. Without a browser: the packet's
second file, packet.csv, is a sheet to fill in.
"""

import csv
import hashlib
import io
import json
from pathlib import Path

import numpy as np

from crate_mini import UserError
from crate_mini.concepts.llm_ratings import stratified
from crate_mini.neurons.survey import wilson
from crate_mini.plots.html import asset, html, quiz_script

ITEMS = 40  # questions of a packet: ±15 points at 95 %


def questions(cards, methods, classes, seed=0, n=ITEMS):
    """JSON-able questions: n // len(methods) cards a method, none twice, in an order drawn by the seed.

    cards: [{"answer", "right", "concepts": {method: words}}]; a concept without words asks nothing.
    """
    each, found, rng = n // len(methods), [], np.random.default_rng(seed)
    groups = [f"{card['answer']} {card['right']}" for card in cards]
    order = stratified(groups, len(cards), seed).tolist()
    for method in methods:
        taken = [i for i in order if cards[i]["concepts"][method]][:each]
        order = [i for i in order if i not in set(taken)]
        found += [
            {
                "task": "concept",
                "method": method,
                "right": bool(cards[i]["right"]),
                "item": i,
                "given": cards[i]["concepts"][method],
                "options": list(classes),
                "answer": list(classes).index(cards[i]["answer"]),
            }
            for i in taken
        ]
    return [found[i] for i in rng.permutation(len(found))]


def packet(asked, about):
    """(page, sheet, key) as bytes: what people open, a CSV to fill in by hand, and what `score` needs and
    people must not see: of methods and right answers the page holds a digest only. about: a title.
    """
    key = json.dumps({"schema": 1, "about": about, "questions": asked}, indent=1).encode()
    shown = [{"given": q["given"], "options": q["options"]} for q in asked]
    data = {"page": hashlib.sha256(key).hexdigest(), "about": about, "questions": shown}
    body = (
        '<main><header class="task"><p class="eyebrow">crate_mini · what did the model say?</p></header>'
        '<div id="task" class="task"></div></main>'
    )
    sheet = io.StringIO()
    rows = csv.writer(sheet)
    rows.writerow(["question", "words", "choose one of", "choice"])
    for i, q in enumerate(shown, 1):
        rows.writerow([i, in_a_cell(q["given"]), " | ".join(q["options"]), ""])
    return (
        html(
            f"{about} · questions",
            body,
            data,
            quiz_script() + asset("crate_mini.concepts", "survey.js"),
        ),
        sheet.getvalue().encode(),
        key,
    )


def in_a_cell(words):
    """Words as the sheet shows them: a leading sign would be a formula to a spreadsheet."""
    text = " ".join(words)
    return "'" + text if text[:1] in "=+-@\t" else text


def score(key, *answers):
    """{method: {"n", "right", "accuracy", "ci95" (Wilson), "chance", "unanswered", "people"}} and the same
    under "all", "model right" and "model wrong" (what it answered); files: the key, people's answers.

    Answers are the page's .json or a filled sheet's .csv (a class' name under choice). Raises UserError for a
    file that cannot be read, of another packet, or with a choice that is no class.
    """
    try:
        raw = Path(key).read_bytes()
        asked = json.loads(raw)["questions"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{key} cannot be read as the key of a packet ({type(e).__name__}); `python "
            "interpret.py concepts CKPT` writes packet-key.json."
        ) from None
    given = [choices(path, asked, hashlib.sha256(raw).hexdigest()) for path in answers]
    groups = {
        "all": asked,
        **{
            m: [q for q in asked if q["method"] == m]
            for m in dict.fromkeys(q["method"] for q in asked)
        },
        "model right": [q for q in asked if q["right"]],
        "model wrong": [q for q in asked if not q["right"]],
    }
    found = {}
    for name, some in groups.items():
        pairs = [(c, q["answer"]) for own in given for c, q in zip(own, asked) if q in some]
        hits = [c == a for c, a in pairs if c is not None]
        found[name] = {
            "n": len(hits),
            "right": sum(hits),
            "unanswered": len(pairs) - len(hits),
            "accuracy": sum(hits) / len(hits) if hits else None,
            "ci95": wilson(sum(hits), len(hits)),
            "people": len(given),
            "chance": 1 / len(asked[0]["options"]) if asked else None,
        }
    return found


def choices(path, asked, digest):
    """[number of the chosen class or None] of one person's file."""
    other = UserError(f"{path} answers another packet than this key's; score it with its own.")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if Path(path).suffix.lower() == ".csv":
            rows = {int(row["question"]): row for row in csv.DictReader(io.StringIO(text))}
            same = sum(
                row["words"].strip() == in_a_cell(asked[i - 1]["given"]).strip()
                for i, row in rows.items()
                if 0 < i <= len(asked)
            )
            if 2 * same < len(rows):  # not all: a spreadsheet makes 3.1 of 3.10
                raise other
            named = {i: row["choice"].strip() for i, row in rows.items()}
            return [
                None if not named.get(i) else q["options"].index(named[i])
                for i, q in enumerate(asked, 1)
            ]
        found = json.loads(text)
        if found["page"] != digest:
            raise other
        picked = found["choices"]
        if len(picked) != len(asked) or not all(
            c is None or c in range(len(q["options"])) for c, q in zip(picked, asked)
        ):
            raise ValueError("choices that do not fit the questions")
        return picked
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{path} cannot be read as answers ({e!r}); give what the page saved, or the filled "
            "sheet."
        ) from None
