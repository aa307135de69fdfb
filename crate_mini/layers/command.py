"""`interpret.py layers`: rates, sparsity, lasso objective and dictionary, layer by layer."""

from dataclasses import asdict, dataclass

from crate_mini.cli import setting
from crate_mini.console import results, terminal
from crate_mini.layers import figure, history, verdict
from crate_mini.layers.measure import LASSO_TOKENS, bounds, measure_layers
from crate_mini.layers.windows import DEFAULT_TOKENS, Windows
from crate_mini.reference import EPS2
from crate_mini.training import checkpoint

SCRIPT = "interpret.py"
DEFAULT_SEED = 1337  # train.py's, for checkpoints that do not name theirs


@dataclass
class Settings:
    """Measure, layer by layer, whether a model compresses and sparsifies as CRATE's theory says.

    The untrained model is measured for comparison. Ends with a verdict in words. Several
    checkpoints of one run (train.py --keep-every) give the history of each layer instead.
    """

    data: str | None = checkpoint.data_setting("measure on")
    tokenizer: str | None = checkpoint.tokenizer_setting()
    val_fraction: float | None = checkpoint.val_fraction_setting()
    tokens: int = setting(
        DEFAULT_TOKENS,
        "held-out tokens to measure on, in whole windows of the model's context",
        low=1,
    )
    lasso_tokens: int = setting(
        LASSO_TOKENS,
        "of these, tokens whose codes are compared with the best possible ones (ISTA only)",
        low=1,
    )
    batch: int = setting(8, "windows in one forward pass", low=1)
    seed: int | None = setting(None, "seed of the untrained model", shown="the checkpoint's")
    device: str = checkpoint.device_setting()
    out: str | None = checkpoint.results_folder_setting()


def run(settings, ckpt):
    """Write layers.json, layers.png and l0.png for the trained and the untrained model.

    Raises UserError for settings or text that do not fit the checkpoint.
    """
    model, meta, tokenizer = checkpoint.open_model(ckpt, settings.device, settings.tokenizer)
    corpus = checkpoint.held_out(ckpt, meta, tokenizer, settings.data, settings.val_fraction)
    config = model.config
    seed = settings.seed
    if seed is None:
        seed = meta["training"].get("settings", {}).get("seed", DEFAULT_SEED)
    windows = Windows(settings, corpus, config.block_size)
    folder = results.ready_folder(results.folder(ckpt, settings.out))
    result = checkpoint.result_header(
        SCRIPT,
        ckpt,
        meta,
        model,
        seed=seed,
        settings=asdict(settings),
        corpus=corpus.meta,
        window=config.block_size,
        tokens=windows.tokens,
        eps2=EPS2,
        rate_bounds={
            "U": bounds(config.block_size, config.n_head, config.n_embd // config.n_head),
            "whole": bounds(config.block_size, 1, config.n_embd),
        },
    )
    untrained = checkpoint.untrained(config, seed).to(model.tokens.weight.device)
    for name, network in (("trained", model), ("untrained", untrained)):
        result[name] = measure_layers(network, windows, name, settings.lasso_tokens, tokenizer.eot)
    result["verdict"] = verdict.judge(result)
    path = results.write_json(folder / "layers.json", result)
    picture = figure.draw(result, folder / "layers.png")
    curves = {}
    for name in ("trained", "untrained"):
        curves[name] = [layer["l0"] for layer in result[name]]
    sparsity = figure.l0_by_layer(curves, folder / "l0.png")
    print(f"\n{figure.table(result)}\n\nfiles     {path}, {picture}, {sparsity}")
    print(f"\n{verdict.text(result['verdict'])}")


COMMAND = terminal.Command(Settings, run, several=history.run)
