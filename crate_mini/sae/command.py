"""`interpret.py sae`: sparse autoencoders of one layer, trained, measured, drawn."""

from dataclasses import asdict, dataclass

from crate_mini import UserError
from crate_mini.cli import setting
from crate_mini.console import results, terminal
from crate_mini.sae import autoencoder, figure, train
from crate_mini.sae.autoencoder import SAE
from crate_mini.sae.evaluate import FEWEST, FORMULAS, evaluate, predicted_tokens
from crate_mini.training import checkpoint, device

SCRIPT = "interpret.py"
DEFAULT_L1 = (5e-5, 1e-4, 2e-4)


@dataclass
class Settings:
    """Train sparse autoencoders on the codes of one layer and measure them on held-out text.

    Without --l1 and --k: three ReLU autoencoders with different L1 weights. `interpret.py neurons
    --sae FILE` scores their features.
    """

    layer: int | None = setting(None, "layer to encode, from 0", shown="the last")
    l1: str | None = setting(
        None, "ReLU autoencoders with these L1 weights, like 5e-5,1e-4,2e-4; CRATE-LM uses 8e-5"
    )
    k: str | None = setting(
        None, "TopK autoencoders with these numbers of features per token, like 8,16,32"
    )
    expansion: int = setting(4, "features per code; the paper uses 16", low=1)
    steps: int = setting(1200, "training steps", low=1)
    batch: int = setting(256, "tokens in a training step", low=1, high=train.BUFFER_TOKENS - 1)
    lr: float = setting(2e-3, "peak learning rate", above=0)
    tokens: int = setting(65536, "held-out tokens to measure on", low=FEWEST)
    seed: int = setting(1337, "seed of weights, windows, shuffling and resampling")
    data: str | None = checkpoint.data_setting("train and measure on")
    tokenizer: str | None = checkpoint.tokenizer_setting()
    val_fraction: float | None = checkpoint.val_fraction_setting()
    device: str = checkpoint.device_setting()
    out: str | None = checkpoint.results_folder_setting()


def run(settings, ckpt):
    """Write sae-L{layer}-{name}.pt and .json for each SAE, and sae-L{layer}.json and .png for all.

    The files for all SAEs include those of earlier runs in the folder, if the numbers can be
    compared. Raises UserError for settings that do not fit the checkpoint.
    """
    l1_weights = terminal.number_list(settings.l1, "--l1", float, "5e-5,1e-4,2e-4")
    ks = terminal.number_list(settings.k, "--k", int, "8,16,32")
    model, meta, tokenizer = checkpoint.open_model(ckpt, settings.device, settings.tokenizer)
    corpus = checkpoint.held_out(ckpt, meta, tokenizer, settings.data, settings.val_fraction)
    tokens = predicted_tokens(corpus, settings.tokens)  # fails now rather than after the work
    device.keep_memory()
    layer = len(model.blocks) - 1 if settings.layer is None else settings.layer
    saes = new_autoencoders(settings, l1_weights, ks, model, layer)
    folder = results.ready_folder(results.folder(ckpt, settings.out))
    batches = train.code_batches(model, corpus, layer, settings.batch, settings.seed)
    resampled = train.fit(saes, batches, settings.steps, settings.lr, settings.seed)
    measured = evaluate(model, corpus, layer, saes, settings.tokens)
    facts = checkpoint.result_header(
        SCRIPT,
        ckpt,
        meta,
        model,
        seed=settings.seed,
        corpus=corpus.meta,
        tokens=tokens,
        settings=asdict(settings),
    )
    for sae, held_out, count in zip(saes, measured, resampled):
        sae_facts = {
            **facts,
            "trained_tokens": settings.steps * settings.batch,
            "resampled": count,
            "held_out": held_out,
        }
        saved = autoencoder.save(folder, sae, model, sae_facts)
    write_overview(folder, facts, autoencoder.comparable(folder, saved))


def new_autoencoders(settings, l1_weights, ks, model, layer):
    """Untrained SAEs on the model's device: a ReLU one for each L1 weight, a TopK one for each k.

    Raises UserError for an L1 weight below 0, or a k outside 1 to the number of features.
    """
    h = model.config.n_code
    width = settings.expansion * h
    if min(l1_weights, default=0) < 0:
        raise UserError(f"--l1 {settings.l1} must not be below 0; try --l1 5e-5,1e-4,2e-4.")
    if ks and not 0 < min(ks) <= max(ks) <= width:
        raise UserError(
            f"--k {settings.k} must lie in 1 to {width}, the number of features; try --k 8,16,32."
        )
    if not l1_weights and not ks:
        l1_weights = DEFAULT_L1
    saes = [SAE(h, width, layer, l1=l1, seed=settings.seed) for l1 in l1_weights]
    saes += [SAE(h, width, layer, k=k, seed=settings.seed) for k in ks]
    model_device = next(model.parameters()).device
    return [sae.to(model_device) for sae in saes]


def write_overview(folder, facts, saes):
    """Write sae-L{layer}.json and .png of these SAEs, and print their table.

    facts: of the last run; an SAE's entry in the JSON holds only the facts that differ from them.
    """
    entries = []
    for sae in saes:
        common = {name for name in facts if sae.get(name) == facts[name]}
        entries.append({name: value for name, value in sae.items() if name not in common})
    layer = saes[0]["layer"]
    overview = {**facts, "formulas": FORMULAS, "saes": entries}
    path = results.write_json(folder / f"sae-L{layer}.json", overview)
    picture = figure.draw(saes, path.with_suffix(".png"))
    files = f"{path}, {picture}, {folder / f'sae-L{layer}-*.pt'}"
    print(f"\n{figure.table(saes)}\n\nfiles     {files}")


COMMAND = terminal.Command(Settings, run)
