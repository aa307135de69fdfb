"""text.html: a text of the user's, its tokens coloured by any neuron that matters in it."""

from html import escape

import torch

from crate_mini.console import results
from crate_mini.neurons import score_files
from crate_mini.neurons.record import kind_of
from crate_mini.plots.html import asset, html, shared_script

STRONGEST, SPECIFIC = 60, 60  # neurons on the page's two lists
PER_TOKEN = 4  # further neurons of each token
LEVELS = 100  # of an activation on the page, as a share of the neuron's maximum


def page(firing, note, folder, ckpt, command):
    """text.html of a Firing, as bytes. note: what was cut; folder: where the page will lie."""
    chosen = _chosen(firing)
    linked = (folder / "index.html").exists()
    data = {
        "tokens": [firing.lab.token(id) for id in firing.ids],
        "breaks": [int(_breaks_line(firing, id)) for id in firing.ids],
        "neurons": [_neuron(firing, i, linked) for i in chosen],
        "lists": [
            ["fires here more than elsewhere", _places(firing.most_specific(SPECIFIC), chosen)],
            ["closest to its own maximum", _places(firing.strongest(STRONGEST), chosen)],
        ],
    }
    name = score_files.checkpoint_name({"checkpoint": {"path": str(ckpt)}})
    script = shared_script() + asset("crate_mini.neurons", "text.js")
    style = asset("crate_mini.neurons", "text.css")
    return html(f"{name} · text", _body(firing, name, note, command), data, script, style)


def _breaks_line(firing, id):
    tokenizer = firing.lab.tokenizer
    return id < tokenizer.vocab_size and b"\n" in tokenizer.token_bytes(id)


def _chosen(firing):
    """Numbers of the neurons that the page holds: of the lists, and the top ones of each token."""
    chosen = dict.fromkeys(firing.most_specific(SPECIFIC) + firing.strongest(STRONGEST))
    k = min(PER_TOKEN, firing.share.shape[1])
    top = firing.share.topk(k, 1)
    for values, numbers in zip(top.values.tolist(), top.indices.tolist()):
        for value, i in zip(values, numbers):
            if value > 0:
                chosen[i] = None
    return list(chosen)


def _places(numbers, chosen):
    place_of = {i: place for place, i in enumerate(chosen)}
    return [place_of[i] for i in numbers]


def _neuron(firing, i, linked):
    """A neuron for text.js: what it is, and where it fires, as [places] and [levels]."""
    levels = (LEVELS * firing.share[:, i].clamp(0, 1)).ceil().int()
    where = torch.nonzero(levels > 0).flatten()
    name = firing.name(i)
    return {
        "name": name,
        "page": name if linked and firing.is_known(i) else "",
        "label": firing.label(i),
        "property": firing.property(i),
        "max": _short(firing.maximum[i]),
        "value": _short(firing.acts[:, i].max()),
        "strength": _short(firing.strength[i]),
        "lift": _short(firing.lift[i]),
        "density": _short(firing.density[i]),
        "peak": int(firing.peak[i]),
        "at": where.tolist(),
        "levels": levels[where].tolist(),
    }


def _short(value):
    return float(f"{float(value):.3g}")


def _body(firing, name, note, command):
    """The page's HTML: facts, and the places that text.js fills."""
    facts = {
        "model": kind_of(firing.lab.model.config),
        "tokens": f"{len(firing.ids):,}",
        "neurons": f"{len(firing.neurons):,}",
        "compared with": firing.compared_with,
        "commit": results.commit(),
    }
    rows = [f"<div><dt>{fact}</dt><dd>{escape(text)}</dd></div>" for fact, text in facts.items()]
    notice = f'<p class="notice">{escape(note)}.</p>' if note else ""
    return (
        '<main><header><p class="eyebrow">crate_mini · which neurons fire on this text?</p>'
        f"<h1>{escape(name)}</h1><dl>{''.join(rows)}</dl>{notice}</header>"
        '<div class="halves"><section class="reading"><h2 id="shown">The text</h2>'
        '<p id="about" role="status"></p><p id="text"></p>'
        '<p class="legend">Colour: the neuron’s value, from 0 to its maximum on held-out text. '
        "Choose a neuron, or a token to see its neurons.</p></section>"
        '<section class="choosing"><h2>Neurons</h2><p class="tabs" id="tabs"></p>'
        '<div id="list"></div></section></div>'
        f'<footer><p class="legend">made by <code>{escape(command)}</code></p></footer></main>'
    )
