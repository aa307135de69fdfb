"""Concepts to look at, from a result file and nothing else: concepts.html and concepts.png.

Which codes are shown is drawn by the seed, never chosen by eye. Every word comes from a corpus: all are
escaped, and the page's policy lets the browser run nothing.
"""

from html import escape

import numpy as np

from crate_mini import atomic_write
from crate_mini.concepts.ablate import VARIANTS
from crate_mini.data.tokenizer import visible
from crate_mini.plots.html import html

COLORS = ("#1f4e8c", "#d1495b", "#2a9d6f", "#e0a030", "#7b5ea7", "#888888")
RETRAINED = "the own code, and a new probe on what is left of the states"
ABOUT = {
    "probe, read-out": "out of the state that the classifier reads, at the lower layer; probes judge",
    "probe, mean": "out of the mean of a text’s words, at the lower layer; probes judge",
    "last": "out of the state that the classifier reads; the model itself runs on from there",
    "all": "out of every word’s state; the model itself runs on from there",
}
STYLE = """<style>
.code { break-inside: avoid; margin: 0 0 1.4rem; padding-top: .6rem; border-top: 1px solid #8884; }
.code .words span { white-space: nowrap; margin-right: .7em; } .code small { opacity: .65; }
.code q { display: block; margin: .3rem 0; quotes: none; } .mix { display: flex; height: .5rem; }
.mix i { display: block; } .class { white-space: nowrap; margin-right: .8em; }
.class i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .3em; }
h3 { margin-top: 2rem; } h3 small { display: block; } .flip { font-weight: bold; }
table.cuts td, table.cuts th { padding: .15rem .6rem; text-align: right; }
table.cuts td { white-space: nowrap; }
table.cuts th:first-child { text-align: left; min-width: 16rem; }
</style>"""


def shown(text):
    """A word or text of a corpus as HTML: every control character visible, every sign of markup escaped."""
    return escape(visible(text.encode("utf-8", "replace")))


def page(result, title):
    """concepts.html as bytes: facts, what cuts do, codes drawn at random; result: concepts.json."""
    body = [
        f'<main id="concepts">{STYLE}<header><p class="eyebrow">crate_mini · concepts</p>'
        f"<h1>{escape(title)}</h1><dl>"
    ]
    body += [
        f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>"
        for k, v in facts(result).items()
    ]
    body += [
        "</dl></header>",
        "<section><h2>What is left without a concept</h2>",
        cuts(result),
        "</section>",
    ]
    for method, found in result["methods"].items():
        cards = found["codes"]
        body.append(
            f"<section><h2>{escape(method)}</h2><p>{len(cards)} of {found['with_members']} codes "
            f"that have words, drawn at random by seed {result['seed']}; {found['wordless']} of all "
            "hold digits and signs only. Bars: classes of the texts around its training words, "
            f"{key(result['classes'])}</p>"
        )
        body += [code(card, result["classes"]) for card in cards] + ["</section>"]
    return html(title, "".join([*body, "</main>"]), {}, "")


def key(classes):
    """Colours of the classes."""
    return " ".join(
        f'<span class="class"><i style="background:{COLORS[i % len(COLORS)]}"></i>'
        f"{escape(c)}</span>"
        for i, c in enumerate(classes)
    )


def facts(result):
    """The header's pairs of name and value."""
    at, test = result["layers"], result["classifier"]
    return {
        "classifier": f"accuracy {test['accuracy']:.3f} on {test['n']} test texts (95 %: "
        f"{test['ci95'][0]:.3f} to {test['ci95'][1]:.3f}; chance {test['chance']:.3f})",
        "texts": result["labelled"]["source"],
        "layers": f"{at[0]} to {at[1]}",
        "words": " + ".join(f"{n:,} {split}" for split, n in result["words"].items()),
        "codes": result["k"],
        "language-model judges": state(result["judge"]),
        "people": result["people"],
        "commit": result["machine"].get("commit"),
    }


def state(judge):
    """How far the judges came, in words."""
    return (
        judge if isinstance(judge, str) else f"{judge['cards']} texts, {', '.join(judge['failed'])}"
    )


def cuts(result):
    """Tables of accuracy by cut and method, one for each form."""
    out = []
    for form, intact in result["shared"].items():
        whole, methods = intact["intact"], result["methods"]
        head = "".join(f"<th>{escape(m)}</th>" for m in methods)
        out.append(
            f"<h3>{escape(form)} <small>{ABOUT.get(form, '')}</small></h3>"
            '<div class="wide"><table class="cuts"><tr><th>intact '
            f"{whole['accuracy']:.3f}, chance {whole['chance']:.3f}, n {whole['n']}</th>{head}</tr>"
        )
        for name, meaning in {**VARIANTS, "retrained": RETRAINED}.items():
            cells = ""
            for found in methods.values():
                one = found["faithfulness"][form].get(name) or intact.get(name)
                flip = ' class="flip"' if one and one["verdict"] == "sign flip" else ""
                cells += (
                    f"<td{flip}>"
                    + (f"{one['accuracy']:.3f} {one['verdict']}" if one else "–")
                    + "</td>"
                )
            out.append(f"<tr><th>{escape(name)} <small>{escape(meaning)}</small></th>{cells}</tr>")
        out.append("</table></div>")
    return "".join(out)


def code(card, classes):
    """One code: its words with counts, its classes, texts with the salient word marked."""
    whole = max(1, sum(card["mix"]))
    mix = "".join(
        f'<i style="width:{100 * n / whole:.1f}%;background:{COLORS[i % len(COLORS)]}" '
        f'title="{escape(c)} {n}"></i>'
        for i, (c, n) in enumerate(zip(classes, card["mix"]))
    )
    words = "".join(f"<span>{shown(word)} <small>{n}</small></span>" for word, n in card["words"])
    texts = ""
    for e in card["examples"]:
        inside = " ".join(
            f"<mark>{shown(w)}</mark>" if i == e["at"] else shown(w)
            for i, w in enumerate(e["words"])
        )
        texts += f"<q>{inside} <small>{escape(e['kind'])}</small></q>"
    return (
        f'<div class="code"><p><b>code {card["code"]}</b> <small>{card["size"]} training words</small>'
        f'</p><div class="mix">{mix}</div><p class="words">{words}</p>{texts}</div>'
    )


def cloud(result, target, codes=4, width=23):
    """concepts.png: words of the first codes of each method on the page, their size by the root of the count.

    Colour is the class that most of the code's training words are from."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    methods = result["methods"]
    figure, grid = plt.subplots(
        len(methods),
        codes,
        figsize=(3.2 * codes, 1.7 * len(methods)),
        squeeze=False,
        layout="constrained",
    )
    for row, (method, found) in zip(grid, methods.items()):
        for axes in row:
            axes.set_axis_off()
        for axes, card in zip(row, found["codes"]):
            axes.set_title(f"{method}, code {card['code']}", fontsize=8, parse_math=False)
            for x, y, size, word in layout(card["words"], width):
                axes.text(
                    x / width,
                    y,
                    visible(word.encode("utf-8", "replace")),
                    fontsize=size,
                    va="center",
                    parse_math=False,
                    color=COLORS[int(np.argmax(card["mix"])) % len(COLORS)],
                )
    with atomic_write(target) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
    return target


def layout(words, width):
    """[(x in characters of the largest, y in 0 .. 1, size in points, word)]: the most frequent first, in
    rows, as many as fit five."""
    most, out, x, row = max((n for _, n in words), default=1), [], 0.0, 0
    for word, n in words:
        scale = 0.4 + 0.6 * (n / most) ** 0.5
        room = scale * (len(word[:30]) + 1)
        if x + room > width and x > 0:
            x, row = 0.0, row + 1
        if row == 5:
            break
        out.append((x, 0.9 - 0.2 * row, 17 * scale, word[:30]))
        x += room
    return out
