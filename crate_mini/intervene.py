"""Turn neurons while a model runs: interventions on the codes that can prove that they happened.

    with steer(lm, [Intervention(layer=1, neuron=40, op="set", value=3.0)]) as steering:
        lm.generate(idx, 20)            # steering.fired: at how many tokens each intervention has acted

In CRATE a neuron is a coordinate of the model's own code: changing it costs nothing but the change, and at no
change the model is the model, to the bit. A feature of a sparse autoencoder (`sae`) is none: to turn it, the
codes are replaced by their reconstruction, or, with keep_error, get the difference that the turn makes to it.
"""

import itertools
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch

from crate_mini import UserError

OPS = ("set", "scale", "add", "ablate")
FLOAT32 = torch.finfo(torch.float32).max


@dataclass(frozen=True, eq=False)
class Intervention:
    """A change of one neuron, or of one feature of `sae`; several on one layer act in the order given.

    value: in the codes' own unit (set, add), a factor (scale), unused (ablate: set to 0).
    positions: "all"; "last", the prompt's last token and whatever is generated after it; or a bool mask (T,)
    or (B, T) over the tokens of the text, where tokens after its end follow its last column.
    along: (h,) if given, the neuron's change is written along this direction instead of the neuron's own.
    """

    layer: int
    neuron: int
    op: str = "set"
    value: float = 0.0
    positions: str | torch.Tensor = "all"
    sae: object = None
    keep_error: bool = False
    along: torch.Tensor | None = None
    kind = property(lambda self: "neuron" if self.sae is None else "feature")

    def __str__(self):
        return f"{self.op} {self.kind} {self.neuron} of layer {self.layer}"

    def check(self, config):
        """Raise UserError unless a model of this config has what is to be changed."""
        width = config.n_code if self.sae is None else self.sae.c.numel()
        for name, value, n in (
            ("layer", self.layer, config.n_layer),
            (self.kind, self.neuron, width),
        ):
            if type(value) is not int or not 0 <= value < n:
                raise UserError(f"{name} {value!r} does not exist; {name}s are 0 to {n - 1} here.")
        if self.sae is not None and (
            self.sae.layer not in (None, self.layer) or self.sae.b.numel() != config.n_code
        ):
            raise UserError(
                f"the autoencoder is for layer {self.sae.layer} and {self.sae.b.numel()} codes, "
                f"not for the {config.n_code} of layer {self.layer}."
            )
        if self.op not in OPS:
            raise UserError(f"op {self.op!r} is unknown; choose one of {', '.join(OPS)}.")
        if not isinstance(self.value, (int, float)) or not abs(self.value) < FLOAT32:
            raise UserError(f"value {self.value!r} is no finite number; try 2.0.")
        at = self.positions
        if not (
            at in ("all", "last")
            if isinstance(at, str)
            else torch.is_tensor(at)
            and at.dim() in (1, 2)
            and at.dtype == torch.bool
            and at.numel()
        ):
            raise UserError("positions must be 'all', 'last' or a bool tensor (T,) or (B, T).")

    def turn(self, f, where):
        """f (B, T, n), this neuron changed where (B, T) says so; all else keeps its bits."""
        old = f[..., self.neuron]
        new = {
            "set": torch.full_like(old, self.value),
            "scale": old * self.value,
            "add": old + self.value,
            "ablate": torch.zeros_like(old),
        }[self.op]
        if self.along is not None:
            return f + torch.where(where, new - old, 0)[..., None] * self.along.to(f)
        f = f.clone()
        f[..., self.neuron] = torch.where(where, new, old)
        return f


class Steering:
    """The interventions at work on a model. fired: at how many tokens each has acted so far."""

    def __init__(self, model, interventions, lengths):
        self.model, self.interventions, self.lengths = model, interventions, lengths
        self.fired = [0] * len(interventions)

    def where(self, positions, B, T, device):
        """(B, T) bool: at which tokens of this pass to act; never at padding, what `lengths` cuts off."""

        def rows(t, name):
            if len(t) not in (1, B):
                raise UserError(
                    f"{name} have {len(t)} rows, the batch has {B}; give one row for each."
                )
            return t.to(device).expand(B, -1)

        past = self.model.past
        begin, prompt = (past.slid + past.length, past.prompt) if past else (0, T)
        at = begin + torch.arange(T, device=device).expand(B, T)  # in the text, not in the window
        ends = rows(
            torch.as_tensor([prompt] if self.lengths is None else self.lengths)[:, None], "lengths"
        )
        real = (at < ends) | (at >= prompt)
        if isinstance(positions, str):
            return real & (at >= ends - 1) if positions == "last" else real
        mask = rows(torch.atleast_2d(positions), "positions")
        return real & mask.gather(1, at.clamp(max=mask.shape[1] - 1))

    def hook(self, numbers):
        """A forward hook for the codes of a layer: these interventions, all on neurons or on one SAE."""
        sae, keep_error = (
            self.interventions[numbers[0]].sae,
            self.interventions[numbers[0]].keep_error,
        )

        def act(module, inputs, a):
            f = before = a if sae is None else sae.encode(a)
            touched = torch.zeros(a.shape[:2], dtype=torch.bool, device=a.device)
            for n in numbers:
                where = self.where(self.interventions[n].positions, *a.shape[:2], a.device)
                f, touched = self.interventions[n].turn(f, where), touched | where
                self.fired[n] += int(where.sum())
            if sae is None:
                return f
            new = a + (sae.decode(f) - sae.decode(before)) if keep_error else sae.decode(f)
            return torch.where(touched[..., None], new, a)

        return act


@contextmanager
def steer(model, interventions, lengths=None):
    """In the block, every pass of `model` runs with the interventions; yields the Steering.

    lengths: (B,) real tokens in each row of a batch that is padded on the right. Blocks nest: the inner acts
    on what the outer left. The model is as before when the block ends, however it ends. Raises UserError for
    an intervention that the model cannot take, and at the end for one that never fired.
    """
    interventions = list(interventions)
    for intervention in interventions:
        intervention.check(model.config)
    steering = Steering(model, interventions, lengths)
    with ExitStack() as hooks:
        for (layer, *_), group in itertools.groupby(
            range(len(interventions)),
            lambda n: (
                interventions[n].layer,
                id(interventions[n].sae),
                interventions[n].keep_error,
            ),
        ):
            code = model.blocks[layer].sparsifier.code
            hooks.enter_context(code.register_forward_hook(steering.hook(list(group))))
        yield steering
    for intervention, fired in zip(interventions, steering.fired):
        if not fired:
            raise UserError(
                f"{intervention} never fired: nothing ran, or its positions name no real token."
            )


def atoms(model, layer):
    """(d, h): what one unit of each neuron of a layer writes to the stream."""
    s = model.blocks[layer].sparsifier
    return s.proj.weight if hasattr(s, "proj") else s.D if s.decoder is None else s.decoder


def random_like(intervention, model, generator):
    """The same change along a random mixture of the layer's atoms that moves the stream as far: a control."""
    W = atoms(model, intervention.layer).detach()
    r = torch.randn(W.shape[1], generator=generator).to(W)
    return replace(intervention, along=r * (W[:, intervention.neuron].norm() / (W @ r).norm()))
