"""The seven stages of `interpret.py neurons`, in order; each can run again alone.

    record    text, model                   -> record*, splits.json (record.py, documents.py,
                                               accumulate.py, record_files.py, spread.py)
    select    record                        -> select-SITE.npz     (excerpts.py)
    explain   record, model                 -> explain-SITE.jsonl  (labels.py, effects.py, trie.py)
    simulate  record, select, explain       -> simulate-SITE.npz   (simulators.py)
    score     all of these                  -> scores.jsonl, excerpts.jsonl, summary.json
                                               (score.py, protocols.py, redraw.py, summary.py)
    beyond    text, model                   -> beyond.json, beyond-neurons.jsonl, beyond.png
                                               (text_states.py, beyond.py and what it imports)
    report    scores, excerpts, summary     -> index.html, human.html, scores.png, density.png
                                               (report.py, page.py, survey.py, figures.py)

SITE is the name of a Site, L0 for the codes of layer 0. The folder `init` holds the record of the
control, an untrained model of the same architecture. With density matching (cut.py) the record is
of cut activations, and the stages after it see no others. The stages share a `Workspace`, which
reads and writes the files between them.
"""

import time
from functools import partial

import numpy as np

from crate_mini import UserError, cli
from crate_mini.console import results, terminal
from crate_mini.neurons import beyond, cut, excerpts, npz, record, report, score, spread
from crate_mini.neurons.documents import PARTS
from crate_mini.neurons.effects import draw_texts, next_token_effects
from crate_mini.neurons.labels import label_neurons, position_fit
from crate_mini.neurons.simulators import TokenTable, excerpt_table, label_table
from crate_mini.neurons.trie import activation_at_end, fit_trie

# Protocols that excerpts are selected for; openai_random scores the random ones of openai_tar.
SELECTED = ("openai_tar", "anthropic_crate", "anthropic_2023")
BLOCK = 512  # neurons whose tables are in memory at a time
EFFECT_LOGITS = 1 << 32  # computed for the effects of one site: a few minutes of a CPU
LABEL_RAISED = 5  # raised tokens in a label
FAR = 5  # multiple of its maximum to which a neuron is also raised
TRIE_WINDOWS = 10


def run(work, start="record", until="report"):
    """Run the stages from `start` to `until` on a Workspace.

    The files of earlier stages stay, whatever happens. Raises UserError for an unknown stage, for
    an empty range, and for files that a stage cannot use.
    """
    for flag, name in (("from", start), ("until", until)):
        if name not in STAGES:
            raise UserError(f"--{flag} {name!r} is not a stage; choose {cli.one_of(STAGES)}.")
    names = list(STAGES)
    chosen = names[names.index(start) : names.index(until) + 1]
    if not chosen:
        raise UserError(
            f"--until {until} comes before --from {start}; the order is {', '.join(names)}."
        )
    if start != names[0]:  # refuse at once files that these settings do not fit
        work.check_record()
        results.ready_folder(work.folder)
        for stage in chosen:
            for earlier in set(READS.get(stage, ())) - set(chosen):
                for site in work.sites:
                    work.check_file(earlier, site)
    for name in chosen:
        began = time.monotonic()
        try:
            STAGES[name](work)
        except BaseException:
            if name != names[0]:
                work.log(f"{name:9s} stopped; earlier stages are kept: resume with --from {name}")
            raise
        work.log(f"{name:9s} {time.monotonic() - began:.1f} s")


# ---- record --------------------------------------------------------------------------------------


def record_sites(work):
    """Record the model and, for the control `init`, an untrained one."""
    results.ready_folder(work.folder)
    recorded_sites = _record_model(work, work.model, work.meta, work.sites, work.folder)
    if work.has_init:
        model, meta = record.untrained_control(work.model, work.meta, work.seed)
        codes = [site for site in work.sites if site.sae is None]
        _record_model(work, model, meta, codes, work.folder / "init")
    work.open_new_record()
    for sentence in work.record.header["notes"]:
        work.log(f"documents {sentence}")
    spread.make_splits(work, recorded_sites)


def _record_model(work, model, meta, sites, folder):
    """Record one model, and return its sites.

    With density matching, activations below each neuron's limit are 0.
    """
    facts, dtype = None, "auto"
    if work.density:
        cut.check_share(work.density)
        dtype = record.products_dtype(model)  # measured once, for both passes
        limits = record.limits(
            model,
            sites,
            work.corpus,
            work.density,
            eot=work.tokenizer.eot,
            seed=work.seed,
            tokens=work.tokens,
            dtype=dtype,
        )
        facts = _cut_facts(work, model, sites, limits, is_control=model is not work.model)
        sites = [cut.cut_site(site, limits[site.name]) for site in sites]
    record.record(
        model,
        meta,
        sites,
        work.corpus,
        folder,
        path=work.path,
        command=work.command,
        seed=work.seed,
        tokens=work.tokens,
        dedup=work.dedup,
        dtype=dtype,
        facts=facts,
        log=work.log,
    )

    return sites


def _cut_facts(work, model, sites, limits, is_control):
    """A function of {site: densities (h,)} for record.record: the header's entry "cut".

    {"share": what was asked for, "density": {site: what was reached}, "loss": see cut.losses}; the
    untrained control has no loss worth showing.
    """
    loss = None
    if not is_control:
        loss = cut.losses(model, sites, limits, work.directions, work.corpus)

    def facts(densities):
        reached = {}
        for name, density in densities.items():
            reached[name] = cut.density_reached(density, limits[name])
        return {"cut": {"share": work.density, "density": reached, "loss": loss}}

    return facts


# ---- select --------------------------------------------------------------------------------------


def select_excerpts(work):
    """Write excerpts of every protocol, for all neurons to score."""
    for site in work.each_site():
        arrays = {}
        for protocol in SELECTED:
            pairs = [
                excerpts.select(work.record, site.name, protocol, int(j), work.seed)
                for j in work.neurons(site)
            ]
            for part, selected in zip(PARTS, zip(*pairs)):
                for name, array in _padded(selected).items():
                    arrays[f"{protocol}_{part}_{name}"] = array
        work.write("select", site, arrays)


def _padded(selected):
    """{name: array} of the Excerpts of n neurons, in one shape; padding has token -1, origin ""."""
    n = len(selected)
    most = max(len(chosen.doc) for chosen in selected)
    width = max(chosen.acts.shape[1] for chosen in selected)
    arrays = {
        "tokens": np.full((n, most, width + 1), -1, np.int32),
        "acts": np.zeros((n, most, width), np.float32),
        "doc": np.full((n, most), -1),
        "origin": np.full((n, most), "", "U16"),
    }
    for i, chosen in enumerate(selected):
        count, w = chosen.acts.shape
        arrays["tokens"][i, :count, : w + 1] = chosen.tokens
        arrays["acts"][i, :count, :w] = chosen.acts
        arrays["doc"][i, :count] = chosen.doc
        arrays["origin"][i, :count] = chosen.origin
    return arrays


# ---- explain -------------------------------------------------------------------------------------


def explain_neurons(work):
    """Write a line for each neuron: label, effect on the next token, and for some a trie."""
    texts = draw_texts(work.chunks("fit"), seed=work.seed)
    for site in work.each_site():
        neurons = work.neurons(site)
        labels = _labels(work, site, neurons)
        effects = _effects(work, site, neurons, texts)
        count = min(work.trie, len(neurons))
        with_trie = work.rng(site, "trie").choice(len(neurons), count, replace=False)
        maxima = work.record.site(site.name)["max"]
        lines = []
        for i, j in enumerate(neurons.tolist()):
            stamp = work.record.header["stamp"]
            line = {"site": site.name, "neuron": j, "record": stamp, "label": labels[i]}
            if maxima[j] > 0 and i in effects:
                stable = [id for id, *_, holds in effects[i]["raised"] if holds]
                line["label"]["raised"] = stable[:LABEL_RAISED]
                line["effect"] = effects[i]
            if i in with_trie:
                line["trie"] = _trie(work, site, j).patterns
            lines.append(line)
        results.write_rows(work.file("explain", site, "jsonl"), lines)


def _blocks(neurons):
    """Slices of a site's scored neurons, short enough that their tables fit into memory."""
    return [slice(i, i + BLOCK) for i in range(0, len(neurons), BLOCK)]


def _labels(work, site, neurons):
    """The label of each neuron, from the fit part of the record."""
    tokenizer, config = work.tokenizer, work.model.config
    texts = [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]
    texts += [b""] * (config.vocab_size - len(texts))  # ids that pad the vocabulary
    before_window = work.record.shared["uniform_fit"][:, 0]
    start = np.where(before_window < 0, 0, config.block_size // 2)  # else somewhere in the context
    acts = work.record.site(site.name)["uniform_fit_acts"]
    labels = []
    for block in _blocks(neurons):
        position = position_fit(acts[..., neurons[block]], start)
        labels += label_neurons(work.ngram_table(site, neurons[block]), texts, position)
    return labels


def _effects(work, site, neurons, texts):
    """{i: effect on the next token} of raising the i-th neuron to 1 and FAR times its maximum.

    Each takes a pass for every text and level. Where those of all neurons would cost more than
    EFFECT_LOGITS, they are drawn by the seed.
    """
    count = sum(map(len, texts))
    if not count:
        work.log(f"explain   {site.name}: no effects, no text of the fit part has three tokens")
        return {}
    affordable = max(1, EFFECT_LOGITS // (2 * count * work.model.config.vocab_size))
    chosen = np.arange(len(neurons))
    if len(chosen) > affordable:
        chosen = np.sort(work.rng(site, "effects").choice(chosen, affordable, replace=False))
    lengths = [len(text) - 1 for group in texts for text in group]
    drawn = "" if len(chosen) == len(neurons) else f" of {len(neurons):,}, drawn by the seed,"
    work.log(
        f"explain   {site.name}: raise {len(chosen):,} neurons{drawn} to 1 and {FAR} times their "
        f"maximum, after {count} texts of {min(lengths)} to {max(lengths)} tokens from "
        f"{len(texts)} documents"
    )
    progress = terminal.Progress("effects", 2 * count * len(chosen))
    levels = work.record.site(site.name)["max"][neurons[chosen]]
    near, far = [
        next_token_effects(
            work.model,
            site.layer,
            neurons[chosen],
            multiple * levels,
            texts,
            work.tokenizer.vocab_size,
            site.encode,
            work.directions.get(site.name),
            done=partial(_show, progress, passed),
        )
        for multiple, passed in ((1, 0), (FAR, count * len(chosen)))
    ]
    return {int(i): {**near[k], "far": far[k]} for k, i in enumerate(chosen)}


def _show(progress, passed, done):
    progress.update(passed + done)


def _trie(work, site, j):
    """The trie of a neuron's top windows of the fit part."""
    arrays = work.record.site(site.name)
    windows = arrays["top_fit_tokens"][j, :TRIE_WINDOWS]
    acts = arrays["top_fit_acts"][j, :TRIE_WINDOWS]
    peaks = arrays["top_fit_at"][j, :TRIE_WINDOWS]
    texts = []
    for tokens, values, peak in zip(windows, acts, peaks.tolist()):
        if values[peak] > 0:
            ids = [id for id in tokens[: peak + 2].tolist() if id >= 0]
            texts.append((ids, float(values[peak])))
    activate = activation_at_end(work.model, site.layer, j, work.recorded(site).encode)
    return fit_trie(activate, texts, work.tokenizer.eot)


# ---- simulate ------------------------------------------------------------------------------------


def simulate_neurons(work):
    """Write the activations that each simulator expects on the windows and excerpts to score on.

    uniform_SIMULATOR (W, 64, n) of n neurons, PROTOCOL_SIMULATOR (n, m, w); float32 when read.
    """
    for site in work.each_site():
        init_record = work.init_record if work.has_init else None
        neurons = work.neurons(site)
        labels = [line["label"] for line in work.explanations(site)]
        selected = work.read("select", site)
        uniform, by_excerpt = [], []
        for block in _blocks(neurons):
            ngram = work.ngram_table(site, neurons[block])
            expected = _on_windows(work.record.shared["uniform_score"], ngram, labels[block])
            if init_record and site.name in init_record.sites:
                table = work.ngram_table(site, neurons[block], init_record)
                expected["uniform_init"] = table(init_record.shared["uniform_score"])
            uniform.append({name: acts.astype(np.float32) for name, acts in expected.items()})
            expected = _on_excerpts(selected, ngram, range(len(neurons))[block])
            by_excerpt.append({name: acts.astype(np.float32) for name, acts in expected.items()})
        on_windows = {name: npz.Halves(acts, -1) for name, acts in _joined(uniform, -1).items()}
        work.write("simulate", site, on_windows | _joined(by_excerpt, 0))


def _on_windows(windows, ngram, labels):
    """{"uniform_SIMULATOR": (W, 64, n)} on windows (W, 65), for the n neurons of an NgramTable."""
    by_label = [label_table(label)(windows) for label in labels]
    return {
        "uniform_token": TokenTable(ngram.values)(windows),
        "uniform_ngram": ngram(windows),
        "uniform_label": np.stack(by_label, -1),
    }


def _on_excerpts(selected, ngram, block):
    """{"PROTOCOL_SIMULATOR": (n, m, w)} on the selected excerpts of a block (range) of neurons."""
    neurons = slice(block.start, block.stop)
    columns = np.arange(len(block))[:, None, None]
    expected = {}
    for protocol in SELECTED:
        tokens = getattr(selected, f"{protocol}_score_tokens")[neurons]
        expected[f"{protocol}_ngram"] = ngram(tokens, columns)
    by_five = []
    for i in block:
        table = excerpt_table(selected.openai_tar_fit_tokens[i], selected.openai_tar_fit_acts[i])
        by_five.append(table(selected.openai_tar_score_tokens[i]))
    expected["openai_tar_five"] = np.stack(by_five)
    return expected


def _joined(blocks, axis):
    """{name: array}, the arrays of several blocks of neurons concatenated."""
    joined = {}
    for name in blocks[0]:
        joined[name] = np.concatenate([block[name] for block in blocks], axis)
    return joined


READS = {"simulate": ("select", "explain"), "score": ("simulate", "select", "explain")}
STAGES = {
    "record": record_sites,
    "select": select_excerpts,
    "explain": explain_neurons,
    "simulate": simulate_neurons,
    "score": score.score_neurons,
    "beyond": beyond.score_beyond,
    "report": report.report_neurons,
}
