"""`steer.py sweep`: chosen neurons, each alone, set to a range of doses on one prompt."""

import json
from dataclasses import asdict, dataclass

from crate_mini.cli import setting
from crate_mini.console.terminal import Command
from crate_mini.intervene import OPS
from crate_mini.lab import Lab
from crate_mini.plots.markdown import markdown
from crate_mini.steering import choose, prompt
from crate_mini.steering.choose import MOST
from crate_mini.steering.measure import parse_doses
from crate_mini.steering.next_token import next_token
from crate_mini.training import checkpoint

SHOWN = 3  # tokens whose probability is followed from dose to dose


@dataclass
class Settings:
    """Set chosen neurons, each alone, to a range of doses; read the next token at each dose."""

    layer: int | None = setting(None, "layer of the neurons, from 0", low=-MOST)
    neuron: str = setting("", 'a neuron: 40; several: 12,40, or 2:40,1:12; or label:"comma"')
    head: int | None = setting(
        None, "sweep coordinates of the projection u of this attention head", low=-MOST
    )
    doses: str = setting("0.5,1,2,4,8", "multiples of the neuron's maximum; --op scale: factors")
    op: str = setting("set", "what to do with each dose", choices=OPS[:3])
    prompt: str = setting("1 2 3 4 5", "text to continue")
    tokens: int = setting(12, "tokens to continue it by, the most likely at each step", 1, MOST)
    json: bool = setting(False, "print one JSON object instead of tables")
    data: str | None = checkpoint.data_setting("observe maxima on")
    tokenizer: str | None = checkpoint.tokenizer_setting()
    device: str = checkpoint.device_setting()


def run(settings, ckpt):
    """Print a table for each neuron, a row for each dose; or all of it as JSON."""
    lab = Lab(
        ckpt,
        settings.data,
        settings.device,
        log=prompt.log_of(settings),
        tokenizer=settings.tokenizer,
    )
    lab.ids(settings.prompt)
    doses = parse_doses(settings.doses)
    neurons = choose.neurons(lab, settings.neuron, settings.layer, settings.head)
    sweeps = [sweep(lab, settings, doses, *place) for place in neurons]
    if settings.json:
        facts = {"settings": asdict(settings), "sweeps": sweeps}
        header = checkpoint.result_header("steer.py", ckpt, lab.meta, lab.model, **facts)
        print(json.dumps(header, allow_nan=False))
        return
    for result in sweeps:
        print(f"\n{table(result)}")
    print("\nKL: nats from the unsteered distribution of the next token; greedy continuations.")


def sweep(lab, settings, doses, layer, neuron):
    """JSON-able results of one neuron: a row for no change and for each dose, ascending."""
    ids, changes = lab.ids(settings.prompt), []
    for dose in doses:
        options = {"subspace": settings.head is not None}
        changes.append(lab.intervention(layer, neuron, f"{dose!r}x", settings.op, **options))
    steered = [next_token(lab.model, ids, [change]) for change in changes]
    followed = steered[-1].most(SHOWN, 1)
    rows = [row(lab, settings, 0.0, steered[0].before, followed)]
    for dose, change, result in zip(doses, changes, steered):
        facts = row(lab, settings, dose, result.after, followed, change)
        rows.append({**facts, "value": change.value, "kl": result.kl})
    return {
        "neuron": prompt.place(changes[0]),
        "label": prompt.label_of(lab, changes[0]),
        "raised at the largest dose": [lab.token(id) for id in followed],
        "rows": rows,
    }


def row(lab, settings, dose, log_p, followed, change=None):
    """The row of one dose: probabilities of the followed tokens, and the continuation."""
    with lab.steer(*([change] if change else [])):
        text = lab.generate(settings.prompt, settings.tokens, temperature=0)
    continued = text.removeprefix(lab.text(lab.ids(settings.prompt)))
    probabilities = [log_p[id].exp().item() for id in followed]
    facts = {"dose": dose, "value": None, "kl": 0.0}
    return {**facts, "probabilities": probabilities, "continuation": continued}


def table(result):
    """One neuron's sweep in Markdown."""
    tokens = [f"“{token}”" for token in result["raised at the largest dose"]]
    head = [f"neuron {result['neuron']}", "value", "KL", *tokens, "continuation"]
    rows = []
    for facts in result["rows"]:
        dose = f"{facts['dose']:g}x" if facts["dose"] else "unsteered"
        value = "" if facts["value"] is None else f"{facts['value']:.3g}"
        shown = [f"{probability:.2%}" for probability in facts["probabilities"]]
        continued = facts["continuation"].replace("\n", "↵").replace("|", "\\|")
        rows.append([dose, value, f"{facts['kl']:.3g}", *shown, f"“{continued}”"])
    label = f"\n\n{result['label']}" if result["label"] else ""
    return markdown(head, rows) + label


COMMAND = Command(Settings, run)
