"""`steer.py demo`: random neurons, each steered alone, and the next tokens they raise."""

import json
from dataclasses import asdict, dataclass

import numpy as np

from crate_mini.cli import setting
from crate_mini.console.terminal import Command
from crate_mini.intervene import Intervention
from crate_mini.lab import Lab
from crate_mini.plots.markdown import markdown
from crate_mini.steering.choose import MOST
from crate_mini.steering.next_token import next_token
from crate_mini.steering.prompt import log_of, moved_tokens
from crate_mini.training import checkpoint

SHOWN = 3  # next tokens in a cell


@dataclass
class Settings:
    """Steer random neurons one at a time; print the three next tokens that each raises most."""

    n: int = setting(5, "number of neurons", 1, MOST)
    layer: int | None = setting(None, "layer of the neurons", low=-MOST, shown="any")
    value: str = setting("4x", "as for steer.py: 4x is four times the neuron's observed maximum")
    prompts: str = setting("1 2 3 4 5|The name of the|If the|import", "prompts, separated by |")
    seed: int = setting(1337, "seed that draws the neurons")
    json: bool = setting(False, "print one JSON object instead of a table")
    data: str | None = checkpoint.data_setting("observe maxima on")
    tokenizer: str | None = checkpoint.tokenizer_setting()
    device: str = checkpoint.device_setting()


def run(settings, ckpt):
    """Print a Markdown table: a row for each neuron, a column for each prompt."""
    lab = Lab(
        ckpt, settings.data, settings.device, log=log_of(settings), tokenizer=settings.tokenizer
    )
    prompts = settings.prompts.split("|")
    if settings.json:
        return print_json(lab, settings, prompts, ckpt)
    head = ["layer:neuron", *(f"“{prompt}”" for prompt in prompts)]
    rows = [["none", *(likely(lab, prompt) for prompt in prompts)]]
    for layer, neuron in draw(lab, settings):
        intervention = lab.intervention(layer, neuron, settings.value)
        cells = [raised(lab, prompt, intervention) for prompt in prompts]
        rows.append([f"{layer}:{neuron}", *cells])
    print(markdown(head, rows))


def print_json(lab, settings, prompts, ckpt):
    """Print one JSON object: for each neuron and prompt, the next tokens raised most."""
    rows = []
    for layer, neuron in draw(lab, settings):
        intervention = lab.intervention(layer, neuron, settings.value)
        for prompt in prompts:
            change = next_token(lab.model, lab.ids(prompt), [intervention])
            row = {"layer": layer, "neuron": neuron, "value": intervention.value, "prompt": prompt}
            rows.append({**row, "kl": change.kl, "raised": moved_tokens(lab, change, SHOWN, 1)})
    facts = {"seed": settings.seed, "settings": asdict(settings), "rows": rows}
    header = checkpoint.result_header("steer.py", ckpt, lab.meta, lab.model, **facts)
    print(json.dumps(header, allow_nan=False))


def draw(lab, settings):
    """[(layer, neuron)] drawn by the seed among the neurons that fire on held-out text."""
    layers = range(len(lab.model.blocks)) if settings.layer is None else [settings.layer]
    live = []
    for layer in layers:
        Intervention(layer, 0).check(lab.model.config)
        firing = lab.known.observed(layer).cpu().numpy().nonzero()[0]
        live += [(layer, neuron) for neuron in firing.tolist()]
    rng = np.random.default_rng(settings.seed)
    drawn = rng.choice(len(live), min(settings.n, len(live)), replace=False)
    return [live[i] for i in sorted(drawn.tolist())]


def likely(lab, prompt):
    """The most likely next tokens of the unsteered model, in one line."""
    tokens = lab.next_tokens(prompt, SHOWN)
    return ", ".join(f"“{token}” {probability:.1%}" for token, probability in tokens)


def raised(lab, prompt, intervention):
    """The next tokens raised most, each with its probability before and after, in one line."""
    change = next_token(lab.model, lab.ids(prompt), [intervention])
    words = []
    for id in change.most(SHOWN, 1):
        before, after = change.before[id].exp(), change.after[id].exp()
        words.append(f"“{lab.token(id)}” {before:.1%} > {after:.1%}")
    return ", ".join(words)


COMMAND = Command(Settings, run)
