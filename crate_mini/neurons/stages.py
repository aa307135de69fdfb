"""The first stages of `interpret.py neurons`, from text to what every simulator expects; see neurons.py."""

import json

import numpy as np
import torch

from crate_mini import atomic_write
from crate_mini.neurons import excerpts
from crate_mini.neurons import protocols as score
from crate_mini.neurons import record as activations
from crate_mini.neurons import simulators as explain

PROTOCOLS = (
    "openai_tar",
    "anthropic_crate",
    "anthropic_2023",
)  # openai_random is a part of openai_tar
PROBE = 100_000  # tokens that thresholds of density matching are found on
BLOCK = 512  # neurons whose tables are held at a time
CONTEXTS = 4, 16  # held-out texts, and tokens read of them, in which neurons are raised
RAISED = 5  # next tokens in a label
FAR = 5  # times its maximum: the second level that a neuron is raised to


# ---- record, select --------------------------------------------------------------------------------------


def record(r):
    """The record, that of the control, and with match-density of activations cut at a quantile."""
    r.folder.mkdir(parents=True, exist_ok=True)
    _record(r, r.model, r.meta, r.sites, r.folder)
    if r.has_init:
        plain = [site for site in r.sites if site.sae is None]
        _record(r, *activations.untrained(r.model, r.meta, r.seed), plain, r.folder / "init")
    r.record = None


def _record(r, model, meta, sites, out):
    def make(sites, out, tokens):
        return activations.record(
            model,
            meta,
            sites,
            r.corpus,
            out,
            path=r.path,
            command=r.command,
            seed=r.seed,
            tokens=tokens,
            dedup=r.dedup,
            log=r.log,
        )

    if r.density:
        probe = make(sites, out / "probe", min(r.tokens, PROBE))
        sites = [
            cut(site, score.thresholds(probe.site(site.name)["uniform_fit_acts"], r.density))
            for site in sites
        ]
    make(sites, out, r.tokens)


def cut(site, limits):
    """The Site whose activations are those of `site` above limits (width,), 0 elsewhere."""

    def encode(codes):
        x = codes if site.encode is None else site.encode(codes)
        return score.cut(x, torch.from_numpy(limits).to(x))

    return activations.Site(site.name, site.layer, site.width, encode, site.sae)


def select(r):
    """The excerpts of every protocol for the neurons that are scored, padded to one shape: -1 no token."""
    for site in r.each_site():
        arrays = {}
        for protocol in PROTOCOLS:
            chosen = [
                excerpts.select(r.record, site.name, protocol, int(j), r.seed)
                for j in r.neurons(site)
            ]
            for part, found in zip(("fit", "score"), zip(*chosen)):
                most, width = max(len(e.doc) for e in found), max(e.acts.shape[1] for e in found)
                shape = len(found), most, width
                tokens, acts = (
                    np.full((*shape[:2], width + 1), -1, np.int32),
                    np.zeros(shape, np.float32),
                )
                doc, origin = np.full(shape[:2], -1), np.full(shape[:2], "", "U16")
                for i, e in enumerate(found):
                    tokens[i, : len(e.doc), : e.tokens.shape[1]] = e.tokens
                    acts[i, : len(e.doc), : e.acts.shape[1]] = e.acts
                    doc[i, : len(e.doc)], origin[i, : len(e.doc)] = e.doc, e.origin
                for name, value in (
                    ("tokens", tokens),
                    ("acts", acts),
                    ("doc", doc),
                    ("origin", origin),
                ):
                    arrays[f"{protocol}_{part}_{name}"] = value
        r.write("select", site, arrays)


# ---- explain, simulate -----------------------------------------------------------------------------------


def blocks(neurons):
    """Slices of a site's scored neurons, few enough that their tables fit into memory."""
    return [slice(i, i + BLOCK) for i in range(0, len(neurons), BLOCK)]


def explain_all(r):
    """A line for each scored neuron: label, effect on the next token, its trie's patterns if asked."""
    tokens, T = r.record.shared["uniform_fit"], r.model.config.block_size
    texts = [r.tokenizer.token_bytes(i) for i in range(r.tokenizer.vocab_size)]
    texts += [b""] * (r.model.config.vocab_size - len(texts))  # ids that pad a vocabulary
    start = np.where(tokens[:, 0] < 0, 0, T // 2)  # inside a context: somewhere
    some = np.linspace(0, len(tokens) - 1, CONTEXTS[0]).astype(int)
    contexts = torch.from_numpy(tokens[some, 1 : 2 + CONTEXTS[1]].astype(np.int64))
    for site in r.each_site():
        js, own, found = r.neurons(site), r.record.site(site.name), []
        for some in blocks(js):
            place = explain.position_fit(own["uniform_fit_acts"][..., js[some]], start)
            found += explain.labels(r.tables(site, js[some]), texts, place)
        effects, far = (
            explain.effects(
                r.model,
                site.layer,
                js,
                times * own["max"][js],
                contexts,
                r.tokenizer.vocab_size,
                site.encode,
                r.directions.get(site.name),
            )
            for times in (1, FAR)
        )
        tried = r.rng(site, "trie").choice(len(js), min(r.trie, len(js)), replace=False)
        with atomic_write(r.file("explain", site, "jsonl")) as file:
            for i, (j, label, effect, more) in enumerate(zip(js.tolist(), found, effects, far)):
                line = {
                    "site": site.name,
                    "neuron": j,
                    "record": r.record.header["stamp"],
                    "label": label,
                }
                if own["max"][j] > 0:
                    label["raised"] = [id for id, _ in effect["raised"][:RAISED]]
                    line["effect"] = effect | {"far": more}
                if i in tried:
                    line["trie"] = trie(r, site, j).patterns
                file.write(json.dumps(line).encode() + b"\n")


def trie(r, site, j, windows=10):
    """The trie of a neuron's top windows of the fit part."""
    own = r.record.site(site.name)
    rows, acts, at = (own[f"top_fit_{name}"][j, :windows] for name in ("tokens", "acts", "at"))
    texts = [
        ([t for t in row[: k + 2].tolist() if t >= 0], float(a[k]))
        for row, a, k in zip(rows, acts, at.tolist())
    ]
    activate = explain.at_last(r.model, site.layer, j, site.encode)
    return explain.fit_trie(activate, [text for text in texts if text[1] > 0], r.tokenizer.eot)


def simulate(r):
    """What each simulator expects: uniform_<name> (W, 64, n) for n neurons, <protocol>_<name> (n, m, w)."""
    for site in r.each_site():
        init = r.init if r.has_init else None
        js, lines, chosen = r.neurons(site), r.explained(site), r.read("select", site)
        windows, parts = r.record.shared["uniform_score"], []
        for some in blocks(js):
            b, n = r.tables(site, js[some]), len(js[some])
            label = [explain.label_table(line["label"])(windows) for line in lines[some]]
            part = {
                "uniform_token": explain.Table(b.values)(windows),
                "uniform_ngram": b(windows),
                "uniform_label": np.stack(label, -1),
            }
            if init and site.name in init.sites:
                part["uniform_init"] = r.tables(site, js[some], init)(init.shared["uniform_score"])
            for protocol in PROTOCOLS:
                tokens = getattr(chosen, f"{protocol}_score_tokens")[some]
                part[f"{protocol}_ngram"] = b(tokens, np.arange(n)[:, None, None])
            part["openai_tar_five"] = np.stack(
                [
                    explain.five_table(
                        *(
                            getattr(chosen, f"openai_tar_{name}")[i]
                            for name in ("fit_tokens", "fit_acts")
                        )
                    )(chosen.openai_tar_score_tokens[i])
                    for i in range(len(js))[some]
                ]
            )
            parts.append(
                {
                    name: x.astype(np.float16 if name[0] == "u" else np.float32)
                    for name, x in part.items()
                }
            )
        r.write(
            "simulate",
            site,
            {
                name: np.concatenate([part[name] for part in parts], -1 if name[0] == "u" else 0)
                for name in parts[0]
            },
        )
