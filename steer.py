"""Turn neurons of a model and read what changes: `python steer.py CKPT --layer 2 --neuron 40 --prompt "1 2"`.

    CKPT            next tokens raised and lowered, the text with and without; no --prompt: asks for prompts
    demo CKPT       the paper's demonstration: neurons drawn by a seed, each turned alone, on four prompts
    measure CKPT    dose and response with controls: what turning moves, and what else it moves

In CRATE a neuron is a coordinate of the model's own code: nothing is put into the model to turn it.
`python steer.py COMMAND --help` lists the settings of one, `python steer.py --help` those of the first.
"""

import itertools
import re
import shutil
import sys
import textwrap
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch

from crate_mini import UserError, cli
from crate_mini import results as evidence
from crate_mini.intervene import Intervention, steer
from crate_mini.lab import Desk
from crate_mini.sae import autoencoder as sae
from crate_mini.steering import dose_response as dose
from crate_mini.steering import figure as dose_views
from crate_mini.steering.next_token import next_token


@dataclass
class Steer:
    """Turn neurons while the model reads a prompt and goes on with it."""

    layer: int | None = None  # layer of the neurons, the first is 0 (an --sae knows its own)
    neuron: str = ""  # 40, or several turned together 12,40, or label:"comma" by what it fires on
    value: str = "2x"  # 2x or 2: twice its observed maximum; 1.5abs: in the code's own unit; with
    # --op scale a factor; below 0 as --value=-2x
    op: str = "set"  # set | add | scale | ablate (to 0)
    positions: str = "all"  # all tokens | last: the prompt's last and those generated after it
    prompt: str | None = None  # text to go on with (without it you are asked for one after another)
    top: int = 8  # rows of most raised and most lowered next tokens
    tokens: int = 40  # tokens to generate
    temperature: float = 0.8  # of the draws, 0 takes the likeliest
    top_k: int | None = None  # draw from so many likeliest tokens (default all)
    seed: int = 1337  # of the draws, the same for both texts
    sae: str | None = None  # turn features of this autoencoder (a file of interpret.py sae) instead
    keep_error: bool = False  # with --sae: add back what its reconstruction misses
    data: str | None = (
        None  # text to observe maxima on (default the held-out part of the checkpoint's)
    )
    device: str = "auto"  # auto | cpu | cuda | cuda:N


@dataclass
class Demo:
    """Neurons drawn by a seed, not picked, each turned alone: the three next tokens that it raises most."""

    n: int = 5  # neurons
    layer: int | None = None  # of the neurons (default any)
    value: str = "4x"  # as in steering
    prompts: str = "1 2 3 4 5|The name of the|If the|import"  # separated by |
    seed: int = 1337  # that draws the neurons
    data: str | None = (
        None  # text to observe maxima on (default the held-out part of the checkpoint's)
    )
    device: str = "auto"  # auto | cpu | cuda | cuda:N


@dataclass
class Measure:
    """Dose and response: the effect of turning neurons, its side effect, and the same for controls."""

    neurons: int = 8  # drawn in each layer among those that fire
    doses: str = "0.5,1,2,4,8"  # multiples of each one's observed maximum
    tokens: int = 512  # held-out tokens that choose continuations; as many others measure
    top: int = 10  # continuations of a neuron
    sae: str | None = (
        None  # autoencoders of this checkpoint, separated by commas: their features too
    )
    beside: str | None = (
        None  # steering.json of other models, separated by commas: into the same figure
    )
    seed: int = 1337  # of neurons, windows, random directions and the bootstrap
    data: str | None = None  # text to measure on (default the held-out part of the checkpoint's)
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    out: str | None = None  # folder of the results (default `interpret` beside the checkpoint)


def tables(desk, found, top):
    """Print the next tokens whose probability rose and fell most."""
    direct = "direct" if found.direct is not None else ""
    for name, sign in (("raised", 1), ("lowered", -1)):
        print(f"\n{name:<10}{'token':<20}{'before':>9}{'after':>9}{'logit':>9}{direct:>9}")
        for id in found.most(top, sign):
            before, after = found.before[id].exp().item(), found.after[id].exp().item()
            told = f"{found.direct[id]:>+9.2f}" if direct else ""
            print(
                f"{'':<10}{desk.quoted(id):<20}{before:>9.2%}{after:>9.2%}{found.logits[id]:>+9.2f}{told}"
            )
    print(
        "\nread-out  logit: the model was run again; "
        + (
            "direct: from the last layer's weights, exact up to the final norm's scale"
            if direct
            else "weights alone tell only in the last layer"
        )
    )


def texts(desk, s, interventions, ids):
    """Print both continuations side by side, drawn with one seed."""
    idx, written = torch.tensor([ids], device=desk.model.tokens.weight.device), []
    for some in ([], interventions):
        draws = torch.Generator(idx.device).manual_seed(s.seed)
        with steer(desk.model, some) as steering:
            out = desk.model.generate(idx, s.tokens, s.temperature, s.top_k, draws)
        written.append(desk.text(out[0].tolist()))
    width = (shutil.get_terminal_size((104, 24)).columns - 3) // 2
    columns = [
        [part for line in text.split("\n") for part in textwrap.wrap(line, width) or [""]]
        for text in written
    ]
    print(f"\n{'as it is':<{width}} | steered\n{'-' * width}-+-{'-' * width}")
    for pair in itertools.zip_longest(*columns, fillvalue=""):
        print(" | ".join(f"{part:<{width}}" for part in pair).rstrip())
    print(
        f"\nfired     {', '.join(map(str, steering.fired))} times in {len(ids)} tokens of the prompt and "
        f"{s.tokens - 1} new ones that were read"
    )


def show(desk, s, prompt):
    """One prompt: what is turned, next tokens, continuations."""
    ids, interventions = desk.ids(prompt), []
    for layer, j in desk.chosen(s.neuron, s.layer):
        intervention, words = desk.turned(
            layer, j, s.value, s.op, positions=s.positions, keep_error=s.keep_error
        )
        interventions.append(intervention)
        label = desk.label(layer, j)
        print(f"turned    {words}" + (f"\nlabel     {label}" if label else ""))
    found = next_token(desk.model, ids, interventions)
    print(
        f"prompt    {len(ids)} tokens, the last: "
        + " ".join(desk.quoted(i) for i in ids[-8:])
        + f"\nnext      KL {found.kl:.3g} nats from the unsteered distribution"
    )
    tables(desk, found, s.top)
    texts(desk, s, interventions, ids)


def converse(desk, s):
    """Ask for prompts until the end of input."""
    with suppress(ImportError):
        import readline  # noqa: F401  (gives input() a history and line editing)
    names = {f.name: f for f in fields(Steer) if f.name not in ("sae", "data", "device", "prompt")}
    print(
        "a prompt a line; `:layer 2`, `:neuron 12`, `:value 4x` ... change a setting; Ctrl-D ends"
    )
    while True:
        try:
            line = input("prompt> ")
            command = re.match(r":(\w+) ?(.*)", line)
            if not command:
                show(desk, s, line)
            elif command[1] not in names:
                raise UserError(
                    f"{command[1]!r} is no setting here{cli.nearest(command[1], names)}."
                )
            else:
                set_one(s, names[command[1]], command[2])
        except EOFError:
            return print()
        except KeyboardInterrupt:
            print("  (Ctrl-D ends)")
        except UserError as error:
            print(f"error: {str(error).replace('--', ':')}")  # as settings are written here


def set_one(s, field, text):
    """Give a setting its value from text."""
    kind = cli.kind_of(field)
    try:
        value = text.lower() in ("1", "true", "yes", "on") if kind is bool else kind(text)
        check(replace(s, **{field.name: value}))
    except ValueError:
        raise UserError(
            f"{text!r} is no {kind.__name__}, so {field.name} stays as it was."
        ) from None
    setattr(s, field.name, value)


def check(s):
    """Raise UserError for a setting out of range."""
    limits = {"top": 1, "tokens": 1, "temperature": 0, "top_k": 1, "n": 1, "neurons": 1, "seed": 0}
    for name, least in limits.items():
        value = getattr(s, name, None)
        if isinstance(value, (int, float)) and not least <= value < 10**6:
            raise UserError(
                f"--{name.replace('_', '-')} {value} is out of range; give {least} to 999999."
            )


def main_steer(s, ckpt):
    desk = Desk(ckpt, s.data, s.device, s.sae)
    if s.prompt is None:
        return converse(desk, s)
    show(desk, s, s.prompt)


def main_demo(s, ckpt):
    """A markdown table on the screen."""
    desk, rng = Desk(ckpt, s.data, s.device), np.random.default_rng(s.seed)
    prompts, layers = (
        s.prompts.split("|"),
        range(len(desk.model.blocks)) if s.layer is None else [s.layer],
    )

    def row(name, interventions):
        cells = []
        for prompt in prompts:
            found = next_token(desk.model, desk.ids(prompt), interventions)
            ids = found.most(3, 1) if interventions else found.before.topk(3).indices.tolist()
            cells.append(
                ", ".join(
                    f"{desk.quoted(i)} {found.before[i].exp():.1%}"
                    + (f" > {found.after[i].exp():.1%}" if interventions else "")
                    for i in ids
                )
            )
        return [name, *cells]

    for layer in layers:
        Intervention(layer, 0).check(desk.model.config)
    live = [(n, j) for n in layers for j in desk.observed(n).cpu().numpy().nonzero()[0].tolist()]
    drawn = sorted(rng.choice(len(live), min(s.n, len(live)), replace=False).tolist())
    rows = [row(f"{n}:{j}", [desk.turned(n, j, s.value)[0]]) for n, j in (live[at] for at in drawn)]
    print(
        dose_views.markdown(
            ["layer:neuron", *(f"“{p}”" for p in prompts)], [row("none", []), *rows]
        )
    )


def main_measure(s, ckpt):
    """steering.json and steering.png."""
    desk = Desk(ckpt, s.data, s.device)
    try:
        doses = sorted({float(d) for d in s.doses.split(",")})
        if not all(0 < d <= 1e6 for d in doses):
            raise ValueError
    except ValueError:
        raise UserError(
            f"--doses {s.doses!r} are no doses; give numbers from 0 to a million like 0.5,1,2,4,8."
        ) from None
    others = [dose_views.read(path) for path in (s.beside or "").split(",") if path]
    place = evidence.folder(ckpt, s.out)
    place.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    sites = [(n, None) for n in range(len(desk.model.blocks))]
    for path in (s.sae or "").split(",") if s.sae else []:
        autoencoder, _ = sae.load(path, desk.model)
        sites.append((autoencoder.layer, autoencoder))
    found = dose.measure(
        desk.model,
        desk.held_out(),
        doses,
        sites,
        n=s.neurons,
        tokens=s.tokens,
        top=s.top,
        seed=s.seed,
    )
    result = evidence.header(
        "steer.py",
        ckpt,
        desk.meta,
        desk.model,
        seed=s.seed,
        settings=asdict(s),
        corpus=desk.corpus.meta,
        summary=dose.summary(found["rows"], s.seed),
        **found,
    )
    path = evidence.write_json(place / "steering.json", result)
    picture = dose_views.figure([result, *others], path.with_suffix(".png"))
    print(f"\n{dose_views.table(result)}\n\nfiles     {path}, {picture}")
    if (place / "scores.jsonl").exists():
        print(f"page      `python interpret.py report {ckpt}` shows it above the neurons")


COMMANDS = {"demo": (Demo, main_demo), "measure": (Measure, main_measure)}


def main():
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    settings, function = COMMANDS.get(name, (Steer, main_steer))
    own = settings is not Steer
    parser = cli.Parser(
        prog=f"steer.py {name}" if own else "steer.py",
        description=settings.__doc__ if own else __doc__.strip(),
    )
    parser.add_argument("ckpt", metavar="CKPT", help="a checkpoint folder, like out/crate-3L/best")
    cli.add_fields(parser, settings, "settings")
    words = sys.argv[1:] or ["--help"]
    if not own and len(words) > 1 and not words[1].startswith("-"):
        raise UserError(
            f"unknown command {name!r}{cli.nearest(name, COMMANDS)}; there are "
            f"{' and '.join(COMMANDS)}, and a checkpoint alone comes before all flags."
        )
    given = vars(parser.parse_args(words[own:]))
    s = settings(**{f.name: given[f.name] for f in fields(settings) if f.name in given})
    check(s)
    return function(s, given["ckpt"])


if __name__ == "__main__":
    cli.run(main)
