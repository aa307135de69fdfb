"""Interventions: what they change, what they leave to the bit, that they fired and were removed."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import VARIANTS, H, T, V, tiny

from crate_mini import UserError, ops
from crate_mini.generate import generate
from crate_mini.intervene import OPS, Intervention, hook_codes, steer
from crate_mini.sae.autoencoder import SAE
from crate_mini.steering.next_token import direct_effect, next_token, stream

KINDS = pytest.mark.parametrize("kind", VARIANTS)
BACKENDS = pytest.mark.parametrize("backend", ["reference", "auto"])


@pytest.fixture(params=VARIANTS)
def lm(request):
    return tiny(request.param)


def random_ids(rows=2, length=T, seed=1):
    """Ids (rows, length)."""
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(lm, ids, *interventions, lengths=None):
    """Logits (B, T, V) of a steered model."""
    with steer(lm, interventions, lengths):
        return lm(ids)


def live_neuron(lm, layer, ids):
    """The neuron that fires at most tokens, and the layer's codes (B, T, h)."""
    with torch.no_grad():
        codes = lm.trunk(ids)[1][layer]
    return int((codes > 0).float().mean((0, 1)).argmax()), codes


def at(row, column, rows=3):
    """A mask (rows, T) of one token."""
    mask = torch.zeros(rows, T, dtype=torch.bool)
    mask[row, column] = True
    return mask


def has_hooks(lm):
    return any(block.sparsifier.code._forward_hooks for block in lm.blocks)


# ---- what changes and what does not --------------------------------------------------------------


def test_ablating_a_dead_neuron_changes_nothing_exactly(lm):
    sparsifier = lm.blocks[1].sparsifier
    weights = sparsifier.fc.weight[7] if hasattr(sparsifier, "fc") else sparsifier.D[:, 7]
    with torch.no_grad():
        weights.zero_()
        plain = lm(random_ids())
    assert torch.equal(run(lm, random_ids(), Intervention(1, 7, "ablate")), plain)
    neuron, _ = live_neuron(lm, 1, random_ids())
    assert not torch.equal(run(lm, random_ids(), Intervention(1, neuron, "ablate")), plain)


@BACKENDS
def test_no_change_is_the_identity_bitwise(lm, backend):
    ids = random_ids(3)
    with ops.use_backend(backend), torch.no_grad():
        plain = lm(ids)
        neuron, codes = live_neuron(lm, 0, ids)
        for change in (
            Intervention(0, neuron, "scale", 1),
            Intervention(0, neuron, "add", 0.0),
            Intervention(0, neuron, "set", codes[1, 4, neuron].item(), at(1, 4)),
        ):
            assert torch.equal(run(lm, ids, change), plain)


def in_place(module, inputs, codes):
    codes[..., 5] = 3.0


def in_place_and_returned(module, inputs, codes):
    codes[..., 5] = 3.0
    return codes


def before_the_module(module, inputs):
    inputs[0][..., 5] = 3.0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_foreign_hooks_may_write_in_place(lm, mode):
    """As users of other libraries do; the result is that of steering."""
    ids = random_ids()
    steered = run(lm, ids, Intervention(0, 5, "set", 3.0))
    code = lm.blocks[0].sparsifier.code
    handles = [
        (code.register_forward_hook, in_place),
        (code.register_forward_hook, in_place_and_returned),
        (code.register_forward_pre_hook, before_the_module),
    ]
    for register, hook in handles:
        handle = register(hook)
        with mode():
            torch.testing.assert_close(lm(ids), steered)
        handle.remove()


def test_hooks_see_the_gradient_of_the_codes(lm):
    """It is what a small change of one code does to the loss."""
    ids, kept = random_ids(), []
    lm = lm.double()

    def keep(module, inputs, codes):
        codes.retain_grad()
        kept.append(codes)

    handle = lm.blocks[1].sparsifier.code.register_forward_hook(keep)
    lm(ids, ids).backward()
    handle.remove()
    neuron, codes = live_neuron(lm, 1, ids)
    row, column = (codes[..., neuron] == codes[..., neuron].max()).nonzero()[0].tolist()
    losses = []
    for step in (1e-4, -1e-4):
        change = Intervention(1, neuron, "add", step, at(row, column, len(ids)))
        with torch.no_grad(), steer(lm, [change]):
            losses.append(lm(ids, ids).item())
    slope = (losses[0] - losses[1]) / 2e-4
    assert kept[0].grad[row, column, neuron].item() == pytest.approx(slope, rel=1e-4)


def test_set_on_all_positions_is_set_on_each(lm):
    ids = random_ids(3)
    neuron, _ = live_neuron(lm, 0, ids)
    each = []
    for row in range(3):
        each += [Intervention(0, neuron, "set", 1.5, at(row, column)) for column in range(T)]
    everywhere = Intervention(0, neuron, "set", 1.5)
    assert torch.equal(run(lm, ids, everywhere), run(lm, ids, *each))


def test_additions_commute_and_blocks_nest(lm):
    ids = random_ids()
    x = Intervention(0, 3, "add", 2.0)
    y = Intervention(0, 9, "add", -0.5)
    same = Intervention(0, 3, "add", 0.25)
    together = Intervention(0, 3, "add", 2.25)
    assert torch.equal(run(lm, ids, x, y), run(lm, ids, y, x))
    torch.testing.assert_close(run(lm, ids, x, same), run(lm, ids, together))
    with steer(lm, [x]):
        nested = run(lm, ids, y)
    assert torch.equal(nested, run(lm, ids, x, y))


@BACKENDS
def test_one_row_steered_leaves_the_others_their_bits(lm, backend):
    ids = random_ids(3)
    row = torch.tensor([[False], [True], [False]])
    with ops.use_backend(backend), torch.no_grad():
        neuron, _ = live_neuron(lm, 0, ids)
        plain = lm(ids)
        steered = run(lm, ids, Intervention(0, neuron, "set", 4.0, row))
    assert torch.equal(steered[[0, 2]], plain[[0, 2]])
    assert not torch.equal(steered[1], plain[1])


def test_earlier_tokens_never_see_it(lm):
    with torch.no_grad():
        plain = lm(random_ids(3))
    steered = run(lm, random_ids(3), Intervention(0, 5, "add", 3.0, at(1, 6)))
    assert torch.equal(steered[1, :6], plain[1, :6])
    assert not torch.equal(steered[1, 6:], plain[1, 6:])


def naive(codes, layer, interventions, lengths):
    """The codes after every op on every token, one by one, as the docstrings say."""
    codes = codes.clone()
    for change in interventions:
        if change.layer != layer:
            continue
        for b in range(codes.shape[0]):
            for t in range(lengths[b]):
                if change.positions == "all" or t == lengths[b] - 1:
                    old = codes[b, t, change.neuron]
                    new = {
                        "set": change.value,
                        "add": old + change.value,
                        "scale": old * change.value,
                        "ablate": 0.0,
                    }
                    codes[b, t, change.neuron] = new[change.op]
    return codes


def record_codes(lm, when, codes, handles):
    """Hook every layer to put its codes into codes[layer, when]; appends to `handles`."""
    for layer, block in enumerate(lm.blocks):

        def look(module, inputs, output, layer=layer):
            codes[layer, when] = output

        handles.append(block.sparsifier.code.register_forward_hook(look))


INTERVENTIONS = st.builds(
    Intervention,
    layer=st.integers(0, 1),
    neuron=st.integers(0, 3),
    op=st.sampled_from(OPS),
    value=st.floats(-4, 4, width=16),
    positions=st.sampled_from(["all", "last"]),
)


@KINDS
@given(
    st.lists(INTERVENTIONS, min_size=1, max_size=6),
    st.lists(st.integers(1, T), min_size=1, max_size=3),
)
def test_any_list_of_ops_does_what_it_says(kind, interventions, lengths):
    lm, ids = tiny(kind), random_ids(len(lengths))
    codes, handles = {}, []
    with torch.no_grad():
        plain = lm(ids)
        record_codes(lm, "before", codes, handles)  # hooks run in the order in which they were set
        with steer(lm, interventions, lengths) as steering:
            record_codes(lm, "after", codes, handles)
            lm(ids)
        for handle in handles:
            handle.remove()
        for layer in range(2):
            expected = naive(codes[layer, "before"], layer, interventions, lengths)
            assert torch.equal(codes[layer, "after"], expected)
        counts = {"all": sum(lengths), "last": len(lengths)}
        assert steering.fired == [counts[change.positions] for change in interventions]
        assert torch.equal(lm(ids), plain)  # the hooks are removed


def test_padding_is_never_steered_and_changes_nothing():
    lm = tiny("crate")
    ids, lengths = random_ids(3), [4, 12, 7]
    for positions in ("all", "last"):
        change = Intervention(0, 5, "add", 2.0, positions)
        batch = run(lm, ids, change, lengths=lengths)
        for b, n in enumerate(lengths):
            alone = run(lm, ids[b : b + 1, :n], change)[0]
            torch.testing.assert_close(batch[b, :n], alone)


# ---- generation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "positions, first",
    [
        ("all", 4),
        ("last", 1),
        (torch.tensor([True, False, False, True]), 2),
        (torch.tensor([True, True, False, False]), 2),
    ],
)
@pytest.mark.parametrize("new", [5, 2 * T])
def test_generation_stays_steered_with_and_without_cache(lm, positions, first, new):
    """Steering does not silently end after the first new token.

    Beyond the window each pass counts all its tokens again.
    """
    ids = random_ids(2, 4)

    def text(use_cache=True):
        generator = torch.Generator().manual_seed(0)
        return generate(lm, ids, new, generator=generator, use_cache=use_cache)

    texts, fired = [], []
    for use_cache in (True, False):
        with steer(lm, [Intervention(0, 5, "add", 50.0, positions)]) as steering:
            texts.append(text(use_cache))
        fired += steering.fired
    assert torch.equal(*texts)
    if new == 5:
        on = isinstance(positions, str) or positions[-1].item()
        assert fired[0] == 2 * (first + (new - 1) * on)  # each token once, when it is read
        assert fired[1] == 2 * sum(first + k * on for k in range(new))
    if new > T and isinstance(positions, str):
        assert not torch.equal(text(), texts[0])


# ---- hooks ---------------------------------------------------------------------------------------


def test_hooks_are_removed_after_exceptions(lm):
    with torch.no_grad():
        plain = lm(random_ids())
        with (
            pytest.raises(ZeroDivisionError),
            steer(lm, [Intervention(0, 1, "add", 1.0)]),
            steer(lm, [Intervention(1, 2, "set", 1.0)]),
        ):
            lm(random_ids())
            raise ZeroDivisionError
        assert torch.equal(lm(random_ids()), plain)
    assert not has_hooks(lm)


@pytest.mark.parametrize("positions, passes", [("all", 0), (torch.zeros(T, dtype=torch.bool), 1)])
def test_an_intervention_that_never_fired_is_reported(lm, positions, passes):
    with torch.no_grad():
        plain = lm(random_ids())
        never = [Intervention(0, 1, "add", 1.0), Intervention(1, 1, "add", 1.0, positions)]
        with pytest.raises(UserError, match="never fired"), steer(lm, never):
            for _ in range(passes):
                lm(random_ids())
        assert torch.equal(lm(random_ids()), plain)
    assert not has_hooks(lm)


def test_a_hook_replaces_codes_and_the_identity_does_not(lm):
    with torch.no_grad():
        plain = lm(random_ids())
        for unchanged in (lambda codes: codes, lambda codes: None):
            with hook_codes(lm, 0, unchanged) as hook:
                assert torch.equal(lm(random_ids()), plain)
            assert hook.calls == 1
        with hook_codes(lm, 0, torch.zeros_like):
            assert not torch.equal(lm(random_ids()), plain)
        assert torch.equal(lm(random_ids()), plain)


@pytest.mark.parametrize("layer", [-1, 2, 1.0, "0"])
def test_a_hook_on_a_layer_that_does_not_exist_is_refused(layer):
    with (
        pytest.raises(UserError, match="does not exist; layers are 0 to 1 here"),
        hook_codes(tiny("crate"), layer, torch.zeros_like),
    ):
        pass


def test_a_hook_runs_outside_autocast(lm):
    enabled = []

    def look(codes):
        enabled.append(torch.is_autocast_enabled(codes.device.type))

    with torch.no_grad(), hook_codes(lm, 1, look), torch.autocast("cpu", torch.bfloat16):
        lm(random_ids())
        assert torch.is_autocast_enabled("cpu")
    assert enabled == [False]


# ---- features of an autoencoder ------------------------------------------------------------------


@pytest.mark.parametrize("k", [None, 4])
def test_sae_features_are_steered_in_the_reconstruction_or_on_top_of_the_codes(lm, k):
    sae, ids = SAE(H, 96, layer=0, k=k), random_ids()
    with torch.no_grad():
        sae.b += 0.1
        plain, codes = lm(ids), lm.trunk(ids)[1][0]
        feature = int(sae.encode(codes).mean((0, 1)).argmax())
        unchanged = Intervention(0, feature, "scale", 1, sae=sae)
        assert not torch.equal(run(lm, ids, unchanged), plain)  # the reconstruction replaces codes
        kept = Intervention(0, feature, "scale", 1, sae=sae, keep_error=True)
        assert torch.equal(run(lm, ids, kept), plain)
        for keep_error in (False, True):
            f = sae.encode(codes)
            f[..., feature] = 2.5
            expected = sae.decode(f)
            if keep_error:
                expected = expected + codes - sae.decode(sae.encode(codes))
            change = Intervention(0, feature, "set", 2.5, sae=sae, keep_error=keep_error)
            with steer(lm, [change]):
                torch.testing.assert_close(lm.trunk(ids)[1][0], expected)
        last = run(lm, ids, Intervention(0, feature, "set", 2.5, "last", sae=sae))
        assert torch.equal(last[:, :-1], plain[:, :-1])  # spliced in at the last token only
        assert not torch.equal(last[:, -1], plain[:, -1])


# ---- the next token ------------------------------------------------------------------------------


def scale_of_norm(z):
    """The divisor of a LayerNorm of z (.., d)."""
    return (z.var(-1, unbiased=False) + 1e-5).sqrt()


@KINDS
def test_direct_attribution_is_exact_up_to_the_final_norm_in_the_last_layer_only(kind):
    """Without the final norm's change of scale, the change of the logits is the direct effect.

    That holds however large the change is; one layer earlier it does not hold.
    """
    lm, ids = tiny(kind).double(), random_ids()
    errors = []
    with torch.no_grad():
        z, plain = stream(lm, ids)[0][:, -1], lm(ids)[:, -1]
        shift = 0 if lm.norm.bias is None else lm.norm.bias @ lm.tokens.weight.T
        for layer in range(2):
            neuron, _ = live_neuron(lm, layer, ids)
            with steer(lm, [Intervention(layer, neuron, "add", 5.0, "last")]):
                steered_z, steered = stream(lm, ids)[0][:, -1], lm(ids)[:, -1]
            growth = scale_of_norm(steered_z) / scale_of_norm(z)
            causal = (steered - shift) * growth[:, None] - (plain - shift)
            change = torch.zeros(2, H, dtype=torch.double)
            change[:, neuron] = 5.0
            direct = direct_effect(lm, z, layer, change)
            errors.append(((causal - direct).norm() / causal.norm()).item())
    assert errors[1] < 1e-12
    assert errors[0] > (0.05 if kind == "crate" else 0.005)


@pytest.mark.parametrize("layer", [0, 1])
def test_next_token_compares_two_runs(lm, layer):
    ids, lm = random_ids(1), lm.double()
    change = Intervention(layer, 5, "add", 3.0)
    result = next_token(lm, ids[0].tolist(), [change])
    with torch.no_grad():
        plain = lm(ids)[0, -1]
    steered = run(lm, ids, change)[0, -1]
    torch.testing.assert_close(result.before, plain.log_softmax(-1))
    torch.testing.assert_close(result.logits, steered - plain)
    rise = result.after.exp() - result.before.exp()
    assert result.most(3, 1) == rise.argsort(descending=True)[:3].tolist()
    lowered = result.most(V + 9, -1)
    assert len(lowered) == V and rise[lowered[0]] < 0
    kl = (result.before.exp() * (result.before - result.after)).sum().item()
    assert result.kl == pytest.approx(kl) and result.kl > 0
    assert (result.direct is not None) == (layer == 1)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(layer=2), "layer 2 does not exist; layers are 0 to 1 here"),
        (dict(layer=-1), "layer -1 does not exist"),
        (dict(neuron=H), f"neurons are 0 to {H - 1}"),
        (dict(neuron=1.0), "neuron 1.0 does not exist"),
        (dict(value=math.nan), "value nan is not a finite number"),
        (dict(value=math.inf), "not a finite"),
        (dict(value="2x"), "not a finite"),
        (dict(op="turn"), "set, scale, add, ablate"),
        (dict(positions="first"), "positions must be"),
        (dict(positions=torch.ones(T)), "positions must be"),
        (
            dict(positions=torch.ones(3, T, dtype=torch.bool)),
            "positions have 3 rows, the batch has 2",
        ),
        (dict(sae=SAE(H, 80, layer=1)), "is for layer 1"),
        (dict(sae=SAE(32, 80)), "32 codes, not for the 64"),
        (dict(sae=SAE(H, 80), neuron=80), "features are 0 to 79"),
    ],
)
def test_bad_interventions_are_refused_in_one_sentence(changes, message):
    lm = tiny("crate")
    change = Intervention(**{**dict(layer=0, neuron=0, value=1.0), **changes})
    with pytest.raises(UserError, match=message) as caught:
        run(lm, random_ids(), change)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    assert not has_hooks(lm)


def test_lengths_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="lengths have 3 rows"):
        run(tiny("crate"), random_ids(), Intervention(0, 0), lengths=[1, 2, 3])
