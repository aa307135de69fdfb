"""Steering MSSA's subspaces: the projection u of a head, which is query, key and value at once."""

import pytest
import torch
from tiny_models import T, V, tiny

from crate_mini import UserError, ops
from crate_mini.generate import generate
from crate_mini.intervene import Intervention, hook_codes, steer
from crate_mini.sae.autoencoder import SAE

D = 16  # of a tiny model
MSSA = ["crate", "crate+", "crate, key shift", "crate, top-k, debiased"]
IDS = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=MSSA)
def lm(request):
    return tiny(request.param)


@torch.no_grad()
def run(lm, *interventions):
    with steer(lm, interventions):
        return lm(IDS)


def test_a_coordinate_of_u_is_set_where_query_key_and_value_come_from(lm, monkeypatch):
    """Against the same change made to the operation's result, in that layer alone."""
    project, calls = ops.mssa_project, []

    def changed(*arguments):
        u = project(*arguments).clone()
        if len(calls) == 1:  # the second layer
            u[..., 1, 3] = 2.5  # head 1, its coordinate 3: number 8 + 3 of the heads side by side
        calls.append(u)
        return u

    steered = run(lm, Intervention(1, 11, "set", 2.5, subspace=True))
    plain = run(lm)
    monkeypatch.setattr(ops, "mssa_project", changed)
    assert torch.equal(steered, run(lm)) and len(calls) == 2
    assert not torch.equal(steered, plain)


def test_no_change_of_a_subspace_is_the_identity_bitwise(lm):
    unchanged = [Intervention(0, j, "scale", 1.0, subspace=True) for j in range(D)]
    assert torch.equal(run(lm, *unchanged), run(lm))


def test_a_head_without_its_projection_attends_evenly_to_nothing(lm):
    """u = 0 in all heads: attention writes its bias alone, whatever the tokens are."""
    written = []
    hook = lm.blocks[0].attention.register_forward_hook(lambda *io: written.append(io[2]))
    run(lm, *[Intervention(0, j, "ablate", subspace=True) for j in range(D)])
    hook.remove()
    torch.testing.assert_close(written[0], lm.blocks[0].attention.out.bias.expand(2, T, D))


def test_positions_and_the_past_are_kept_apart(lm):
    mask = torch.zeros(T, dtype=torch.bool)
    mask[6] = True
    steered = run(lm, Intervention(0, 2, "add", 3.0, mask, subspace=True))
    plain = run(lm)
    assert torch.equal(steered[:, :6], plain[:, :6])
    assert not torch.equal(steered[:, 6], plain[:, 6])


@pytest.mark.parametrize("positions", ["all", "last"])
def test_generation_stays_steered_with_and_without_cache(lm, positions):
    texts = []
    change = Intervention(0, 5, "set", 6.0, positions, subspace=True)
    for use_cache in (True, False):
        with steer(lm, [change]) as steering:
            texts.append(generate(lm, IDS[:, :5], 12, temperature=0, use_cache=use_cache))
    assert torch.equal(*texts) and steering.fired[0] > 0


def test_codes_and_subspaces_are_steered_together(lm):
    both = [Intervention(0, 5, "set", 4.0, subspace=True), Intervention(0, 5, "set", 4.0)]
    together = run(lm, *both)
    with steer(lm, both[:1]):
        assert torch.equal(run(lm, both[1]), together)
    assert not torch.equal(together, run(lm, both[1]))
    assert str(both[0]) == "set coordinate 5 of layer 0"


def test_hooks_see_the_projections_and_their_gradient(lm):
    seen = []
    with hook_codes(lm, 1, lambda u: seen.append(u.retain_grad() or u), subspace=True) as hook:
        lm(IDS, IDS).backward()
    assert hook.calls == 1 and seen[0].shape == (2, T, D) and seen[0].grad.abs().sum() > 0


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("gpt2", {}, "steers the u of attention mssa"),
        ("crate", {"sae": SAE(64, 128)}, "without an autoencoder"),
        ("crate", {"neuron": D}, "coordinate 16 does not exist; coordinates are 0 to 15"),
        ("crate", {"layer": 2}, "layer 2 does not exist"),
    ],
)
def test_what_is_no_subspace_is_refused(kind, changes, message):
    facts = {"layer": 0, "neuron": 1, "subspace": True, **changes}
    with pytest.raises(UserError, match=message), steer(tiny(kind), [Intervention(**facts)]):
        pass
