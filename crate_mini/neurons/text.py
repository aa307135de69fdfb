"""`interpret.py text CKPT "any text"`: which neurons fire on this text, and where?

A terminal table and text.html: tokens coloured by a neuron, neurons by token. A neuron's values
are compared with what it does on held-out text, from the record of `neurons` or observed now.
"""

import sys
from dataclasses import dataclass

import torch

from crate_mini import UserError
from crate_mini.cli import setting
from crate_mini.console import results, terminal
from crate_mini.console.results import atomic_write
from crate_mini.lab import Lab
from crate_mini.layers.measure import must_be_finite
from crate_mini.neurons import text_page
from crate_mini.neurons.record import sites
from crate_mini.neurons.score_files import read_rows
from crate_mini.training import checkpoint

SCRIPT = "interpret.py"
EXAMPLE = 'python interpret.py text CKPT "Once upon a time"'
CHARACTERS = 64  # read for each token of the context; the rest would be cut anyway
HELD_OUT = 16384  # tokens that values are compared with, if `neurons` has not recorded any
PEAK = 1 / 3  # of its maximum that a neuron must reach to be called specific
FOLLOWS = 0.1  # r beyond the token from which a neuron's property is shown
BEFORE = 24  # characters of text before a peak, in the table


@dataclass
class Settings:
    """Which neurons fire on a text of yours?

    The table lists the neurons that come closest to their own maximum, and those that fire more
    here than on held-out text. text.html colours the tokens by any of them. Labels and links are
    there if `neurons` has run.
    """

    text: str = setting("", "the text, in quotes; - reads it from standard input")
    layers: str = setting("all", "layers to look at: all, or numbers like 0,2")
    top: int = setting(8, "neurons in each half of the table", low=1, high=200)
    data: str | None = checkpoint.data_setting("compare with")
    tokenizer: str | None = checkpoint.tokenizer_setting()
    device: str = checkpoint.device_setting()
    out: str | None = checkpoint.results_folder_setting()


def run(settings, ckpt):
    """Print the table and write text.html to the results folder.

    Raises UserError if there is no text, and for settings that do not fit the checkpoint.
    """
    if not settings.text:
        raise UserError(f"there is no text; give some, as in `{EXAMPLE}`, or - to read it.")
    lab = Lab(ckpt, settings.data, settings.device, log=print, tokenizer=settings.tokenizer)
    chosen = sites(lab.model, settings.layers)
    ids, note = read_ids(lab, settings.text)
    firing = Firing(lab, ids, chosen)
    folder = results.ready_folder(results.folder(ckpt, settings.out))
    if note:
        print(f"note      {note}")
    print(table(firing, settings.top))
    page = text_page.page(firing, note, folder, ckpt, results.command(SCRIPT))
    path = folder / "text.html"
    with atomic_write(path) as file:
        file.write(page)
    print(f"\nfile      {path}, {path.stat().st_size / 1e3:,.0f} kB")


def read_ids(lab, text):
    """(ids, note): the tokens of a text that fit into the model's context, and what was cut."""
    T = lab.model.config.block_size
    most = T * CHARACTERS
    if text == "-":
        text = sys.stdin.read(most + 1)
    whole = len(text) <= most
    # Bytes that are not UTF-8, or half a pair of Windows, arrive as lone surrogates.
    text = text[:most].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    ids = lab.tokenizer.encode(text)
    if not ids:
        raise UserError(f"the text is empty; give some, as in `{EXAMPLE}`.")
    if len(ids) <= T and whole:
        return ids, ""
    of = f"{len(ids):,}" if whole else f"more than {len(ids):,}"
    return ids[:T], f"the model reads {T:,} tokens; these are the first {T:,} of {of}"


# ---- what fires ----------------------------------------------------------------------------------


class Firing:
    """The activations of a text next to what each neuron does on held-out text.

    neurons: [(site, number)], N of them; acts (T, N), on the text; maximum, mean, density (N,), on
    held-out text; share (T, N), acts over the maximum. compared_with: a description of that text.
    """

    def __init__(self, lab, ids, sites):
        self.lab, self.ids = lab, ids
        self.neurons = [(site, j) for site in sites for j in range(site.width)]
        device = lab.model.tokens.weight.device
        with torch.no_grad():
            codes = lab.model.trunk(torch.tensor([ids], device=device))[1]
        for site in sites:
            must_be_finite(codes[site.layer], f"a code of layer {site.layer}")
        acts = [codes[site.layer][0].float().cpu() for site in sites]
        self.acts = torch.cat(acts, 1)
        self.maximum, self.mean, self.density, self.compared_with = usual(lab, sites)
        never = self.maximum <= 0
        self.share = self.acts / torch.where(never, torch.inf, self.maximum)
        self.peak = self.share.argmax(0)  # (N,) the token on which each fires most
        self.follows = _properties(lab)

    @property
    def strength(self):
        """(N,): the largest value on the text, as a share of the neuron's own maximum."""
        return self.share.max(0).values

    @property
    def lift(self):
        """(N,): the mean on the text over the mean on held-out text, both of positive values."""
        floor = 1e-4 * self.maximum.clamp(min=1e-12)
        return self.acts.clamp(min=0).mean(0) / torch.maximum(self.mean, floor)

    def strongest(self, n):
        """Numbers of the n neurons that come closest to their own maximum."""
        return self._best(self.strength, self.strength > 0, n)

    def most_specific(self, n):
        """Numbers of the n with the largest lift, of those that come near their maximum."""
        return self._best(self.lift, self.strength >= PEAK, n)

    def _best(self, values, allowed, n):
        order = torch.where(allowed, values, -torch.inf).argsort(descending=True, stable=True)
        return order[: min(n, int(allowed.sum()))].tolist()

    def name(self, i):
        site, j = self.neurons[i]
        return f"{site.name}/{j}"

    def label(self, i):
        """The label of a neuron in one line; '' without one."""
        site, j = self.neurons[i]
        return self.lab.known.label(site.layer, j)

    def property(self, i):
        """What the neuron follows beyond its token, from the stage `beyond`; '' if nothing."""
        site, j = self.neurons[i]
        return self.follows.get((site.name, j), "")

    def is_known(self, i):
        """Whether `neurons` has scored this neuron."""
        site, j = self.neurons[i]
        return (site.name, j) in self.lab.known.rows


def usual(lab, sites):
    """(maximum (N,), mean (N,), density (N,), description) of neurons on held-out text.

    From the record of `neurons` if it holds them all; else observed now. mean: of positive values
    and zeros.
    """
    names = [(site.name, j) for site in sites for j in range(site.width)]
    rows = [lab.known.rows.get(name) for name in names]
    if lab.data is None and all(rows):
        values = [[row[name] for row in rows] for name in ("max", "mean", "density")]
        maximum, mean, density = torch.tensor(values)
        return maximum, mean.clamp(min=0), density, "the record of interpret.py neurons"
    return _observed(lab, sites)


@torch.no_grad()
def _observed(lab, sites):
    T = min(256, lab.model.config.block_size)
    device = lab.model.tokens.weight.device
    total, tokens, fired, largest = 0, 0, 0, torch.tensor(0.0)
    for ids, _ in lab.held_out().blocks("val", 8, T, HELD_OUT):
        codes = lab.model.trunk(ids.to(device))[1]
        acts = torch.cat([codes[site.layer].flatten(0, 1).float().cpu() for site in sites], 1)
        must_be_finite(acts, "a code of the held-out text")
        total = total + acts.clamp(min=0).sum(0)
        fired = fired + (acts > 0).sum(0)
        largest = torch.maximum(acts.max(0).values, largest)
        tokens += len(acts)
    return largest, total / tokens, fired / tokens, f"{tokens:,} held-out tokens"


def _properties(lab):
    """{(site, neuron): property and r} that the stage `beyond` found for this checkpoint."""
    folder = results.folder(lab.checkpoint)
    path = folder / "beyond.json"
    if not path.exists():
        return {}
    try:
        content = results.read_json(path)
        rows = read_rows(folder / "beyond-neurons.jsonl")
        if content["checkpoint"]["sha256"] != lab.meta.get("sha256"):
            return {}
        found = {}
        for row in rows:
            if row["r"] is not None and row["r"] >= FOLLOWS:
                found[row["site"], row["neuron"]] = f"{row['property']} (r {row['r']:.2f})"
        return found
    except (UserError, KeyError, TypeError):
        return {}


# ---- the table -----------------------------------------------------------------------------------


def table(firing, top):
    """The neurons that fire most, and most specifically, as text."""
    blocks = [f"{len(firing.ids)} tokens, compared with {firing.compared_with}"]
    titles = {
        "closest to their own maximum": firing.strongest(top),
        "firing here more than elsewhere": firing.most_specific(top),
    }
    for title, numbers in titles.items():
        if not numbers:
            blocks.append(f"{title}: none")
            continue
        rows = [["neuron", "of max", "x usual", "density", "at", ""]]
        for i in numbers:
            rows.append(
                [
                    firing.name(i),
                    f"{100 * firing.strength[i]:.0f} %",
                    f"{firing.lift[i]:.1f}",
                    f"{100 * firing.density[i]:.3g} %",
                    _around(firing, i),
                    _in_words(firing, i),
                ]
            )
        blocks.append(f"{title}\n{_aligned(rows)}")
    return "\n\n".join(blocks)


def _in_words(firing, i):
    """The label of a neuron and what it follows beyond its token, each cut if it is long."""
    return "; ".join(words for words in (firing.label(i)[:40], firing.property(i)) if words)


def _around(firing, i):
    """The text before the token on which a neuron fires most, and that token in «»."""
    peak = int(firing.peak[i])
    tokens = [firing.lab.token(id) for id in firing.ids[: peak + 1]]
    before = "".join(tokens[:-1])[-BEFORE:]
    return f"{before}«{tokens[-1]}»"


def _aligned(rows):
    """Rows as lines: numbers on the right, the text and the label on the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for name, *numbers, around, label in rows:
        cells = [cell.rjust(width) for cell, width in zip(numbers, widths[1:])]
        line = "  ".join([name.ljust(widths[0]), *cells, around.rjust(widths[-2]), label])
        lines.append(line.rstrip())
    return "\n".join(lines)


COMMAND = terminal.Command(Settings, run, positional=("text",))
