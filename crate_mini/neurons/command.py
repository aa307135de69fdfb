"""`interpret.py neurons`: score the neurons of a checkpoint, or features of autoencoders."""

from contextlib import suppress
from dataclasses import dataclass

from crate_mini import UserError, cli
from crate_mini.cli import setting
from crate_mini.console import results, terminal
from crate_mini.neurons import beyond_report, history, pipeline, summary
from crate_mini.neurons.record import Site, sites
from crate_mini.neurons.workspace import Workspace
from crate_mini.sae import autoencoder
from crate_mini.training import checkpoint

SCRIPT = "interpret.py"
CONTROLS = ("init", "shuffle")
# What the stages hand on to one another; `probe` was a folder of older versions.
INTERMEDIATE = (
    "record-*.npz",
    "select-*.npz",
    "explain-*.jsonl",
    "simulate-*.npz",
    "init/record*",
    "probe/record*",
)


@dataclass
class Settings:
    """What fires each neuron, according to simulators that need no other model.

    Every score comes with its controls and with counts of the neurons behind it. The stages are
    record, select, explain, simulate, score, beyond and report; the files that a stage has written
    stay until it runs again. Several checkpoints of one run (train.py --keep-every) give the
    history of scores instead, and of the neurons that --follow names.
    """

    layers: str = setting("all", "layers whose codes to score: all, or numbers like 0,2")
    sae: str | None = setting(
        None, "score the features of these autoencoders instead (sae-*.pt, separated by commas)"
    )
    from_: str = setting("record", f"stage to start with: {cli.one_of(pipeline.STAGES)}")
    until: str = setting("report", "stage to end with; the same as --from runs one stage alone")
    n: int = setting(0, "neurons to score in each layer, drawn by the seed; 0: all")
    seed: int = setting(
        0, "seed of documents, windows, excerpts, neurons, partners and the untrained model"
    )
    tokens: int = setting(
        1_000_000, "held-out tokens to record, or all if there are fewer", low=1, high=2**40
    )
    controls: str = setting(
        "init,shuffle",
        "init: an untrained model; shuffle: the table of another neuron; init,shuffle; or none",
    )
    match_density: float = setting(
        0.0,
        "read the weakest activations as 0 so that no neuron fires on more than this share of "
        "tokens, e.g. 0.01: an analysis of activations that the model does not use, so its loss if "
        "it did is shown; a second pass; results go to a subfolder, density-0.01; 0: keep all",
        below=1,
    )
    splits: int = setting(
        3,
        "how often to deal the documents again to the part that tables are made from and the one "
        "that is scored, for the intervals of means; each costs a pass over the text; 0: never",
        high=100,
    )
    trie: int = setting(
        0, "neurons in each layer that also get a context trie (about a second each)"
    )
    dedup: bool = setting(
        True, "take each top window from a different document (the paper does not)"
    )
    follow: str | None = setting(
        None, "with several checkpoints: neurons whose history to draw, like 0:12,1:40"
    )
    clean: bool = setting(
        False,
        "at the end delete the files that only --from and `interpret.py llm` need; scores, pages "
        "and figures stay",
    )
    data: str | None = checkpoint.data_setting("score on")
    tokenizer: str | None = checkpoint.tokenizer_setting()
    val_fraction: float | None = checkpoint.val_fraction_setting()
    device: str = checkpoint.device_setting()
    out: str | None = checkpoint.results_folder_setting()


def run(settings, ckpt):
    """Write scores.jsonl, summary.json, index.html and the files they were made from.

    Raises UserError for settings that do not fit the checkpoint, and whatever a stage raises.
    """
    if settings.follow:
        raise UserError("--follow needs several checkpoints of one run, like out/run/step-*.")
    if settings.clean and settings.until != "report":
        raise UserError(
            f"--clean deletes what --until {settings.until} would leave for the stages after it; "
            "give one of the two."
        )
    controls = parse_controls(settings.controls)
    model, meta, tokenizer = checkpoint.open_model(ckpt, settings.device, settings.tokenizer)
    corpus = checkpoint.held_out(ckpt, meta, tokenizer, settings.data, settings.val_fraction)
    scored_sites, directions = choose_sites(settings, model)
    folder = results.folder(ckpt, settings.out)
    if settings.sae:
        folder = folder / "sae"
    if settings.match_density:
        folder = folder / f"density-{settings.match_density}"
    work = Workspace(
        model,
        meta,
        tokenizer,
        corpus,
        folder,
        scored_sites,
        path=str(ckpt),
        command=results.command(SCRIPT),
        seed=settings.seed,
        tokens=settings.tokens,
        n=settings.n,
        controls=controls,
        density=settings.match_density,
        splits=settings.splits,
        trie=settings.trie,
        dedup=settings.dedup,
        directions=directions,
    )
    pipeline.run(work, settings.from_, settings.until)
    stages = list(pipeline.STAGES)
    if stages.index(settings.from_) <= stages.index("beyond") <= stages.index(settings.until):
        print(beyond_report.table(results.read_json(folder / "beyond.json")) + "\n")
    if {"score", "report"} & {settings.from_, settings.until}:
        print_summary(folder, work.record.header["tokens"])
    tell_or_clean(folder, settings.clean)


def tell_or_clean(folder, clean):
    """Print how much room the intermediate files of a folder take; delete them if `clean`."""
    files = [path for pattern in INTERMEDIATE for path in sorted(folder.glob(pattern))]
    size = sum(path.stat().st_size for path in files)
    text = f"{len(files)} intermediate files, {size / 1e6:,.0f} MB"
    if clean:
        for path in files:
            path.unlink()
        for name in ("init", "probe"):
            with suppress(OSError):  # it does not exist, or holds something else
                (folder / name).rmdir()
        print(f"cleaned   {text}, deleted; --from record makes them again")
    elif files:
        print(f"kept      {text}, for --from and `interpret.py llm`; --clean deletes them")


def parse_controls(text):
    """The names in --controls; none at all for "none". Raises UserError for an unknown one."""
    names = tuple(word.strip() for word in text.split(",") if word.strip() != "none")
    if set(names) - set(CONTROLS):
        raise UserError(
            f"--controls {text!r} is unknown; choose init, shuffle, init,shuffle or none."
        )
    return names


def choose_sites(settings, model):
    """(sites, directions): codes of --layers, or the features of the autoencoders in --sae.

    directions: {site: (width, h)}, what one unit of each feature adds to the codes. Raises
    UserError for a layer that does not exist, and for two autoencoders with the same name.
    """
    if not settings.sae:
        return sites(model, settings.layers), {}
    feature_sites, directions = [], {}
    for path in terminal.file_list(settings.sae, "--sae"):
        sae, facts = autoencoder.load(path, model)
        name = f"L{sae.layer}.sae-{sae.name}"
        if name in directions:
            raise UserError(
                f"--sae {settings.sae}: two autoencoders are called {name}, so their results would "
                "mix; score them one after the other, each with its own --out."
            )
        feature_sites.append(Site(name, sae.layer, len(sae.W), sae.encode, path, facts["sha256"]))
        directions[name] = sae.W
    return feature_sites, directions


def print_summary(folder, tokens):
    """Print the table of summary.json; tokens: how many each part of the record has."""
    table = summary.table(results.read_json(folder / "summary.json"))
    print(
        f"record    tables from {tokens['fit']:,} tokens, scores on windows of {tokens['score']:,} "
        "others.\n"
        "          More tokens make better tables: compare scores only at equal numbers of "
        "tokens.\n\n"
        f"{table}\n\n"
        f"files     {folder / 'index.html'}, scores.jsonl, summary.json"
    )


COMMAND = terminal.Command(Settings, run, several=history.run)
