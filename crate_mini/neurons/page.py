"""Pages from result files, and nothing else: neurons to look at, in one file that opens from disk.

`index` reads what `interpret.py neurons` wrote (record.json, summary.json, scores.jsonl, excerpts.jsonl), and
steering.json if `steer.py measure` left it there, and makes index.html: charts and tables drawn here, the
neurons as JSON, page.js and page.css inlined. No network and no model; equal inputs and seeds give equal
bytes. Texts come from a corpus, so they are data everywhere: escaped here, set as text (never as markup) by
the script, and a content security policy lets the browser run nothing but our own script and load nothing.

The key "effect" of a line of scores.jsonl, which dead neurons lack, is shown as the causal effect on the next
token: what explain.effects returns, and under "far" the same for a multiple of that level.
"""

import json
import math
from collections import Counter
from html import escape
from pathlib import Path

import numpy as np

from crate_mini import UserError
from crate_mini.data.tokenizer import visible
from crate_mini.neurons.protocols import flat
from crate_mini.plots import svg as charts
from crate_mini.plots.html import asset, html
from crate_mini.steering import figure as dose_views

# ---- results ---------------------------------------------------------------------------------------------


def read(folder):
    """(record, summary, neurons) of a result folder; a neuron is its scores' line with its excerpts' added.

    Raises UserError for a file that is missing or damaged.
    """
    folder = Path(folder)
    record, summary = _json(folder, "record.json")[0], _json(folder, "summary.json")[0]
    shown = {(e["site"], e["neuron"]): e for e in _json(folder, "excerpts.jsonl")}
    neurons = [
        {**shown.get((n["site"], n["neuron"]), {}), **n, "scores": flat(n["scores"])}
        for n in _json(folder, "scores.jsonl")
    ]
    return record, summary, neurons


def _json(folder, name):
    """The JSON values of a file, one a line for .jsonl; NaN and infinities, no JSON, become None."""
    try:
        text = (folder / name).read_text(encoding="utf-8")
        parts = text.splitlines() if name.endswith("l") else [text]
        return [json.loads(part, parse_constant=lambda _: None) for part in parts if part.strip()]
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no {name}; `python interpret.py neurons CKPT` writes it."
        ) from None
    except ValueError as e:
        raise UserError(
            f"{folder / name} is damaged ({e}); `python interpret.py neurons CKPT --from score` "
            "writes it again."
        ) from None


def checkpoint_name(record):
    """Of the record's checkpoint: its folder and the one above."""
    return (
        "/".join(Path((record.get("checkpoint") or {}).get("path", "")).parts[-2:])
        or "a checkpoint"
    )


def label_text(label, token, n=5):
    """A label in one line: its class and first n tokens with their shares of activation, or its own text."""
    if label.get("text"):
        return label["text"]
    tokens = ", ".join(
        f"“{token(t[0])}”{'' if t[3] is None else f' {100 * t[3]:.2g} %'}"
        for t in label.get("tokens", [])[:n]
    )
    return ": ".join(part for part in (label.get("class"), tokens) if part)


def draw(neurons, most, seed):
    """At most `most` neurons in their order, drawn by the seed when there are more."""
    if len(neurons) <= most:
        return neurons
    return [
        neurons[i]
        for i in sorted(np.random.default_rng(seed).choice(len(neurons), most, replace=False))
    ]


# ---- the data of a page ----------------------------------------------------------------------------------


def _digits(values):
    """Decimals to write values with: as many as they have, but 1/10,000 of the largest is fine enough."""
    top = max(map(abs, values), default=0)
    enough = max(0, 4 - math.floor(math.log10(top))) if top else 0
    return next((d for d in range(enough) if all(round(v, d) == v for v in values)), enough)


def _excerpts(neuron):
    """(group, excerpt) of all of a neuron's excerpts."""
    return [(group, e) for group in ("top", "intervals", "random") for e in neuron.get(group) or []]


def pack(neurons, token, metrics):
    """JSON-able data of index.html: tokens once, most frequent first; activations as integers.

    A neuron's excerpts are [place of the peak, document, 1 if scored else 0, tokens, values, simulated or 0],
    values and simulated times 10 ** digits (exact to 1/10,000 of the largest); its scores are in the order of
    `metrics`, null where missing.
    """
    count = Counter()
    for n in neurons:
        label, effect = n.get("label") or {}, n.get("effect") or {}
        for _, e in _excerpts(n):
            count.update(e["tokens"])
        for pairs in (
            label.get("tokens", []),
            *(e.get(k, []) for e in (effect, effect.get("far", {})) for k in ("raised", "lowered")),
        ):
            count.update(t[0] for t in pairs)
        count.update([*label.get("left", []), *label.get("raised", [])])
    order = {t: i for i, (t, _) in enumerate(sorted(count.items(), key=lambda c: (-c[1], c[0])))}
    sites = list(dict.fromkeys(n["site"] for n in neurons))
    return {
        "sites": sites,
        "metrics": metrics,
        "tokens": [token(t) if t >= 0 else "" for t in order],
        "neurons": [_pack(n, order, sites, metrics, token) for n in neurons],
    }


def _pack(n, order, sites, metrics, token):
    """One neuron of `pack`."""

    def pairs(rows):
        return [[order[row[0]], *row[1:]] for row in rows]

    label = n.get("label") or {}
    digits = _digits([v for _, e in _excerpts(n) for v in (*e["acts"], *(e.get("sim") or []))])
    groups = {"top": [], "intervals": [], "random": []}
    for group, e in _excerpts(n):
        acts, sim = (
            [round(v * 10**digits) for v in e[k]] if e.get(k) else 0 for k in ("acts", "sim")
        )
        groups[group].append(
            [
                e["at"],
                e["doc"],
                int(e.get("part") == "score"),
                [order[t] for t in e["tokens"]],
                acts,
                sim,
            ]
        )
    packed = {
        "site": sites.index(n["site"]),
        "id": n["neuron"],
        "digits": digits,
        **groups,
        "text": label_text(label, token),
        "label": {
            "tokens": pairs(label.get("tokens", [])),
            "class": label.get("class", ""),
            **{k: [order[t] for t in label.get(k, [])] for k in ("left", "raised")},
        },
        "scores": [n["scores"].get(m) for m in metrics],
        **{
            k: n.get(k)
            for k in ("status", "density", "max", "mean", "ci95", "hist", "atoms", "together")
        },
        "why": n.get("why") if n["status"] != "dead" else None,
    }
    if n.get("effect"):
        packed["effect"], far = (
            {**e, **{k: pairs(e.get(k, [])) for k in ("raised", "lowered")}}
            for e in (n["effect"], n["effect"].get("far", {}))
        )
        packed["effect"]["far"] = far
    return {k: v for k, v in packed.items() if v not in (None, {}, [])}


# ---- the page --------------------------------------------------------------------------------------------


def _facts(record, summary, neurons, seed):
    """The header's pairs of name and value, in reading order."""
    checkpoint, corpus = record.get("checkpoint") or {}, record.get("corpus") or {}
    config, training = checkpoint.get("config") or {}, checkpoint.get("training") or {}
    status = Counter(n.get("status", "live") for n in neurons)
    source = corpus.get("source") or {}
    tokens, documents = record.get("tokens") or {}, record.get("documents") or {}
    facts = {
        "model": f"{checkpoint.get('kind', 'model')}, {config.get('n_layer')} layers, d = "
        f"{config.get('n_embd')}, {config.get('vocab_size', 0):,} ids",
        "checkpoint": f"{checkpoint_name(record)}, sha256 {(checkpoint.get('sha256') or 'unknown')[:12]}",
        "validation loss": f"{training['best_val_loss']:.4f} at step {training.get('step')}"
        if training.get("best_val_loss") is not None
        else None,
        "corpus": f"{source.get('name')}, sha256 {(corpus.get('text_sha256') or 'unknown')[:12]}",
        "fitted on": f"{tokens.get('fit', 0):,} tokens of {documents.get('fit', 0):,} documents",
        "scored on": f"{tokens.get('score', 0):,} tokens of {documents.get('score', 0):,} other documents",
        "neurons": f"{len(neurons):,}: "
        + ", ".join(f"{status.get(s, 0):,} {s}" for s in ("live", "dead", "undefined", "failed")),
        "seed": f"{record.get('seed')} of the run, {seed} of this page",
        "commit": (summary.get("machine") or record.get("machine") or {}).get("commit"),
    }
    return {k: str(v) for k, v in facts.items() if v}


def index(folder, token, seed=0, most=2048):
    """index.html of a result folder, as bytes.

    token: from an id to its bytes. most: how many neurons the page holds; of more, as many are drawn by the
    seed and the page says so, while means and charts are over all. Raises UserError as `read` does.
    """
    record, summary, neurons = read(folder)
    if not neurons:
        raise UserError(
            f"{folder} holds no neurons; `python interpret.py neurons CKPT` records some."
        )

    def text(i):
        return visible(token(i))

    shown = draw(neurons, most, seed)
    metrics = list(dict.fromkeys(m for n in neurons for m in n["scores"]))
    headline = "ngram_r" if "ngram_r" in metrics or not metrics else metrics[0]
    place = {(n["site"], n["neuron"]): i for i, n in enumerate(shown)}
    sites = list(dict.fromkeys(n["site"] for n in neurons))
    groups = {
        "": neurons,
        **{s: [n for n in neurons if n["site"] == s] for s in sites if sites[1:]},
    }
    facts = _facts(record, summary, neurons, seed)
    data = {
        **pack(shown, text, metrics),
        "seed": seed,
        "headline": headline,
        "read": (record.get("tokens") or {}).get("fit"),
    }
    part = (
        ""
        if len(shown) == len(neurons)
        else (
            f'<p class="notice">This page holds {len(shown):,} of {len(neurons):,} neurons, drawn by seed '
            f"{seed}; charts and means are over all.</p>"
        )
    )
    name = checkpoint_name(record)
    body = (
        f'<main id="index"><header><p class="eyebrow">crate_mini · neurons</p><h1>{escape(name)}</h1><dl>'
        + "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
        + f'</dl>{part}</header><section><h2>Distributions</h2><p class="tabs" id="tabs"></p>'
        + "".join(charts.figures(found, headline, place, site) for site, found in groups.items())
        + f"</section><section><h2>Means by layer</h2>{charts.means(summary)}</section>"
        + dose_views.beside(folder, (record.get("checkpoint") or {}).get("sha256"))
        + '<section><h2>Neurons</h2><div id="tools"></div><div id="list"></div></section></main>'
        '<main id="neuron" hidden></main><p id="hint" role="status"></p>'
    )
    return html(f"{name} · neurons", body, data, asset("crate_mini.neurons", "page.js"))
