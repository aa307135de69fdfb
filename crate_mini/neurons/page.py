"""index.html: scored neurons to look at, in one file that opens from disk.

`index` takes what `interpret.py neurons` wrote (record.json, summary.json, scores.jsonl and
excerpts.jsonl) and what its stage `beyond` and `steer.py measure` left there, if they did. Charts
and tables are drawn here; the neurons follow as JSON, which page.js draws. It needs no network and
no model; equal inputs and seeds give equal bytes. Texts come from a corpus, so they are data
everywhere: escaped here, set as text (never as markup) by the script, and a content security policy
lets the browser run only our own script and load nothing.
"""

from collections import Counter
from html import escape
from pathlib import Path

import numpy as np

from crate_mini import UserError
from crate_mini.console import results
from crate_mini.data.tokenizer import visible
from crate_mini.neurons import page_charts, score_files, steering_section
from crate_mini.neurons.page_data import pack
from crate_mini.neurons.summary import STATUS
from crate_mini.plots.html import asset, embedded, html, shared_script

HEADLINE = "ngram_r"  # the metric of the charts


def index(folder, scored, token_bytes, seed=0, most=2048):
    """index.html of a result folder, as bytes.

    scored: what score_files.read made of it. token_bytes: from an id to its bytes. most: neurons
    that the page holds; if there are more, this many are drawn by the seed and the page says so,
    while its charts and means are over all. Raises UserError if there are no neurons, and as
    steering_section.section does.
    """
    record, summary, neurons = scored
    if not neurons:
        raise UserError(
            f"{folder} holds no neurons; `python interpret.py neurons CKPT` records some."
        )
    shown = draw(neurons, most, seed)
    metrics = list(dict.fromkeys(metric for neuron in neurons for metric in neuron["scores"]))
    headline = HEADLINE if HEADLINE in metrics or not metrics else metrics[0]

    def token_text(id):
        return visible(token_bytes(id))

    data = pack(shown, token_text, metrics)
    data["seed"] = seed
    data["headline"] = headline
    name = score_files.checkpoint_name(record)
    checkpoint_hash = (record.get("checkpoint") or {}).get("sha256")
    beyond = _beyond(folder, checkpoint_hash)
    steering = steering_section.section(folder, checkpoint_hash)
    sections = [
        _header(name, _facts(record, summary, neurons, seed), len(shown), len(neurons), seed),
        _distributions(neurons, shown, headline),
        f"<section><h2>Means by layer</h2>{page_charts.means(summary)}</section>",
        beyond,
        steering,
        '<section><h2>Neurons</h2><div id="tools"></div><div id="list"></div></section>',
    ]
    body = (
        f'<main id="index">{"".join(sections)}</main>'
        '<main id="neuron" hidden></main><p id="hint" role="status"></p>'
    )
    script = shared_script() + asset("crate_mini.neurons", "page.js")
    style = asset("crate_mini.neurons", "page.css")
    return html(f"{name} · neurons", body, data, script, style, images=bool(beyond or steering))


def draw(neurons, most, seed):
    """At most `most` neurons, in their order; drawn by the seed if there are more."""
    if len(neurons) <= most:
        return neurons
    drawn = np.random.default_rng(seed).choice(len(neurons), most, replace=False)
    return [neurons[i] for i in sorted(drawn)]


def _header(name, facts, shown, total, seed):
    """Title, facts, and a notice if the page does not hold all neurons."""
    rows = [f"<div><dt>{fact}</dt><dd>{escape(text)}</dd></div>" for fact, text in facts.items()]
    notice = ""
    if shown < total:
        notice = (
            f'<p class="notice">This page holds {shown:,} of {total:,} neurons, drawn by seed '
            f"{seed}; charts and means are over all.</p>"
        )
    return (
        '<header><p class="eyebrow">crate_mini · neurons</p>'
        f"<h1>{escape(name)}</h1><dl>{''.join(rows)}</dl>{notice}</header>"
    )


def _facts(record, summary, neurons, seed):
    """{fact: text} for the header, in reading order."""
    checkpoint, corpus = record.get("checkpoint") or {}, record.get("corpus") or {}
    config, training = checkpoint.get("config") or {}, checkpoint.get("training") or {}
    tokens, documents = record.get("tokens") or {}, record.get("documents") or {}
    machine = summary.get("machine") or record.get("machine") or {}
    source = (corpus.get("source") or {}).get("name")
    checkpoint_hash = (checkpoint.get("sha256") or "unknown")[:12]
    corpus_hash = (corpus.get("text_sha256") or "unknown")[:12]
    count = Counter(neuron.get("status", "live") for neuron in neurons)
    by_status = ", ".join(f"{count[status]:,} {status}" for status in STATUS)
    facts = {
        "model": f"{checkpoint.get('kind', 'model')}, {config.get('n_layer')} layers, "
        f"d = {config.get('n_embd')}, {config.get('vocab_size', 0):,} ids",
        "checkpoint": f"{score_files.checkpoint_name(record)}, sha256 {checkpoint_hash}",
    }
    if training.get("best_val_loss") is not None:
        loss, step = training["best_val_loss"], training.get("step")
        facts["validation loss"] = f"{loss:.4f} at step {step}"
    cut = summary.get("cut")
    if cut:
        facts["cut to density"] = f"{cut['share']:g}: not how the model runs, see the notes below"
        if cut["loss"]:
            losses = [cut["loss"].get("all"), *cut["loss"]["sites"].values()]
            loss = next(loss for loss in losses if loss is not None)
            facts["loss if run so cut"] = f"{loss:.4f}, instead of {cut['loss']['uncut']:.4f}"
    facts |= {
        "corpus": f"{source}, sha256 {corpus_hash}",
        "fitted on": f"{tokens.get('fit', 0):,} tokens of {documents.get('fit', 0):,} documents",
        "scored on": f"{tokens.get('score', 0):,} tokens of {documents.get('score', 0):,} other "
        "documents",
        "neurons": f"{len(neurons):,}: {by_status}",
        "seed": f"{record.get('seed')} for the run, {seed} for this page",
    }
    if machine.get("commit"):
        facts["commit"] = machine["commit"]
    return facts


def _beyond(folder, sha256):
    """What the stage `beyond` found in this checkpoint, as a section; "" if it has not run."""
    path = Path(folder, "beyond.json")
    if not path.exists():
        return ""
    content = results.read_json(path)
    image = embedded(path.with_suffix(".png"), "coverage of properties of the text, by site")
    if not image or (content.get("checkpoint") or {}).get("sha256") != sha256:
        return ""
    return (
        '<section><h2>Beyond the token</h2><p class="saw">Which exact properties of the text so '
        "far do neurons follow, once the mean of each token is taken away? Left: the best neuron "
        "of each property, on other documents, beside a random rotation of the neurons and other "
        "controls; the basis of the neurons is special where they lie above the rotation. Right: "
        f"the properties that are covered best.</p>{image}</section>"
    )


def _distributions(neurons, shown, headline):
    """Charts of all neurons, and of each site's if there are several; the script shows one set."""
    places = {(neuron["site"], neuron["neuron"]): i for i, neuron in enumerate(shown)}
    sites = list(dict.fromkeys(neuron["site"] for neuron in neurons))
    lowest = page_charts.lowest_score(neurons, headline)
    blocks = [page_charts.distributions(neurons, headline, places, "", lowest)]
    if len(sites) > 1:
        for site in sites:
            of_site = [neuron for neuron in neurons if neuron["site"] == site]
            block = page_charts.distributions(of_site, headline, places, site, lowest)
            blocks.append(block)
    return (
        f'<section><h2>Distributions</h2><p class="tabs" id="tabs"></p>{"".join(blocks)}</section>'
    )
