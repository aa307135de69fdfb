"""Sparse autoencoders: their formulas, splices that leave no trace, files that load back."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny_saes import H, identity, seeded, tiny_model

from crate_mini import UserError
from crate_mini.console import results
from crate_mini.sae import autoencoder
from crate_mini.sae.autoencoder import SAE
from crate_mini.training.import_weights import fingerprint

KINDS = ["crate", "gpt2", "crate+"]


def random_ids(B=3, T=40):
    return torch.randint(0, 256, (B, T), generator=seeded(0))


# ---- the formulas --------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 20), st.data())
def test_topk_keeps_the_k_largest_that_are_positive(n, width, data):
    k = data.draw(st.integers(1, width))
    sae = SAE(6, width, k=k, seed=n)
    x = torch.randn(n, 6, generator=seeded(n + 31 * k))
    f = sae.encode(x)
    pre_activations = F.relu((x - sae.b) @ sae.E + sae.c)
    assert torch.equal((f > 0).sum(1), (pre_activations > 0).sum(1).clamp_max(k))
    assert torch.equal(f.sort(1).values[:, -k:], pre_activations.sort(1).values[:, -k:])
    assert torch.equal(f[f > 0], pre_activations[f > 0])


def test_topk_keeps_exactly_k_even_if_all_features_are_equal():
    sae = SAE(4, 12, k=5)
    with torch.no_grad():
        sae.E.zero_()
        sae.c.fill_(2.0)
    active = (sae.encode(torch.randn(7, 4)) > 0).sum(1)
    assert torch.equal(active, torch.full((7,), 5))


@given(st.floats(1e-3, 1e3), st.sampled_from([None, 3]))
def test_loss_and_features_scale_with_the_codes(scale, k):
    sae = SAE(8, 16, k=k, l1=0.01).requires_grad_(False)
    x = torch.randn(50, 8, generator=seeded(1)).abs()
    sae.b.copy_(x.mean(0))
    loss, f = sae.loss(x)
    sae.b *= scale
    sae.c *= scale
    scaled_loss, scaled_f = sae.loss(x * scale)
    assert scaled_loss.item() == pytest.approx(loss.item() * scale, rel=1e-4)
    assert torch.allclose(scaled_f, f * scale, rtol=1e-3, atol=1e-5 * scale)


def test_the_loss_is_the_formula_and_survives_silent_tokens():
    sae = SAE(5, 7, l1=0.3).requires_grad_(False)
    x = torch.randn(20, 5).abs() + 0.5
    f = sae.encode(x)
    error = ((x - sae.decode(f)) ** 2).mean(1) / x.norm(dim=1)
    assert sae.loss(x)[0].item() == pytest.approx((error + 0.3 * f.sum(1)).mean().item(), rel=1e-5)
    x[::2] = 0
    assert sae.loss(x)[0].isfinite()
    assert sae.loss(x)[0] < 100


def test_the_name_tells_expansion_and_sparsity():
    assert SAE(4, 16, l1=8e-5).name == "x4-l1-8e-05"
    assert SAE(4, 64, k=32).name == "x16-k32"


# ---- splices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [0, 1])
@torch.no_grad()
def test_the_identity_changes_nothing_and_the_model_is_restored(kind, layer):
    model, ids = tiny_model(kind), random_ids()
    before = model(ids)
    with autoencoder.splice(model, layer, identity(H)) as hook:
        assert torch.allclose(model(ids), before, atol=1e-5)
        assert hook.calls == 1
    noisy = SAE(H, 256, layer, seed=3)
    with autoencoder.splice(model, layer, noisy):
        assert not torch.allclose(model(ids), before, atol=1e-2)
    with autoencoder.splice(model, layer, noisy, error=True):
        assert torch.equal(model(ids), before)
    with pytest.raises(ZeroDivisionError), autoencoder.splice(model, layer, noisy):
        raise ZeroDivisionError
    assert torch.equal(model(ids), before)
    assert not model.blocks[layer].sparsifier.code._forward_hooks


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_spliced_codes_are_the_reconstruction_and_edits_are_decoded(kind):
    model, ids = tiny_model(kind), random_ids()
    sae = SAE(H, 200, 1, k=9)

    def codes(**options):
        with autoencoder.splice(model, 1, sae, **options):
            return model.trunk(ids)[1][1]

    def steer(f):
        f = f.clone()
        f[:, 7] = 5.0
        return f

    def same(f):
        return f

    x = model.trunk(ids)[1][1]
    f = sae.encode(x)
    steered = sae.decode(steer(f.flatten(0, 1))).view_as(x)
    assert torch.allclose(codes(), sae.decode(f), atol=1e-6)
    assert torch.allclose(codes(edit=steer), steered, atol=1e-6)
    with_error = x + steered - sae.decode(f)
    assert torch.allclose(codes(error=True, edit=steer), with_error, atol=1e-5)
    assert torch.equal(codes(error=True, edit=same), x)


@torch.no_grad()
def test_a_splice_under_autocast_keeps_the_dtype_of_the_codes():
    model, ids = tiny_model(), random_ids()
    with torch.autocast("cpu", torch.bfloat16), autoencoder.splice(model, 0, SAE(H, 200, 0)):
        assert model.trunk(ids)[1][0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "layer, sae, words",
    [
        (2, SAE(H, 8), "layer 2 does not exist"),
        (-1, SAE(H, 8), "layer -1"),
        (0, SAE(64, 8), "for the 64 codes"),
        (0, SAE(H, 8, layer=1), "of layer 1"),
    ],
)
def test_an_autoencoder_that_does_not_fit_is_refused(layer, sae, words):
    with pytest.raises(UserError, match=words), autoencoder.splice(tiny_model(), layer, sae):
        pass


# ---- files ---------------------------------------------------------------------------------------


def test_saved_and_loaded_autoencoders_are_the_same_bit_for_bit(tmp_path):
    model, sae = tiny_model(), SAE(H, 140, 1, k=5)
    saved = autoencoder.save(tmp_path, sae, model, {"seed": 3})
    path = tmp_path / "sae-L1-x1.09375-k5.json"
    x = torch.rand(30, H)
    for name in (path, str(path), path.with_suffix(".pt")):
        loaded, facts = autoencoder.load(name, model)
        assert facts == saved == results.read_json(path)
        assert torch.equal(loaded.encode(x), sae.encode(x))
        assert not loaded.W.requires_grad
        assert not loaded.encode(x).requires_grad
        assert loaded.layer == 1
        assert loaded.name == sae.name


def remove_weights(path):
    path.with_suffix(".pt").unlink()


def damage_weights(path):
    path.with_suffix(".pt").write_bytes(b"x")


def replace(old, new):
    """A function that replaces a part of a JSON file, as an editor does: without its digest."""

    def edit(path):
        content = json.loads(path.read_text().replace(old, new))
        del content["digest"]
        path.write_text(json.dumps(content))

    return edit


def flip_a_digit(path):
    path.write_text(path.read_text().replace('"l1": 0.001', '"l1": 0.002'))


def overwrite(text):
    """A function that replaces a file."""

    def write(path):
        path.write_text(text)

    return write


@pytest.mark.parametrize(
    "harm, words",
    [
        (remove_weights, "No such file"),
        (damage_weights, "damaged"),
        (
            Path.unlink,
            "cannot be read as JSON: No such file or directory; expected a file that `python inter",
        ),
        (
            overwrite("{"),
            "cannot be read as JSON: Expecting .*; expected a file that `python interpret.py",
        ),
        (overwrite("[]"), "no JSON object"),
        (overwrite("{}"), "does not describe a sparse autoencoder"),
        (replace('"width": 140', '"width": 141'), "does not describe a sparse"),
        (replace('"h": 128', '"h": "x"'), "does not describe a sparse"),
        (replace('"h": 128', '"h": 1e12'), "does not describe a sparse"),
        (replace('"h": 128', '"h": 1000000000000'), "does not describe a sparse"),
        (replace('"layer": 0', '"layer": "0"'), "does not describe a sparse"),
        (replace('"layer": 0', '"layer": [0]'), "does not describe a sparse"),
        (replace('"k": null', '"k": 141'), "does not describe a sparse"),
        (replace('"l1": 0.001', '"l1": {}'), "does not describe a sparse"),
        (replace('"l1": 0.001', '"l1": true'), "does not describe a sparse"),
        (flip_a_digit, "its digest does not fit"),
    ],
)
def test_damaged_files_are_reported_in_one_sentence(harm, words, tmp_path):
    model = tiny_model()
    autoencoder.save(tmp_path, SAE(H, 140, 0, l1=1e-3), model, {})
    path = next(tmp_path.glob("*.json"))
    harm(path)
    with pytest.raises(UserError, match=words) as error:
        autoencoder.load(path, model)
    assert "\n" not in str(error.value)


def test_an_autoencoder_of_another_checkpoint_is_refused(tmp_path):
    autoencoder.save(tmp_path, SAE(H, 140, 0, l1=1e-3), tiny_model(), {})
    with pytest.raises(UserError, match="another checkpoint"):
        autoencoder.load(next(tmp_path.glob("*.json")), tiny_model(seed=1))
    assert fingerprint(tiny_model()) != fingerprint(tiny_model(seed=1))
