"""The first form of steer.py: steer neurons while the model reads a prompt and continues it."""

import itertools
import json
import re
import shutil
import sys
import textwrap
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial

from crate_mini import UserError, cli
from crate_mini.cli import setting
from crate_mini.console.terminal import Command
from crate_mini.intervene import OPS
from crate_mini.lab import Lab
from crate_mini.steering import choose
from crate_mini.steering.choose import MOST
from crate_mini.steering.next_token import next_token
from crate_mini.training import checkpoint

FIXED = ("sae", "data", "tokenizer", "device", "prompt", "json")  # cannot be changed at the prompt
PREPOSITIONS = {"set": "to", "add": "by", "scale": "by"}  # before the value, in a description
TRUE_WORDS = ("1", "true", "yes", "on")  # what turns a switch on at the prompt
FALSE_WORDS = ("0", "false", "no", "off")
MIN_WIDTH = 16  # columns of a continuation, however narrow the terminal


@dataclass
class Settings:
    """Steer neurons while the model reads a prompt and continues it."""

    layer: int | None = setting(
        None, "layer of the neurons, from 0; not needed with --sae", low=-MOST
    )
    neuron: str = setting(
        "",
        "a neuron: 40; several together: 12,40, or 2:40,1:12 with their layers; by what it fires "
        'on: label:"comma"',
    )
    head: int | None = setting(
        None,
        "steer the projection u of this attention head: --neuron numbers its coordinates; all: the "
        "whole head",
        low=-MOST,
    )
    each: bool = setting(False, "steer each neuron alone, and show them side by side")
    value: str = setting(
        "2x",
        "2x or 2: twice the neuron's observed maximum; 1.5abs: in the code's own unit; with "
        "--op scale a factor; negative as --value=-2x",
    )
    op: str = setting("set", "what to do with the value; ablate sets 0", choices=OPS)
    positions: str = setting(
        "all",
        "all tokens, or the last one of the prompt and those generated after it",
        choices=("all", "last"),
    )
    prompt: str | None = setting(None, "text to continue; without it, steer.py asks for prompts")
    top: int = setting(8, "next tokens to list, most raised and most lowered", 1, MOST)
    tokens: int = setting(40, "tokens to generate", 1, MOST)
    temperature: float = setting(0.8, "temperature of sampling; 0 is greedy", 0, MOST)
    top_k: int | None = setting(None, "sample from the k most likely tokens", 1, MOST, shown="all")
    seed: int = setting(1337, "seed of sampling, used for both texts")
    sae: str | None = setting(
        None, "steer features of this autoencoder (a file of interpret.py sae) instead"
    )
    json: bool = setting(False, "print one JSON object instead of tables")
    keep_error: bool = setting(False, "with --sae: add back what its reconstruction misses")
    data: str | None = checkpoint.data_setting("observe maxima on")
    tokenizer: str | None = checkpoint.tokenizer_setting()
    device: str = checkpoint.device_setting()


def run(settings, ckpt):
    """Answer --prompt, or the prompts that are typed."""
    tokenizer = settings.tokenizer
    log = log_of(settings)
    lab = Lab(ckpt, settings.data, settings.device, settings.sae, log, tokenizer)
    if settings.prompt is not None:
        answer(lab, settings, settings.prompt, ckpt)
    elif settings.json:
        raise UserError('--json needs a prompt, as in --prompt "1 2 3 4 5".')
    else:
        converse(lab, settings)


def log_of(settings):
    """Where a Lab's notes go: to stderr if stdout holds JSON."""
    return partial(print, file=sys.stderr) if settings.json else print


def answer(lab, settings, prompt, ckpt=None):
    """Print what steering does to one prompt: next tokens, then both continuations."""
    ids = lab.ids(prompt)
    if settings.json:
        return print_json(lab, settings, prompt, ckpt)
    interventions = chosen(lab, settings)
    if settings.each and len(interventions) > 1:
        groups = [[intervention] for intervention in interventions]
        return print_side_by_side(lab, settings, prompt, groups)
    change = next_token(lab.model, ids, interventions)
    last = " ".join(quoted(lab, id) for id in ids[-8:])
    print(f"prompt    {len(ids)} tokens, the last: {last}")
    print(f"next      KL {change.kl:.3g} nats from the unsteered distribution")
    print_tokens(lab, change, settings.top)
    fired = print_texts(lab, settings, interventions, prompt)
    print(
        f"\nfired     {', '.join(map(str, fired))} times in {len(ids)} tokens of the prompt and "
        f"{settings.tokens - 1} new ones read"
    )


def interventions_of(lab, settings):
    """The interventions that the settings describe."""
    neurons = choose.neurons(lab, settings.neuron, settings.layer, settings.head)
    options = {"positions": settings.positions, "keep_error": settings.keep_error}
    if settings.head is not None:
        options |= {"subspace": True, "sae": None}
    interventions = []
    for layer, neuron in neurons:
        change = lab.intervention(layer, neuron, settings.value, settings.op, **options)
        interventions.append(change)
    return interventions


def chosen(lab, settings):
    """Print and return the interventions that the settings describe."""
    interventions = interventions_of(lab, settings)
    text = choose.wanted_label(settings.neuron)
    if text:
        print_matches(choose.find(lab, text, settings.layer), text)
    for intervention in interventions:
        print(f"steering  {describe(lab, intervention, settings.value)}")
        label = label_of(lab, intervention)
        if label:
            print(f"label     {label}")
    return interventions


def label_of(lab, intervention):
    """The label of the neuron that an intervention steers; '' if it has none."""
    if intervention.subspace:
        return ""
    return lab.known.label(intervention.layer, intervention.neuron)


def describe(lab, intervention, value):
    """An intervention in words.

    Like: set neuron 5 of layer 1 to 0.97 = 2 x 0.486, its maximum in interpret.py's record.
    """
    op = intervention.op
    if op not in PREPOSITIONS:
        return str(intervention)
    place = (intervention.layer, intervention.neuron)
    number, origin = choose.amount(lab, *place, value, op, intervention.subspace)
    text = f"{intervention} {PREPOSITIONS[op]} {number:.4g}"
    return f"{text} = {origin}" if origin else text


def print_matches(neurons, text):
    """Print which neurons other than the first have `text` in their label."""
    others = ", ".join(f"{layer}:{neuron}" for layer, neuron in neurons[1:6])
    if others:
        print(f"found     {len(neurons)} neurons with {text!r}; others (layer:neuron): {others}")


def quoted(lab, id):
    """A token as printable text in quotes."""
    return f"“{lab.token(id)}”"


def print_tokens(lab, change, top):
    """Print the next tokens that rose and fell most in probability."""
    direct = change.direct is not None
    for title, sign in (("raised", 1), ("lowered", -1)):
        heads = f"{'before':>9}{'after':>9}{'logit':>9}{'direct' if direct else '':>9}"
        print(f"\n{title:<10}{'token':<20}{heads}")
        for id in change.most(top, sign):
            before, after = change.before[id].exp().item(), change.after[id].exp().item()
            line = f"{'':<10}{quoted(lab, id):<20}{before:>9.2%}{after:>9.2%}"
            line += f"{change.logits[id]:>+9.2f}"
            if direct:
                line += f"{change.direct[id]:>+9.2f}"
            print(line)
    note = "weights alone predict it only in the last layer"
    if direct:
        note = "direct: from the last layer's weights, exact except for the final norm's scale"
    print(f"\nchange    logit: by running the model again; {note}")


def print_texts(lab, settings, interventions, prompt):
    """Print both continuations side by side, sampled with the same seed.

    Returns the number of tokens at which each intervention acted.
    """
    unsteered, _ = continuation(lab, settings, prompt, [])
    steered, fired = continuation(lab, settings, prompt, interventions)
    print_columns({"unsteered": unsteered, "steered": steered})
    return fired


def continuation(lab, settings, prompt, interventions):
    """(the prompt continued under interventions, the number of tokens at which each acted)."""
    sampling = (settings.tokens, settings.temperature, settings.top_k, settings.seed)
    with lab.steer(*interventions) as steering:
        return lab.generate(prompt, *sampling), steering.fired


def print_columns(texts):
    """Print {title: text} in columns."""
    room = shutil.get_terminal_size((104, 24)).columns - 3 * (len(texts) - 1)
    width = max(MIN_WIDTH, room // len(texts))
    print("\n" + " | ".join(f"{title:<{width}}" for title in texts).rstrip())
    print("-+-".join("-" * width for _ in texts))
    columns = [wrapped(text, width) for text in texts.values()]
    for lines in itertools.zip_longest(*columns, fillvalue=""):
        print(" | ".join(f"{line:<{width}}" for line in lines).rstrip())


# ---- several neurons, each alone -----------------------------------------------------------------


def place(intervention):
    """Where an intervention acts, as it is typed: 2:40, or u 2:40 for a coordinate of u."""
    prefix = "u " if intervention.subspace else ""
    return f"{prefix}{intervention.layer}:{intervention.neuron}"


def print_side_by_side(lab, settings, prompt, groups):
    """Print what each group of interventions does alone: next tokens, then continuations."""
    ids, changes = lab.ids(prompt), {}
    for group in groups:
        changes[", ".join(map(place, group))] = next_token(lab.model, ids, group)
    print(f"prompt    {len(ids)} tokens, the last: {' '.join(quoted(lab, id) for id in ids[-8:])}")
    costs = [f"{name} {change.kl:.3g}" for name, change in changes.items()]
    print(f"next      KL in nats from the unsteered distribution: {', '.join(costs)}")
    for title, sign in (("raised", 1), ("lowered", -1)):
        heads = "".join(f"{name:>12}" for name in ("unsteered", *changes))
        print(f"\n{title:<10}{'token':<20}{heads}")
        for id in most_of_all(changes.values(), settings.top, sign):
            before = next(iter(changes.values())).before[id].exp().item()
            after = [change.after[id].exp().item() for change in changes.values()]
            cells = "".join(f"{probability:>12.2%}" for probability in (before, *after))
            print(f"{'':<10}{quoted(lab, id):<20}{cells}")
    texts = {"unsteered": continuation(lab, settings, prompt, [])[0]}
    for name, group in zip(changes, groups):
        texts[name], _ = continuation(lab, settings, prompt, group)
    print_columns(texts)


def most_of_all(changes, k, sign):
    """Ids of the tokens that each change moves most, in turns, at least k of them."""
    ranked = [change.most(k, sign) for change in changes]
    ids = []
    for ranks in zip(*ranked):
        ids += [id for id in dict.fromkeys(ranks) if id not in ids]
    return ids[: max(k, len(ranked))]


def print_json(lab, settings, prompt, ckpt):
    """Print one JSON object: the model, the prompt, and for each steered run its numbers."""
    ids, interventions = lab.ids(prompt), interventions_of(lab, settings)
    each = settings.each and len(interventions) > 1
    groups = [[change] for change in interventions] if each else [interventions]
    runs = []
    for group in groups:
        text, fired = continuation(lab, settings, prompt, group)
        facts = [steered_facts(lab, intervention) for intervention in group]
        change = next_token(lab.model, ids, group)
        rows = {"raised": 1, "lowered": -1}
        moved = {name: moved_tokens(lab, change, settings.top, rows[name]) for name in rows}
        runs.append({"steered": facts, "kl": change.kl, **moved, "text": text, "fired": fired})
    header = checkpoint.result_header(
        "steer.py", ckpt, lab.meta, lab.model, seed=settings.seed, settings=asdict(settings)
    )
    tokens = [lab.token(id) for id in ids]
    unsteered, _ = continuation(lab, settings, prompt, [])
    answers = {"prompt": prompt, "tokens": tokens, "unsteered": unsteered, "runs": runs}
    print(json.dumps({**header, **answers}, allow_nan=False))


def steered_facts(lab, intervention):
    """An intervention as a JSON-able dict."""
    names = ("layer", "neuron", "op", "value", "positions", "subspace", "keep_error")
    facts = {name: getattr(intervention, name) for name in names}
    return {**facts, "label": label_of(lab, intervention)}


def moved_tokens(lab, change, top, sign):
    """The next tokens that rose (sign 1) or fell (-1) most, as JSON-able dicts."""
    rows = []
    for id in change.most(top, sign):
        before, after = change.before[id].exp().item(), change.after[id].exp().item()
        row = {"id": id, "token": lab.token(id), "before": before, "after": after}
        rows.append({**row, "logit": change.logits[id].item()})
    return rows


def wrapped(text, width):
    """The lines of a text, the long ones broken at `width`."""
    lines = []
    for line in text.split("\n"):
        lines += textwrap.wrap(line, width) or [""]
    return lines


# ---- interactive prompts -------------------------------------------------------------------------


def converse(lab, settings):
    """Ask for prompts until the end of input."""
    with suppress(ImportError):
        import readline  # noqa: F401  (gives input() a history and line editing)
    print("a prompt per line; `:layer 2`, `:neuron 12`, `:value 4x` change a setting; Ctrl-D ends")
    while True:
        try:
            line = input("prompt> ")
            command = re.match(r":(\w+) ?(.*)", line)
            if command:
                change_setting(settings, command[1], command[2])
            else:
                answer(lab, settings, line)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("  (Ctrl-D ends)")
        except UserError as error:
            print(f"error: {str(error).replace('--', ':')}")  # settings are typed as :name here


def change_setting(settings, name, text):
    """Set a setting from text. Raises UserError for an unknown name or a bad value."""
    known = {f.name: f for f in fields(Settings) if f.name not in FIXED}
    if name not in known:
        raise UserError(f"{name!r} is not a setting here{cli.nearest(name, known)}.")
    kind = cli.kind_of(known[name])
    try:
        value = switch(text) if kind is bool else kind(text)
    except ValueError:
        raise UserError(
            f"{text!r} is not of type {kind.__name__}; {name} stays {getattr(settings, name)}."
        ) from None
    cli.check(replace(settings, **{name: value}))
    setattr(settings, name, value)


def switch(text):
    """Whether a word turns a switch on. Raises ValueError for a word that is neither on nor off."""
    if text.lower() not in TRUE_WORDS + FALSE_WORDS:
        raise ValueError
    return text.lower() in TRUE_WORDS


COMMAND = Command(Settings, run)
