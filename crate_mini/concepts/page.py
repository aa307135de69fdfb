"""Concepts to look at, from concepts.json and nothing else: concepts.html and concepts.png.

The codes that are shown were drawn by the seed, never chosen by eye. Every word comes from a
corpus: all are escaped, and the page's policy lets the browser run nothing.
"""

from html import escape

import numpy as np

from crate_mini.concepts import report
from crate_mini.concepts.ablate import VARIANTS
from crate_mini.data.tokenizer import visible
from crate_mini.plots.figure import AMBER, BLUE, GREEN, GREY, PURPLE, RED, grid, write
from crate_mini.plots.html import html

COLORS = (BLUE, RED, GREEN, AMBER, PURPLE, GREY)  # of the classes
RETRAINED = "the text's own code, then a new probe on what is left"
FORMS = {
    "probe, read-out": "removed from the state that the head reads; probes answer",
    "probe, mean": "removed from the mean of the words' states; probes answer",
    "last": "removed from the state that the head reads; the model itself runs on and answers",
    "all": "removed from the state of every token; the model itself runs on and answers",
}
INTRODUCTION = (
    "<p>One direction is removed from the classifier’s states, text by text; each cell is the "
    "accuracy that is left. A concept matters if its own code does more harm than the controls "
    "below it. <em>Drop</em>: the 95 % interval of the loss in accuracy lies above 0. <em>At "
    "chance</em>: the interval of the accuracy reaches down to the share of the largest class. "
    "<em>Sign flip</em>: the accuracy is lower than any constant answer has, so that the "
    "information is still there, with the opposite sign. <em>Nothing to lose</em>: the answers "
    "were at chance before.</p>"
)
STYLE = """<style>
.code { break-inside: avoid; margin: 0 0 1.4rem; padding-top: .6rem; border-top: 1px solid #8884; }
.code .words span { white-space: nowrap; margin-right: .7em; } .code small { opacity: .65; }
.code q { display: block; margin: .3rem 0; quotes: none; } .mix { display: flex; height: .5rem; }
.mix i { display: block; } .class { white-space: nowrap; margin-right: .8em; }
.class i { display: inline-block; width: .8em; height: .8em; margin-right: .3em; }
.class i { border-radius: 2px; }
.chance { font-weight: bold; border-left: .3rem solid; padding-left: .7rem; }
h3 { margin-top: 2rem; } h3 small { display: block; } .flip { font-weight: bold; }
table.cuts td, table.cuts th { padding: .15rem .6rem; text-align: right; }
table.cuts td { white-space: nowrap; }
table.cuts th:first-child { text-align: left; min-width: 16rem; }
@media (max-width: 700px) {
  table.cuts th:first-child { min-width: 8rem; padding-left: 0; }
  table.cuts td, table.cuts th { padding: .15rem .35rem; font-size: .85rem; }
  table.cuts td { white-space: normal; }
}
</style>"""


LARGEST = 17  # points, of the most frequent word of a code in concepts.png
PANEL = 215, 95  # points, what of a panel of concepts.png is for words


# ---- concepts.html -------------------------------------------------------------------------------


def page(result, title):
    """concepts.html as bytes: facts, what each ablation does, codes drawn by the seed.

    result: concepts.json.
    """
    parts = [
        f'<main id="concepts">{STYLE}',
        header(result, title),
        "<section><h2>Accuracy without a concept</h2>",
        INTRODUCTION,
        *[ablation_table(result, form) for form in result["shared"]],
        "</section>",
        *[method_section(result, name) for name in result["methods"]],
        "</main>",
    ]
    return html(title, "".join(parts), {}, "")


def header(result, title):
    """The title, whether the classifier is at chance, names and values of what this is about."""
    warning = ""
    if report.at_chance(result["classifier"]):
        warning = f'<p class="chance">{escape(report.chance_sentence(result["classifier"]))}</p>'
    pairs = []
    for name, value in facts(result).items():
        pairs.append(f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>")
    return (
        f'<header><p class="eyebrow">crate_mini · concepts</p><h1>{escape(title)}</h1>'
        f"{warning}<dl>{''.join(pairs)}</dl></header>"
    )


def facts(result):
    """{name: value} for the head of the page."""
    lower, upper = result["layers"]
    test = result["classifier"]
    low, high = test["ci95"]
    judge = result["judge"]
    if not isinstance(judge, str):
        judge = f"{judge['cards']} texts, {', '.join(judge['failed'])}"
    return {
        "classifier": f"accuracy {test['accuracy']:.3f} on {test['n']} test texts "
        f"(95 %: {low:.3f} to {high:.3f}; chance {test['chance']:.3f})",
        "texts": result["labelled"]["source"],
        "layers": f"{lower} to {upper}",
        "words": " + ".join(f"{n:,} {split}" for split, n in result["words"].items()),
        "codes": result["k"],
        "language-model judges": judge,
        "people": result["people"],
        "commit": result["machine"].get("commit"),
    }


def ablation_table(result, form):
    """Accuracy by variant and method, in one form."""
    methods, shared = result["methods"], result["shared"][form]
    intact = shared["intact"]
    rows = []
    for variant, meaning in {**VARIANTS, "retrained": RETRAINED}.items():
        cells = []
        for method in methods.values():
            cells.append(
                outcome_cell(method["faithfulness"][form].get(variant) or shared.get(variant))
            )
        name = f"{escape(variant)} <small>{escape(meaning)}</small>"
        rows.append(f"<tr><th>{name}</th>{''.join(cells)}</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in methods)
    return (
        f"<h3>{escape(form)} <small>{escape(FORMS.get(form, ''))}</small></h3>"
        f'<div class="wide"><table class="cuts"><tr><th>intact {intact["accuracy"]:.3f}, '
        f"chance {intact['chance']:.3f}, n {intact['n']}</th>{head}</tr>{''.join(rows)}"
        "</table></div>"
    )


def outcome_cell(outcome):
    """A cell with accuracy and verdict; a dash for an ablation that was not run."""
    if outcome is None:
        return "<td>–</td>"
    flip = ' class="flip"' if outcome["verdict"] == "sign flip" else ""
    return f"<td{flip}>{outcome['accuracy']:.3f} {outcome['verdict']}</td>"


def method_section(result, name):
    """The codes of one method."""
    method, classes = result["methods"][name], result["classes"]
    codes = "".join(code_card(code, classes) for code in method["codes"])
    return (
        f"<section><h2>{escape(name)}</h2><p>{len(method['codes'])} of the "
        f"{method['with_members']} codes that have words, drawn at random by seed "
        f"{result['seed']}. Codes whose words are all digits and signs: {method['wordless']}. "
        f"{agreement_sentences(method['agreement'][str(result['seed'])])}The "
        f"bars show the classes of the texts around the training words: {legend(classes)}</p>"
        f"{codes}</section>"
    )


def agreement_sentences(agreement):
    """How alike codes are to clvq's and to those they started from, where either is known."""
    sentences = ""
    meaning = (
        "adjusted mutual information over the test words: 1 for the same clusters, 0 by chance"
    )
    if agreement["clvq"] is not None:
        sentences += f"Agreement with the codes of clvq: {agreement['clvq']:.2f} ({meaning}). "
    if agreement["start"] is not None:
        sentences += (
            f"Agreement with spherical k-means, from which training started: "
            f"{agreement['start']:.2f} ({meaning}). "
        )
    return sentences


def legend(classes):
    """The colours of the classes."""
    items = []
    for i, name in enumerate(classes):
        swatch = f'<i style="background:{color(i)}"></i>'
        items.append(f'<span class="class">{swatch}{escape(name)}</span>')
    return " ".join(items)


def color(i):
    """The colour of class i."""
    return COLORS[i % len(COLORS)]


def code_card(code, classes):
    """One code: its words with counts, its classes, texts in which a word of it is marked."""
    bars = []
    total = max(1, sum(code["mix"]))
    for i, (name, n) in enumerate(zip(classes, code["mix"])):
        style = f"width:{100 * n / total:.1f}%;background:{color(i)}"
        bars.append(f'<i style="{style}" title="{escape(name)} {n}"></i>')
    words = [f"<span>{shown(word)} <small>{n}</small></span>" for word, n in code["words"]]
    texts = [quotation(example) for example in code["examples"]]
    return (
        f'<div class="code"><p><b>code {code["code"]}</b> '
        f'<small>{code["size"]} training words</small></p><div class="mix">{"".join(bars)}</div>'
        f'<p class="words">{" ".join(words)}</p>{"".join(texts)}</div>'
    )


def quotation(example):
    """The words of a text around the marked one."""
    words = [shown(word) for word in example["words"]]
    words[example["at"]] = f"<mark>{words[example['at']]}</mark>"
    return f"<q>{' '.join(words)} <small>{escape(example['kind'])}</small></q>"


def shown(text):
    """Text of a corpus as HTML: control characters visible, markup escaped."""
    return escape(visible(text.encode("utf-8", "replace")))


# ---- concepts.png --------------------------------------------------------------------------------


def cloud(result, target, codes=4):
    """concepts.png: words of the first codes of each method on the page; returns the path.

    The size of a word goes with the root of its count. The colour is the class that most of the
    code's training words come from.
    """
    from matplotlib.patches import Patch

    methods = result["methods"]
    figure, panels = grid(len(methods) * codes, codes, (3.2, 1.7))
    figure.set_figheight(figure.get_figheight() + 1.4)  # for the title and the legend
    for axes in panels:
        axes.set_axis_off()
    for i, (name, method) in enumerate(methods.items()):
        row = panels[i * codes : (i + 1) * codes]
        for axes, code in zip(row, method["codes"]):
            axes.set_title(f"{name}, code {code['code']}", fontsize=8, parse_math=False)
            draw_words(axes, code)
    patches = [Patch(color=color(i)) for i in range(len(result["classes"]))]
    figure.legend(
        patches,
        result["classes"],
        title="colour: the class that most of a concept's training words come from",
        loc="outside lower center",
        ncols=6,
        frameon=False,
    )
    lower, upper = result["layers"]
    figure.suptitle(
        f"Concepts of the classifier's layers {lower} to {upper}, drawn by the seed: a row for "
        "each method,\na panel for each code with its most frequent words (size: the root of their "
        "count)",
        fontsize=11,
    )
    return write(figure, target, dpi=110)


def draw_words(axes, code):
    style = {"va": "center", "parse_math": False, "color": color(int(np.argmax(code["mix"])))}
    for x, y, size, text in layout(code["words"]):
        axes.text(x, y, text, fontsize=size, **style)


def layout(words, width=PANEL[0], height=PANEL[1], longest=30):
    """Places for words (word, count), most frequent first, in rows: as many as fit.

    width, height: of a panel, in points. A row is half as high again as its first, largest word.
    [(x in 0 .. 1, y of the middle in 0 .. 1, size in points, text)]
    """
    highest = max((n for _, n in words), default=1)
    places = []
    x, middle, bottom = width, None, height
    for word, n in words:
        size = LARGEST * (0.4 + 0.6 * (n / highest) ** 0.5)
        text = visible(word[:longest].encode("utf-8", "replace"))
        room = text_width(text, size) + 0.5 * size
        if x > 0 and x + room > width:
            middle, bottom = bottom - 0.75 * size, bottom - 1.5 * size
            x = 0.0
        if bottom < 0:
            break
        places.append((x / width, middle / height, size, text))
        x += room
    return places


def text_width(text, size):
    """How wide a text is in matplotlib's default font; both in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    return text_to_path.get_text_width_height_descent(text, FontProperties(size=size), False)[0]
