"""The neurons that --neuron and --layer name in a Lab, and the amount that --value names."""

import math
import re

from crate_mini import UserError
from crate_mini.intervene import must_exist

MOST = 999_999  # the largest count that a setting takes
NUMBER = re.compile(r" *(?:(\d{1,9}):)?(-?\d{1,9}) *")  # 40, or 2:40 with its layer
VALUE = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)(x|abs)?")  # 2, 2x, 1.5abs


def neurons(lab, words, layer=None, head=None):
    """[(layer, neuron)] of the words after --neuron: 40, or 12,40, or 2:40,1:12, or label:"comma".

    2:40 is neuron 40 of layer 2, whatever `layer` is. head: of an attention head; the words are
    then coordinates of its u, or "all" of them, and the numbers those of all heads side by side.
    Raises UserError for words that name no neuron, and for a layer that is missing or wrong.
    """
    text = wanted_label(words)
    if text and head is None:
        return find(lab, text, layer)[:1]
    if head is not None and words.strip() == "all":
        words = ",".join(map(str, range(head_width(lab))))
    matches = [NUMBER.fullmatch(word) for word in words.split(",")]
    if not all(matches):
        raise UserError(
            f"--neuron {words!r} names no neuron; give a number like 40, several like 12,40 or, "
            'with their layers, 2:40,1:12, or label:"comma".'
        )
    if layer is None and lab.sae:
        layer = lab.sae.layer
    numbers = []
    for match in matches:
        of_layer = int(match[1]) if match[1] else layer
        if of_layer is None:
            raise UserError("--neuron needs --layer, e.g. --layer 0.")
        if lab.sae and of_layer != lab.sae.layer:
            raise UserError(
                f"--layer {of_layer} is not the autoencoder's layer {lab.sae.layer}; leave it out."
            )
        number = int(match[2])
        numbers.append((of_layer, number if head is None else in_head(lab, head, number)))
    return numbers


def head_width(lab):
    """p, the coordinates of one head's u."""
    return lab.model.config.n_embd // lab.model.config.n_head


def in_head(lab, head, coordinate):
    """The number of a head's coordinate among those of all heads side by side."""
    must_exist("head", head, lab.model.config.n_head)
    must_exist("coordinate", coordinate, head_width(lab))
    return head * head_width(lab) + coordinate


def wanted_label(words):
    """The text to look for in labels, or '' if the words of --neuron are numbers."""
    if not words.startswith("label:"):
        return ""
    return words.removeprefix("label:").strip(" \"'")


def find(lab, text, layer=None):
    """[(layer, neuron)] with `text` in their label, the largest share of activation first.

    A label also matches if `text` is the name of its class. Raises UserError if none matches.
    """
    layers = range(len(lab.model.blocks)) if layer is None else [layer]
    layer_of = {lab.known.site(n): n for n in layers}
    matches = []
    for (site, neuron), row in lab.known.rows.items():
        share = _share(lab, row.get("label") or {}, text)
        if site in layer_of and share:
            matches.append((-share, layer_of[site], neuron))
    if not matches and lab.known.unused:
        raise UserError(
            f"no labels: {lab.known.unused}; make them with `python interpret.py neurons "
            f"{lab.checkpoint}`, or give the number of a neuron."
        )
    if not matches:
        raise UserError(
            f"no label of {lab.checkpoint} has {text!r}; `python interpret.py neurons CKPT` makes "
            "labels, and its pages show them."
        )
    return [match[1:] for match in sorted(matches)]


def _share(lab, label, text):
    """The share of a neuron's activation on tokens that hold `text`, plus 1 for its class."""
    shares = [
        share or 1e-9
        for id, _, _, share in label.get("tokens", [])
        if text.casefold() in lab.token(id).casefold()
    ]
    return sum(shares) + (label.get("class") == text)


def amount(lab, layer, neuron, value, op="set", subspace=False):
    """(number, origin): the number that --value stands for, and how it follows from the maximum.

    2 and 2x are twice the neuron's maximum; 1.5abs is in the code's own unit, and for --op scale
    the number is a factor: then origin is ''. subspace: `neuron` is a coordinate of u. Raises
    UserError for a value that cannot be parsed, or a neuron that never fired.
    """
    text = value.strip() if isinstance(value, str) else str(value)
    match = VALUE.fullmatch(text)
    if not match or not math.isfinite(float(match[1])) or (op == "scale" and match[2] == "abs"):
        raise UserError(
            f"--value {value!r} is not a value; give multiples of the neuron's maximum like 2x, "
            "or 1.5abs in its own unit (with --op scale a factor)."
        )
    number = float(match[1])
    if op not in ("set", "add") or match[2] == "abs":
        return number, ""
    largest, source = lab.known.maximum(layer, neuron, subspace)
    kind = "coordinate" if subspace else "neuron"
    if not largest > 0:
        raise UserError(
            f"{kind} {neuron} of layer {layer} never fired on {source}, so it has no maximum to "
            "multiply; give --value in its own unit, like 1abs."
        )
    return number * largest, f"{number:g} x {largest:.3g}, its maximum in {source}"
