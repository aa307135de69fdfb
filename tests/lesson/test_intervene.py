"""Interventions: what they change and, to the bit, what they do not; that they fired, and that they left."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_generate import T, V, tiny

from crate_mini import UserError, model, ops
from crate_mini.intervene import OPS, Intervention, atoms, random_like, steer
from crate_mini.sae.autoencoder import SAE
from crate_mini.steering.next_token import direct_effect, next_token, stream

H = 64
KINDS = pytest.mark.parametrize("kind", model.KINDS)


@pytest.fixture(params=model.KINDS)
def lm(request):
    return tiny(request.param)


def ids(rows=2, length=T, seed=1):
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(lm, idx, *interventions, **kwargs):
    with steer(lm, interventions, **kwargs):
        return lm(idx)


def alive(lm, layer, idx):
    """A neuron that fires at most tokens, and its codes (B, T, h)."""
    with torch.no_grad():
        a = lm.trunk(idx)[1][layer]
    return int((a > 0).float().mean((0, 1)).argmax()), a


def test_ablating_a_dead_neuron_changes_nothing_exactly(lm):
    s = lm.blocks[1].sparsifier
    with torch.no_grad():
        (s.fc.weight[7] if hasattr(s, "fc") else s.D[:, 7]).zero_()
        plain = lm(ids())
    assert torch.equal(run(lm, ids(), Intervention(1, 7, "ablate")), plain)
    j, _ = alive(lm, 1, ids())
    assert not torch.equal(run(lm, ids(), Intervention(1, j, "ablate")), plain)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_no_change_is_the_identity_bitwise(lm, backend):
    with ops.use_backend(backend), torch.no_grad():
        idx = ids(3)
        plain = lm(idx)
        j, a = alive(lm, 0, idx)
        for change in (
            Intervention(0, j, "scale", 1),
            Intervention(0, j, "add", 0.0),
            Intervention(0, j, "set", a[1, 4, j].item(), at(1, 4)),
        ):
            assert torch.equal(run(lm, idx, change), plain)


def at(row, column, rows=3):
    mask = torch.zeros(rows, T, dtype=torch.bool)
    mask[row, column] = True
    return mask


def test_set_on_all_positions_is_set_on_each(lm):
    j, _ = alive(lm, 0, ids(3))
    each = [Intervention(0, j, "set", 1.5, at(b, t)) for b in range(3) for t in range(T)]
    assert torch.equal(run(lm, ids(3), Intervention(0, j, "set", 1.5)), run(lm, ids(3), *each))


def test_additions_commute(lm):
    x, y, same = (Intervention(0, j, "add", v) for j, v in ((3, 2.0), (9, -0.5), (3, 0.25)))
    assert torch.equal(run(lm, ids(), x, y), run(lm, ids(), y, x))
    torch.testing.assert_close(
        run(lm, ids(), x, same), run(lm, ids(), Intervention(0, 3, "add", 2.25))
    )
    with steer(lm, [x]):  # and blocks nest: composition in other words
        nested = run(lm, ids(), y)
    assert torch.equal(nested, run(lm, ids(), x, y))


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_one_row_steered_leaves_the_others_their_bits(lm, backend):
    with ops.use_backend(backend), torch.no_grad():
        j, _ = alive(lm, 0, ids(3))
        plain, row = lm(ids(3)), torch.tensor([[False], [True], [False]])
        steered = run(lm, ids(3), Intervention(0, j, "set", 4.0, row))
    assert torch.equal(steered[[0, 2]], plain[[0, 2]]) and not torch.equal(steered[1], plain[1])


def test_earlier_tokens_never_see_it(lm):
    with torch.no_grad():
        plain = lm(ids(3))
    steered = run(lm, ids(3), Intervention(0, 5, "add", 3.0, at(1, 6)))
    assert torch.equal(steered[1, :6], plain[1, :6]) and not torch.equal(
        steered[1, 6:], plain[1, 6:]
    )


def naive(a, layer, interventions, lengths):
    """Every op on every token, one by one, as the docstrings say."""
    a = a.clone()
    for i in (i for i in interventions if i.layer == layer):
        for b in range(a.shape[0]):
            for t in range(lengths[b]):
                if i.positions == "all" or i.positions == "last" and t == lengths[b] - 1:
                    old = a[b, t, i.neuron]
                    a[b, t, i.neuron] = {
                        "set": i.value,
                        "add": old + i.value,
                        "scale": old * i.value,
                        "ablate": 0.0,
                    }[i.op]
    return a


@KINDS
@given(
    st.lists(
        st.builds(
            Intervention,
            layer=st.integers(0, 1),
            neuron=st.integers(0, 3),
            op=st.sampled_from(OPS),
            value=st.floats(-4, 4, width=16),
            positions=st.sampled_from(["all", "last"]),
        ),
        min_size=1,
        max_size=6,
    ),
    st.lists(st.integers(1, T), min_size=1, max_size=3),
)
def test_any_list_of_ops_does_what_it_says(kind, interventions, lengths):
    lm, idx = tiny(kind), ids(len(lengths))
    seen, handles = {}, []

    def watch(when):
        for layer, block in enumerate(lm.blocks):

            def look(module, args, a, layer=layer):
                seen[layer, when] = a

            handles.append(block.sparsifier.code.register_forward_hook(look))

    with torch.no_grad():
        plain = lm(idx)
        watch("before")  # hooks run in the order of their making
        with steer(lm, interventions, lengths) as steering:
            watch("after")
            lm(idx)
        for handle in handles:
            handle.remove()
        for layer in range(2):
            want = naive(seen[layer, "before"], layer, interventions, lengths)
            assert torch.equal(seen[layer, "after"], want)
        assert steering.fired == [
            sum(lengths) if i.positions == "all" else len(lengths) for i in interventions
        ]
        assert torch.equal(lm(idx), plain)  # it left


def test_padding_is_never_steered_and_changes_nothing():
    lm = tiny("crate")
    idx, lengths = ids(3), [4, 12, 7]
    for where in ("all", "last"):
        change = Intervention(0, 5, "add", 2.0, where)
        batch = run(lm, idx, change, lengths=lengths)
        for b, n in enumerate(lengths):
            torch.testing.assert_close(batch[b, :n], run(lm, idx[b : b + 1, :n], change)[0])


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
    """No silent end after the first new token; beyond the window each pass counts all its tokens again."""
    idx, texts, fired = ids(2, 4), [], []
    for cache in (True, False):
        with steer(lm, [Intervention(0, 5, "add", 50.0, positions)]) as steering:
            texts.append(
                lm.generate(idx, new, generator=torch.Generator().manual_seed(0), cache=cache)
            )
        fired += steering.fired
    assert torch.equal(*texts)
    if new == 5:
        on = isinstance(positions, str) or positions[-1].item()
        assert fired[0] == 2 * (first + (new - 1) * on)  # each token once, as it is read
        assert fired[1] == 2 * sum(first + k * on for k in range(new))
    if new > T and isinstance(positions, str):
        plain = lm.generate(idx, new, generator=torch.Generator().manual_seed(0))
        assert not torch.equal(plain, texts[0])


def test_it_leaves_on_exceptions_and_says_when_it_never_fired(lm):
    with torch.no_grad():
        plain = lm(ids())
        with (
            pytest.raises(ZeroDivisionError),
            steer(lm, [Intervention(0, 1, "add", 1.0)]),
            steer(lm, [Intervention(1, 2, "set", 1.0)]),
        ):
            lm(ids())
            raise ZeroDivisionError
        assert torch.equal(lm(ids()), plain)
        for positions, passes in (("all", 0), (torch.zeros(T, dtype=torch.bool), 1)):
            never = [Intervention(0, 1, "add", 1.0), Intervention(1, 1, "add", 1.0, positions)]
            with pytest.raises(UserError, match="never fired"), steer(lm, never):
                for _ in range(passes):
                    lm(ids())
        assert torch.equal(lm(ids()), plain) and not any(
            b.sparsifier.code._forward_hooks for b in lm.blocks
        )


@pytest.mark.parametrize("k", [None, 4])
def test_sae_features_are_turned_in_the_reconstruction_or_on_top_of_the_codes(lm, k):
    sae, idx = SAE(H, 96, layer=0, k=k), ids()
    with torch.no_grad():
        sae.b += 0.1
        plain, a = lm(idx), lm.trunk(idx)[1][0]
        j = int(sae.encode(a).mean((0, 1)).argmax())
        spliced = run(lm, idx, Intervention(0, j, "scale", 1, sae=sae))  # zero dose: x' for x
        assert not torch.equal(spliced, plain)
        assert torch.equal(
            run(lm, idx, Intervention(0, j, "scale", 1, sae=sae, keep_error=True)), plain
        )
        for keep_error in (False, True):
            f = sae.encode(a)
            f[..., j] = 2.5
            want = sae.decode(f) + (a - sae.decode(sae.encode(a)) if keep_error else 0)
            with steer(lm, [Intervention(0, j, "set", 2.5, sae=sae, keep_error=keep_error)]):
                torch.testing.assert_close(lm.trunk(idx)[1][0], want)
        last = run(
            lm, idx, Intervention(0, j, "set", 2.5, "last", sae=sae)
        )  # spliced in there only
        assert torch.equal(last[:, :-1], plain[:, :-1]) and not torch.equal(
            last[:, -1], plain[:, -1]
        )


def test_random_directions_move_the_stream_as_far(lm):
    j, a = alive(lm, 1, ids())
    change = Intervention(1, j, "set", 2.0)
    control = random_like(change, lm, torch.Generator().manual_seed(0))
    where = torch.ones(2, T, dtype=torch.bool)
    with torch.no_grad():
        moved = [(i.turn(a, where) - a) @ atoms(lm, 1).T for i in (change, control)]
    torch.testing.assert_close(moved[0].norm(dim=-1), moved[1].norm(dim=-1))
    assert torch.nn.functional.cosine_similarity(*moved, dim=-1).abs().max() < 0.9
    again = random_like(change, lm, torch.Generator().manual_seed(0))
    assert torch.equal(control.along, again.along)


@KINDS
def test_direct_attribution_is_exact_up_to_the_final_norm_in_the_last_layer_only(kind):
    """Undo the norm's scale of the steered run, and the change of the logits is the direct effect, however
    large; one layer earlier it is not."""
    lm, idx, off = tiny(kind).double(), ids(), []
    with torch.no_grad():
        z, plain = stream(lm, idx)[0][:, -1], lm(idx)[:, -1]
        shift = 0 if lm.norm.bias is None else lm.norm.bias @ lm.tokens.weight.T
        for layer in range(2):
            j, _ = alive(lm, layer, idx)
            with steer(lm, [Intervention(layer, j, "add", 5.0, "last")]):
                turned, after = stream(lm, idx)[0][:, -1], lm(idx)[:, -1]
            grown = (
                (turned.var(-1, unbiased=False) + 1e-5) / (z.var(-1, unbiased=False) + 1e-5)
            ).sqrt()
            causal = (after - shift) * grown[:, None] - (plain - shift)
            change = torch.zeros(2, H, dtype=torch.double)
            change[:, j] = 5.0
            off.append(
                ((causal - direct_effect(lm, z, layer, change)).norm() / causal.norm()).item()
            )
    assert off[1] < 1e-12 and off[0] > (0.05 if kind == "crate" else 0.005)


def test_next_token_compares_two_runs(lm):
    prompt, lm = ids(1)[0].tolist(), lm.double()
    for layer in range(2):
        change = Intervention(layer, 5, "add", 3.0)
        n = next_token(lm, prompt, [change])
        with torch.no_grad():
            plain, turned = (f[0, -1] for f in (lm(ids(1)), run(lm, ids(1), change)))
        torch.testing.assert_close(n.before, plain.log_softmax(-1))
        torch.testing.assert_close(n.logits, turned - plain)
        up, down = n.most(3, 1), n.most(V + 9, -1)
        moved = n.after.exp() - n.before.exp()
        assert (
            up == moved.argsort(descending=True)[:3].tolist()
            and len(down) == V
            and moved[down[0]] < 0
        )
        assert (
            n.kl == pytest.approx((n.before.exp() * (n.before - n.after)).sum().item()) and n.kl > 0
        )
        assert (n.direct is not None) == (layer == 1)


@pytest.mark.parametrize(
    "changes, told",
    [
        (dict(layer=2), "layer 2 does not exist; layers are 0 to 1 here"),
        (dict(layer=-1), "layer -1 does not exist"),
        (dict(neuron=H), f"neurons are 0 to {H - 1}"),
        (dict(neuron=1.0), "neuron 1.0 does not exist"),
        (dict(value=math.nan), "value nan is no finite number"),
        (dict(value=math.inf), "no finite"),
        (dict(value="2x"), "no finite"),
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
def test_bad_interventions_are_refused_in_one_sentence(changes, told):
    lm = tiny("crate")
    with pytest.raises(UserError, match=told) as e:
        run(lm, ids(), Intervention(**{**dict(layer=0, neuron=0, value=1.0), **changes}))
    assert str(e.value).endswith(".") and "\n" not in str(e.value)
    assert not any(b.sparsifier.code._forward_hooks for b in lm.blocks)


def test_lengths_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="lengths have 3 rows"):
        run(tiny("crate"), ids(), Intervention(0, 0), lengths=[1, 2, 3])
