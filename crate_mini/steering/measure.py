"""`steer.py measure`: dose-response with controls, written to steering.json and steering.png."""

from dataclasses import asdict, dataclass

from crate_mini import UserError
from crate_mini.cli import setting
from crate_mini.console import results, terminal
from crate_mini.console.terminal import Command
from crate_mini.lab import Lab
from crate_mini.neurons import steering_section
from crate_mini.sae import autoencoder
from crate_mini.steering import dose_response, tables
from crate_mini.steering.choose import MOST
from crate_mini.steering.figure import figure
from crate_mini.training import checkpoint

LARGEST_DOSE = 1e6


@dataclass
class Settings:
    """Measure the dose-response of steering neurons: effect, side effects, and controls."""

    neurons: int = setting(8, "neurons to draw in each layer among those that fire", 1, MOST)
    doses: str = setting("0.5,1,2,4,8", "multiples of each neuron's observed maximum")
    tokens: int = setting(
        512, "held-out tokens to choose continuations on, and as many others to measure on", 1, MOST
    )
    top: int = setting(10, "continuations to measure for each neuron", 1, MOST)
    sae: str | None = setting(
        None, "also measure features of these autoencoders (files, separated by commas)"
    )
    beside: str | None = setting(
        None, "also draw these steering.json of other models (separated by commas)"
    )
    seed: int = setting(1337, "seed of neurons, windows, random directions and bootstrap")
    data: str | None = checkpoint.data_setting("measure on")
    tokenizer: str | None = checkpoint.tokenizer_setting()
    device: str = checkpoint.device_setting()
    out: str | None = checkpoint.results_folder_setting()


def run(settings, ckpt):
    """Write steering.json and steering.png; print the tables."""
    lab = Lab(ckpt, settings.data, settings.device, log=print, tokenizer=settings.tokenizer)
    doses = parse_doses(settings.doses)
    beside = terminal.file_list(settings.beside, "--beside")
    others = [read_other(path) for path in beside]
    folder = results.ready_folder(results.folder(ckpt, settings.out))
    sites = [(layer, None) for layer in range(len(lab.model.blocks))]
    for path in terminal.file_list(settings.sae, "--sae"):
        sae, _ = autoencoder.load(path, lab.model)
        sites.append((sae.layer, sae))
    measured = dose_response.measure(
        lab.model,
        lab.held_out(),
        doses,
        sites,
        n=settings.neurons,
        tokens=settings.tokens,
        top=settings.top,
        seed=settings.seed,
        eot=lab.tokenizer.eot,
    )
    result = checkpoint.result_header(
        "steer.py",
        ckpt,
        lab.meta,
        lab.model,
        seed=settings.seed,
        settings=asdict(settings),
        corpus=lab.held_out().meta,
        summary=dose_response.summary(measured["rows"], settings.seed),
        **measured,
    )
    path = results.write_json(folder / "steering.json", result)
    picture = figure([result, *others], path.with_suffix(".png"))
    print(f"\n{tables.table(result)}\n\nfiles     {path}, {picture}")
    if (folder / "scores.jsonl").exists():
        command = terminal.typable("python", "interpret.py", "report", str(ckpt))
        print(f"page      `{command}` shows it above the neurons")


def read_other(path):
    """The content of a steering.json of another model. Raises UserError for any other file."""
    result = steering_section.read(path)
    try:
        tables.name(result)
    except (UserError, KeyError, TypeError):
        raise UserError(
            f"{path} is of no model that this version knows; measure it again with `python "
            "steer.py measure CKPT`."
        ) from None
    return result


def parse_doses(text):
    """The doses in a list like 0.5,1,2, ascending. Raises UserError if it cannot be parsed."""
    doses = terminal.number_list(text, "--doses", float, "0.5,1,2,4,8")
    if not all(0 < dose <= LARGEST_DOSE for dose in doses):
        raise UserError(
            f"--doses {text!r} must lie above 0 and be at most a million; try 0.5,1,2,4,8."
        )
    return sorted(doses)


COMMAND = Command(Settings, run)
