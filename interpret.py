"""Look inside a checkpoint: `python interpret.py COMMAND CKPT`.

    layers     coding rate, sparsity, lasso objective by layer: does the network do what the theory says?
    neurons    what fires each neuron, and how well does that predict it? scores, controls, pages
    sae        sparse autoencoders on one layer's codes, the baseline: how sparse, at what loss?
    selftest   planted neurons: which simulators, which metrics can be believed? (needs no CKPT)
    llm        a language model puts neurons into words and says from them when they fire: scored likewise
    concepts   discrete concepts across layers of a classifier (CLVQ-VAE): does it need them? beside controls
    report     pages to look at from what `neurons` wrote: index.html, human.html; counts people's answers

Results go to the folder `interpret` beside the checkpoint.
"""

import sys
from dataclasses import asdict, dataclass, fields
from inspect import cleandoc
from pathlib import Path

from crate_mini import UserError, atomic_write, cli
from crate_mini import results as evidence
from crate_mini.concepts import command as across
from crate_mini.data import batches as data
from crate_mini.judges import score_neurons as words
from crate_mini.layers import figure as layer_views
from crate_mini.layers import measure
from crate_mini.neurons import neuronpedia, summary
from crate_mini.neurons import score as results
from crate_mini.neurons import survey as human
from crate_mini.neurons.pipeline import Run, run
from crate_mini.neurons.record import Site, sites
from crate_mini.neurons.selftest import solve, told
from crate_mini.plots import figure as figures
from crate_mini.sae import train as sae_fit
from crate_mini.sae.autoencoder import SAE, beside, load, save
from crate_mini.training import checkpoint
from crate_mini.training import device as machine

SCRIPT = "interpret.py"
L1 = 5e-5, 1e-4, 2e-4  # of the autoencoders by default
COMMANDS = {}  # name: (settings, function); filled by @command


def command(settings):
    """Decorator: `function(s, ckpt)` runs for `interpret.py NAME CKPT`, with s an instance of `settings`."""

    def register(function):
        COMMANDS[function.__name__] = settings, function
        return function

    return register


def opened(s, ckpt):
    """(model, meta, tokenizer, corpus) of a checkpoint, on s.device; the held-out text it was trained beside.

    s.data, s.tokenizer, s.val_fraction win over what the checkpoint says of itself.
    """
    model, meta, tokenizer = evidence.loaded(ckpt, s.device, s.tokenizer)
    return model, meta, tokenizer, evidence.held_out(ckpt, meta, tokenizer, s.data, s.val_fraction)


@dataclass
class Layers:
    """Layer by layer: does the trained network compress and sparsify, as the theory of CRATE says it does?"""

    data: str | None = None  # text to measure on (default the corpus of the checkpoint)
    tokenizer: str | None = None  # of that text (default the checkpoint's)
    val_fraction: float | None = (
        None  # share of its documents that is held out, and measured on (default as
    )
    # in training)
    tokens: int = 65536  # held-out tokens to measure on, in whole windows of the model's context
    batch: int = 8  # windows at a time
    seed: int | None = (
        None  # of the untrained model beside it (default the checkpoint's, so its start)
    )
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    out: str | None = None  # folder of the results (default `interpret` beside the checkpoint)


@command(Layers)
def layers(s, ckpt):
    """layers.json, layers.png: rate, density, objective, dictionary by layer, trained and untrained."""
    model, meta, _, corpus = opened(s, ckpt)
    seed = meta["training"].get("settings", {}).get("seed", 1337) if s.seed is None else s.seed
    c, device, there = model.config, next(model.parameters()).device, corpus.n_tokens["val"]
    for flag, value, least in (
        ("tokens", s.tokens, c.block_size),
        ("batch", s.batch, 1),
        ("seed", seed, 0),
    ):
        if not least <= value < 2**31:
            raise UserError(f"--{flag} {value} must lie in {least} to 2147483647, or leave it out.")
    if there <= c.block_size:
        raise UserError(
            f"the held-out text has {there} tokens and one window needs {c.block_size + 1}; give "
            "more text with --data, or hold out all of it with --val-fraction 1."
        )
    place, limit = evidence.folder(ckpt, s.out), s.tokens // c.block_size * c.block_size
    place.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    windows = [
        x
        for x, _ in corpus.blocks("val", s.batch, c.block_size, limit)
        if x.shape[1] == c.block_size
    ]
    bounds = {
        "U": measure.bounds(c.block_size, c.n_head, c.n_embd // c.n_head),
        "whole": measure.bounds(c.block_size, 1, c.n_embd),
    }
    result = evidence.header(
        SCRIPT,
        ckpt,
        meta,
        model,
        seed=seed,
        corpus=corpus.meta,
        window=c.block_size,
        tokens=sum(x.numel() for x in windows),
        eps2=measure.EPS2,
        rate_bounds=bounds,
    )
    for name, lm in (("trained", model), ("untrained", measure.untrained(c, seed).to(device))):
        result[name] = measure.layers(lm, windows, name)
    path = evidence.write_json(place / "layers.json", result)
    picture = layer_views.figure(result, path.with_suffix(".png"))
    curves = {name: [n["l0"] for n in result[name]] for name in ("trained", "untrained")}
    sparsity = figures.l0_by_layer(curves, path.with_name("l0.png"))
    print(f"\n{layer_views.table(result)}\n\nfiles     {path}, {picture}, {sparsity}")


@dataclass
class Autoencoders:
    """Sparse autoencoders of several sparsities on one layer's codes, judged on held-out text.

    With neither --l1 nor --k: ReLU with three L1 weights. Features are scored with `neurons --sae FILE`.
    """

    layer: int | None = None  # whose codes, from 0 (default the last)
    l1: str | None = (
        None  # ReLU autoencoders of these L1 weights, like 5e-5,1e-4,2e-4 (CRATE-LM: 8e-5)
    )
    k: str | None = None  # TopK autoencoders with so many features per token, like 8,16,32
    expansion: int = 4  # features per code; the paper has 16
    steps: int = 1200  # of Adam
    batch: int = 256  # tokens a step
    lr: float = 2e-3  # peak learning rate
    tokens: int = 65536  # held-out tokens to judge on
    seed: int = 1337  # of weights, windows, order, resampling
    data: str | None = None  # text to train and judge on (default the corpus of the checkpoint)
    tokenizer: str | None = None  # of that text (default the checkpoint's)
    val_fraction: float | None = (
        None  # share of its documents that is held out (default as in training)
    )
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    out: str | None = None  # folder of the results (default `interpret` beside the checkpoint)


@command(Autoencoders)
def sae(s, ckpt):
    """sae-L{layer}-{name}.pt and .json of each, and sae-L{layer}.json and .png of all in the folder."""
    for name in ("expansion", "steps", "batch", "tokens", "lr"):
        if not 0 < getattr(s, name) < (sae_fit.BUFFER[0] if name == "batch" else 2**31):
            raise UserError(
                f"--{name} {getattr(s, name)} must be above 0 and not absurd, for example "
                f"{getattr(Autoencoders, name)}."
            )
    l1, k = numbers(s.l1, "l1", float, "5e-5,1e-4,2e-4"), numbers(s.k, "k", int, "8,16,32")
    model, meta, _, corpus = opened(s, ckpt)
    machine.keep_memory()
    layer, h = len(model.blocks) - 1 if s.layer is None else s.layer, model.config.n_code
    if k and not 0 < min(k) <= max(k) <= s.expansion * h or min(l1, default=0) < 0:
        raise UserError(
            f"--k {s.k} must lie in 1 to {s.expansion * h}, the number of features, and --l1 "
            f"{s.l1} must not be below 0; try --k 8,16,32."
        )
    device = next(model.parameters()).device
    kinds = [{"l1": v} for v in l1 or ([] if k else L1)] + [{"k": v} for v in k]
    saes = [SAE(h, s.expansion * h, layer, seed=s.seed, **kind).to(device) for kind in kinds]
    batches = sae_fit.stream(model, corpus, layer, s.batch, s.seed)
    resampled = sae_fit.fit(saes, batches, s.steps, s.lr, s.seed)
    found, out = (
        sae_fit.evaluate(model, corpus, layer, saes, s.tokens),
        evidence.folder(ckpt, s.out),
    )
    facts = evidence.header(
        SCRIPT,
        ckpt,
        meta,
        model,
        seed=s.seed,
        corpus=corpus.meta,
        tokens=min(s.tokens, corpus.n_tokens["val"] - 1),
        settings=asdict(s),
    )
    for one, held_out, n in zip(saes, found, resampled):
        last = save(
            out,
            one,
            model,
            {**facts, "trained_tokens": s.steps * s.batch, "resampled": n, "held_out": held_out},
        )
    every = beside(out, last)
    own = [{key: f[key] for key in f if key not in facts or f[key] != facts[key]} for f in every]
    path = evidence.write_json(
        out / f"sae-L{layer}.json", {**facts, "formulas": sae_fit.FORMULAS, "saes": own}
    )
    picture = figures.sae(every, path.with_suffix(".png"))
    print(
        f"\n{figures.sae_table(every)}\n\nfiles     {path}, {picture}, {out / f'sae-L{layer}-*.pt'}"
    )


def numbers(text, flag, kind, example):
    """The different numbers of a list like 8,16,32, or []. Raises UserError for what is none."""
    try:
        found = [kind(word) for word in (text or "").split(",") if word or text]
        if all(abs(number) < 2**31 for number in found):
            return list(dict.fromkeys(found))
    except ValueError:
        pass
    raise UserError(
        f"--{flag} {text!r} is no list of numbers; expected something like --{flag} {example}."
    )


@dataclass
class Neurons:
    """What fires each neuron, by simulators that need no other model; controls and counts beside every score.

    Stages: record, select, explain, simulate, score, report. What one has written stays until it runs again.
    """

    layers: str = "all"  # whose codes: all, or numbers like 0,2
    sae: str | None = (
        None  # score features of these autoencoders (sae-*.pt, comma-separated) instead
    )
    from_: str = (
        "record"  # stage to start at: record | select | explain | simulate | score | report
    )
    until: str = "report"  # stage to end with; the same as --from runs one alone
    n: int = 0  # neurons a layer, drawn by the seed (0: all)
    seed: int = 0  # of documents, windows, excerpts, neurons, partners, the untrained model
    tokens: int = 1_000_000  # held-out tokens to record, all there are if fewer
    controls: str = (
        "init,shuffle"  # init: an untrained model; shuffle: another neuron's table; or none
    )
    match_density: float = (
        0.0  # cut activations so that neurons fire on no more than this share of tokens,
    )
    # like 0.01; in a folder of its own, density-0.01 (0: as they are)
    trie: int = 0  # neurons a layer that also get a context trie (about a second each)
    dedup: bool = True  # top windows from different documents (the paper's are not)
    data: str | None = None  # text to score on (default the corpus of the checkpoint)
    tokenizer: str | None = None  # of that text (default the checkpoint's)
    val_fraction: float | None = (
        None  # share of its documents that is held out (default as in training)
    )
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    out: str | None = None  # folder of the results (default `interpret` beside the checkpoint)


@command(Neurons)
def neurons(s, ckpt):
    """scores.jsonl, summary.json, index.html and what they were made from (crate_mini/neurons/pipeline.py)."""
    for name, least, most in (
        ("n", 0, 2**31),
        ("seed", 0, 2**31),
        ("trie", 0, 2**31),
        ("tokens", 1, 2**40),
        ("match_density", 0, 1),
    ):
        if not least <= getattr(s, name) < most:
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(s, name)} must lie in {least} to {most}; "
                "leave it out for the default."
            )
    controls = tuple(word.strip() for word in s.controls.split(",") if word.strip() != "none")
    if set(controls) - {"init", "shuffle"}:
        raise UserError(
            f"--controls {s.controls!r} is unknown; choose init, shuffle, init,shuffle or none."
        )
    model, meta, tokenizer, corpus = opened(s, ckpt)
    chosen, directions = sites(model, s.layers), {}
    if s.sae:
        found = [(path, *load(path, model)) for path in s.sae.split(",")]
        chosen = [
            Site(f"L{sae.layer}.sae-{sae.name}", sae.layer, len(sae.W), sae.encode, path)
            for path, sae, _ in found
        ]
        directions = {site.name: sae.W for site, (_, sae, _) in zip(chosen, found)}
        if len(directions) < len(chosen):
            raise UserError(
                f"--sae {s.sae}: two of these are of one layer and one name and would be mixed "
                "up; score them one after the other, each with an --out of its own."
            )
    parts = ["sae"] * bool(s.sae) + [f"density-{s.match_density:g}"] * bool(s.match_density)
    place = evidence.folder(ckpt, s.out).joinpath(*parts)
    r = Run(
        model,
        meta,
        tokenizer,
        corpus,
        place,
        chosen,
        str(ckpt),
        evidence.command(SCRIPT),
        s.seed,
        s.tokens,
        s.n,
        controls,
        s.match_density,
        s.trie,
        s.dedup,
        directions,
    )
    run(r, s.from_, s.until)
    if not {"score", "report"} & {s.from_, s.until}:
        return
    found, of = cli.read_json(place / "summary.json"), r.record.header["tokens"]
    print(
        f"record    tables from {of['fit']:,} tokens, scores on windows of {of['score']:,} others. More\n"
        f"          tokens make better tables: compare scores only where these are alike.\n\n"
        f"{summary.table(found)}\n\nfiles     {place / 'index.html'}, scores.jsonl, summary.json"
    )


@dataclass
class Selftest:
    """Planted neurons: does every simulator prefer the truth to lies, does every metric see what is worse?"""

    documents: int = 1500  # of 64 to 192 characters, drawn at random
    seed: int = 0  # of the documents and of what is drawn from them
    out: str = "out/selftest"  # folder of the results


@command(Selftest)
def selftest(s, ckpt=None):
    """selftest.json in the folder, and the table; needs no checkpoint."""
    for name, least, most in (("documents", 100, 10**6), ("seed", 0, 2**31)):
        if not least <= getattr(s, name) < most:
            raise UserError(
                f"--{name} {getattr(s, name)} must lie in {least} to {most}; leave it out."
            )
    Path(s.out).mkdir(parents=True, exist_ok=True)
    found = solve(Path(s.out), s.documents, s.seed)
    path = evidence.write_json(
        Path(s.out) / "selftest.json",
        {
            "schema": 1,
            "command": evidence.command(SCRIPT),
            "machine": machine.describe(machine.choose_device("cpu")),
            **found,
        },
    )
    print(f"\n{told(found)}\n\nfile      {path}")


@command(words.llm.Settings)
def llm(s, ckpt):
    """llm.json, llm.jsonl in the folder of `neurons`, whose excerpts and tables are used; and the table."""
    print(f"\n{words.run(s, ckpt, evidence.folder(ckpt, s.out))}")


@command(across.Settings)
def concepts(s, ckpt):
    """concepts.json, concepts.html, packet.html in the folder `concepts` beside the checkpoint."""
    across.run(s, ckpt)


@dataclass
class Report:
    """Pages and figures of the neurons that `neurons` scored: index.html and human.html open from disk."""

    seed: int = 0  # of draws: 20 at random, the questions, the neurons if there are too many
    most: int = 2048  # neurons in index.html; of more, so many are drawn at random
    humans: int = 30  # neurons that human.html asks about; 0: no such page
    neuronpedia: str | None = (
        None  # also write the neurons to this file (.jsonl), shaped as Neuronpedia's
    )
    answers: str | None = None  # only count the answers in this file, which human.html saved
    out: str | None = None  # folder of the results (default `interpret` beside the checkpoint)


@command(Report)
def report(s, ckpt):
    """index.html, human.html, scores.png, density.png from what `neurons` wrote; no model runs."""
    if s.answers:
        print(human.table(human.score(s.answers)))
        return
    for flag, least in (("seed", 0), ("most", 1), ("humans", 0)):
        if not least <= getattr(s, flag) < 2**31:
            raise UserError(
                f"--{flag} {getattr(s, flag)} must lie in {least} to 2147483647, or be left out."
            )
    token = data.load_tokenizer(checkpoint.load(ckpt)[1]["tokenizer"]["spec"]).token_bytes
    place = evidence.folder(ckpt, s.out)
    files = results.draw(place, token, s.seed, s.most, s.humans)
    if s.humans and "human.html" not in {path.name for path in files}:
        print("note      no human.html: too few neurons have four held-out excerpts and a label")
    if s.neuronpedia:
        files.append(Path(s.neuronpedia))
        with atomic_write(files[-1]) as file:
            file.write(neuronpedia.export(place, token, Path(ckpt).resolve().parent.name))
    for path in files:
        print(f"file      {path}, {path.stat().st_size / 1e6:.1f} MB")


def main():
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(
            f"{__doc__.strip()}\n\n`python interpret.py COMMAND --help` lists the settings of one."
        )
        return 0
    if name not in COMMANDS:
        raise UserError(
            f"unknown command {name!r}{cli.nearest(name, COMMANDS)}; choose one of "
            f"{', '.join(COMMANDS)}, as in `python interpret.py layers out/crate-3L/best`."
        )
    settings, function = COMMANDS[name]
    parser = cli.Parser(prog=f"interpret.py {name}", description=cleandoc(settings.__doc__))
    parser.add_argument(
        "ckpt",
        metavar="CKPT",
        help="a checkpoint folder, like out/crate-3L/best",
        **({"nargs": "?"} if function.__defaults__ else {}),
    )
    cli.add_fields(parser, settings, "settings")
    given = vars(parser.parse_args(sys.argv[2:]))
    ckpt = given.pop("ckpt")
    return function(
        settings(**{f.name: given[f.name] for f in fields(settings) if f.name in given}), ckpt
    )


if __name__ == "__main__":
    cli.run(main)
