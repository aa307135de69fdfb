"""Read or change neurons while the model runs, with proof that it happened.

    with hook_codes(model, layer, function):        # function sees the codes, may return others
        model.trunk(ids)

    with steer(model, [Intervention(layer=1, neuron=40, op="set", value=3.0)]) as steering:
        generate(model, ids, 20)                    # steering.fired: tokens at which each one acted

In CRATE a neuron is a coordinate of the model's own code, so steering inserts nothing: with no
neuron changed, the model's output is the same to the bit. A feature of a sparse autoencoder
(`sae`) is not part of the model: to steer it, the codes are replaced by their reconstruction or,
with keep_error, moved by the difference that the change makes to the reconstruction.
"""

import itertools
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch

from crate_mini import UserError

OPS = ("set", "scale", "add", "ablate")


def must_exist(name, number, n):
    """Raise UserError unless `number` is one of 0 to n - 1."""
    if type(number) is not int or not 0 <= number < n:
        raise UserError(f"{name} {number!r} does not exist; {name}s are 0 to {n - 1} here.")


@contextmanager
def hook_codes(model, layer, function, subspace=False):
    """In the block, function(codes) runs whenever a layer's codes (B, T, h) are computed.

    If it returns a tensor, the model goes on with that instead; if it returns None or its argument,
    the codes keep their bits. It runs outside autocast. Yields an object with `.calls`, the number
    of passes. Nested hooks act in the order in which they were set; the hook is removed when the
    block ends, however it ends. subspace: hooks MSSA's projections u (B, T, d), heads side by side,
    in place of the codes. Raises UserError for a layer that does not exist.
    """
    must_exist("layer", layer, len(model.blocks))
    counter = SimpleNamespace(calls=0)

    def hook(module, inputs, codes):
        counter.calls += 1
        with torch.autocast(codes.device.type, enabled=False):
            return function(codes)

    block = model.blocks[layer]
    point = block.attention.subspace if subspace else block.sparsifier.code
    handle = point.register_forward_hook(hook)
    try:
        yield counter
    finally:
        handle.remove()


@dataclass(frozen=True, eq=False)
class Intervention:
    """A change of one neuron, or of one feature of `sae`; those of a layer act in the order given.

    value: in the codes' own unit (set, add), a factor (scale), unused (ablate, which sets 0).
    positions: "all"; "last", the prompt's last token and every generated token; or a bool mask (T,)
    or (B, T) over the tokens of the text; its last column also decides for tokens beyond it.
    along: a direction (h,) of codes that takes the neuron's change in place of the neuron itself.
    subspace: `neuron` is a coordinate of MSSA's u (d,): of head k from k p to k p + p - 1.
    """

    layer: int
    neuron: int
    op: str = "set"
    value: float = 0.0
    positions: str | torch.Tensor = "all"
    sae: object = None
    keep_error: bool = False
    along: torch.Tensor | None = None
    subspace: bool = False

    @property
    def kind(self):
        """What `neuron` numbers: a "neuron", a "coordinate" of u, or a "feature" of `sae`."""
        if self.subspace:
            return "coordinate"
        return "neuron" if self.sae is None else "feature"

    def __str__(self):
        return f"{self.op} {self.kind} {self.neuron} of layer {self.layer}"

    def check(self, config):
        """Raise UserError unless a model of this config can take the intervention."""
        if self.subspace and (config.attention != "mssa" or self.sae is not None):
            raise UserError("subspace=True steers the u of attention mssa, without an autoencoder.")
        widths = {"neuron": config.n_code, "coordinate": config.n_embd}
        width = widths.get(self.kind) or self.sae.c.numel()
        must_exist("layer", self.layer, config.n_layer)
        must_exist(self.kind, self.neuron, width)
        if self.sae is not None and not self._sae_fits(config):
            raise UserError(
                f"the autoencoder is for layer {self.sae.layer} and {self.sae.b.numel()} codes, "
                f"not for the {config.n_code} of layer {self.layer}."
            )
        if self.op not in OPS:
            raise UserError(f"op {self.op!r} is unknown; choose one of {', '.join(OPS)}.")
        largest = torch.finfo(torch.float32).max
        if not isinstance(self.value, (int, float)) or not abs(self.value) < largest:
            raise UserError(f"value {self.value!r} is not a finite number; try 2.0.")
        if not self._positions_fit():
            raise UserError("positions must be 'all', 'last' or a bool tensor (T,) or (B, T).")

    def _sae_fits(self, config):
        return self.sae.layer in (None, self.layer) and self.sae.b.numel() == config.n_code

    def _positions_fit(self):
        mask = self.positions
        if not torch.is_tensor(mask):
            return isinstance(mask, str) and mask in ("all", "last")
        return mask.dtype == torch.bool and mask.dim() in (1, 2) and mask.numel() > 0

    def apply(self, f, where):
        """f (B, T, n) with this neuron changed where (B, T) is true; all else keeps its bits."""
        old = f[..., self.neuron]
        if self.op == "scale":
            new = old * self.value
        elif self.op == "add":
            new = old + self.value
        else:
            new = torch.full_like(old, self.value if self.op == "set" else 0)
        if self.along is not None:
            change = torch.where(where, new - old, 0)
            return f + change[..., None] * self.along.to(f)
        f = f.clone()
        f[..., self.neuron] = torch.where(where, new, old)
        return f


class Steering:
    """The interventions at work on a model. fired: at how many tokens each has acted so far."""

    def __init__(self, model, interventions, lengths):
        self.model, self.interventions, self.lengths = model, interventions, lengths
        self.fired = [0] * len(interventions)

    def where(self, positions, B, T, device):
        """(B, T) bool: the tokens of this pass to act on; never padding (see `steer`'s lengths)."""
        cache = self.model.cache
        begin, prompt = (cache.slid + cache.length, cache.prompt) if cache else (0, T)
        # Positions count from the start of the text, not of the window.
        position = begin + torch.arange(T, device=device).expand(B, T)
        lengths = torch.as_tensor([prompt] if self.lengths is None else self.lengths)
        end = _rows(lengths[:, None], "lengths", B, device)
        real = (position < end) | (position >= prompt)
        if isinstance(positions, str):
            return real & (position >= end - 1) if positions == "last" else real
        mask = _rows(torch.atleast_2d(positions), "positions", B, device)
        return real & mask.gather(1, position.clamp(max=mask.shape[1] - 1))

    def changed(self, codes, numbers):
        """A layer's codes (B, T, h) after these interventions, all on neurons or all on one SAE."""
        sae = self.interventions[numbers[0]].sae
        x = codes if sae is None else codes.float()
        before = after = x if sae is None else sae.encode(x)
        touched = torch.zeros(codes.shape[:2], dtype=torch.bool, device=codes.device)
        for n in numbers:
            where = self.where(self.interventions[n].positions, *codes.shape[:2], codes.device)
            after = self.interventions[n].apply(after, where)
            touched = touched | where
            self.fired[n] += int(where.sum())
        if sae is None:
            return after
        new = sae.decode(after)
        if self.interventions[numbers[0]].keep_error:
            new = x + (new - sae.decode(before))
        return torch.where(touched[..., None], new.to(codes.dtype), codes)


def _rows(t, name, B, device):
    """t (1, n) or (B, n) as (B, n)."""
    if len(t) not in (1, B):
        raise UserError(f"{name} have {len(t)} rows, the batch has {B}; give one row for each.")
    return t.to(device).expand(B, -1)


@contextmanager
def steer(model, interventions, lengths=None):
    """In the block, every pass of `model` runs with the interventions; yields the Steering.

    lengths: (B,) real tokens in each row of a batch that is padded on the right. Blocks nest: the
    inner one acts on what the outer one left. Raises UserError for an intervention that the model
    cannot take, and at the end for one that never fired.
    """
    interventions = list(interventions)
    for intervention in interventions:
        intervention.check(model.config)
    steering = Steering(model, interventions, lengths)

    def site(n):
        change = interventions[n]
        return change.layer, change.subspace, id(change.sae), change.keep_error

    with ExitStack() as hooks:
        for (layer, subspace, *_), group in itertools.groupby(range(len(interventions)), site):
            change = partial(steering.changed, numbers=list(group))
            hooks.enter_context(hook_codes(model, layer, change, subspace))
        yield steering
    for intervention, fired in zip(interventions, steering.fired):
        if not fired:
            raise UserError(
                f"{intervention} never fired: no pass ran, or its positions name no real token."
            )
