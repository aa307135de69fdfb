"""Sparse autoencoders: codes as asked for, splices without a trace, files and the command that makes them."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from saes import TEXT, identity, tiny

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import interpret  # noqa: E402
from crate_mini import UserError, cli
from crate_mini.data import batches as data
from crate_mini.sae import autoencoder as sae
from crate_mini.sae import train as sae_fit
from crate_mini.sae.autoencoder import SAE  # noqa: E402
from crate_mini.training import checkpoint  # noqa: E402

KINDS = ["crate", "gpt2", "crate+"]


@pytest.fixture
def ckpt(tmp_path, monkeypatch):
    """A checkpoint with a text beside it, as train.py would have left them."""
    monkeypatch.setenv("CRATE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(TEXT)
    tokenizer = data.load_tokenizer("bytes")
    own = data.open_corpus(str(tmp_path / "text.txt"), tokenizer, log=lambda *words: None)
    return saved(tmp_path / "run" / "best", tiny(), own.meta)


def saved(path, model, corpus_meta):
    text = str(path.parents[1] / "text.txt")
    checkpoint.save(
        path,
        model,
        tokenizer={"spec": "bytes", "hash": data.load_tokenizer("bytes").hash},
        training={
            "settings": {"data": text, "seed": 1, "val_fraction": 0.1},
            "corpus": corpus_meta,
        },
    )
    return str(path)


def tokens(seed=0, B=3, T=40):
    return torch.randint(0, 256, (B, T), generator=torch.Generator().manual_seed(seed))


# ---- the autoencoder -------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 20), st.data())
def test_topk_keeps_the_k_largest_that_are_positive(n, width, draw):
    k = draw.draw(st.integers(1, width))
    one = SAE(6, width, k=k, seed=n)
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(n + 31 * k))
    f, pre = one.encode(x), F.relu((x - one.b) @ one.E + one.c)
    assert torch.equal((f > 0).sum(1), (pre > 0).sum(1).clamp_max(k))
    assert torch.equal(f.sort(1).values[:, -k:], pre.sort(1).values[:, -k:])
    assert torch.equal(f[f > 0], pre[f > 0])


def test_topk_is_exactly_k_where_k_are_positive_even_if_all_are_equal():
    one = SAE(4, 12, k=5)
    with torch.no_grad():
        one.E.zero_()
        one.c.fill_(2.0)
    assert torch.equal((one.encode(torch.randn(7, 4)) > 0).sum(1), torch.full((7,), 5))


@given(st.floats(1e-3, 1e3), st.sampled_from([None, 3]))
def test_loss_and_features_scale_with_the_codes(scale, k):
    one = SAE(8, 16, k=k, l1=0.01).requires_grad_(False)
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(1)).abs()
    one.b.copy_(x.mean(0))
    loss, f = one.loss(x)
    one.b *= scale
    one.c *= scale
    scaled, g = one.loss(x * scale)
    assert scaled.item() == pytest.approx(loss.item() * scale, rel=1e-4)
    assert torch.allclose(g, f * scale, rtol=1e-3, atol=1e-5 * scale)


def test_loss_is_the_formula_and_silent_tokens_do_not_break_it():
    one = SAE(5, 7, l1=0.3).requires_grad_(False)
    x = torch.randn(20, 5).abs() + 0.5
    f = one.encode(x)
    error = ((x - one.decode(f)) ** 2).mean(1) / x.norm(dim=1)
    assert one.loss(x)[0].item() == pytest.approx((error + 0.3 * f.sum(1)).mean().item(), rel=1e-5)
    x[::2] = 0
    assert one.loss(x)[0].isfinite() and one.loss(x)[0] < 100


def test_name_tells_what_was_asked_for():
    assert [SAE(4, 16, l1=8e-5).name, SAE(4, 64, k=32).name] == ["x4-l1-8e-05", "x16-k32"]


# ---- splices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [0, 1])
@torch.no_grad()
def test_identity_changes_nothing_and_removal_restores(kind, layer):
    model, idx = tiny(kind), tokens()
    before = model(idx)
    with sae.splice(model, layer, identity(128)) as seen:
        assert torch.allclose(model(idx), before, atol=1e-5) and seen.hits == 1
    noisy = SAE(128, 256, layer, seed=3)
    with sae.splice(model, layer, noisy):
        assert not torch.allclose(model(idx), before, atol=1e-2)
    with sae.splice(model, layer, noisy, error=True):
        assert torch.equal(model(idx), before)
    with pytest.raises(ZeroDivisionError), sae.splice(model, layer, noisy):
        raise ZeroDivisionError
    assert torch.equal(model(idx), before)
    assert not model.blocks[layer].sparsifier.code._forward_hooks


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_spliced_codes_are_the_reconstruction_and_edits_are_decoded(kind):
    model, idx, one = tiny(kind), tokens(), SAE(128, 200, 1, k=9)
    codes = model.trunk(idx)[1][1]

    def edit(f):
        f = f.clone()
        f[:, 7] = 5.0
        return f

    with sae.splice(model, 1, one):
        assert torch.allclose(model.trunk(idx)[1][1], one.decode(one.encode(codes)), atol=1e-6)
    f = one.encode(codes)
    turned = one.decode(edit(f.flatten(0, 1))).view_as(codes)
    with sae.splice(model, 1, one, edit=edit):
        assert torch.allclose(model.trunk(idx)[1][1], turned, atol=1e-6)
    with sae.splice(model, 1, one, error=True, edit=edit):
        assert torch.allclose(model.trunk(idx)[1][1], codes + turned - one.decode(f), atol=1e-5)
    with sae.splice(model, 1, one, error=True, edit=lambda f: f):
        assert torch.equal(model.trunk(idx)[1][1], codes)


@torch.no_grad()
def test_splice_under_autocast_keeps_the_codes_dtype():
    model, idx = tiny(), tokens()
    with torch.autocast("cpu", torch.bfloat16), sae.splice(model, 0, SAE(128, 200, 0)):
        assert model.trunk(idx)[1][0].dtype == torch.bfloat16


def test_splices_that_cannot_be_are_refused():
    model = tiny()
    for layer, one, words in (
        (2, SAE(128, 8), "layer 2 is not there"),
        (-1, SAE(128, 8), "layer -1"),
        (0, SAE(64, 8), "for the 64 codes"),
        (0, SAE(128, 8, layer=1), "of layer 1"),
    ):
        with pytest.raises(UserError, match=words), sae.splice(model, layer, one):
            pass


# ---- files -----------------------------------------------------------------------------------------------


def test_saved_and_loaded_are_the_same_bit_for_bit(tmp_path):
    model, one = tiny(), SAE(128, 140, 1, k=5)
    facts = sae.save(tmp_path, one, model, {"seed": 3})
    path = tmp_path / "sae-L1-x1.09375-k5.json"
    for name in (path, str(path), path.with_suffix(".pt")):
        loaded, known = sae.load(name, model)
        assert known == facts == json.loads(path.read_text()) and not loaded.W.requires_grad
        x = torch.rand(30, 128)
        assert torch.equal(loaded.encode(x), one.encode(x)) and not loaded.encode(x).requires_grad
        assert loaded.layer == 1 and loaded.name == one.name


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda p: p.with_suffix(".pt").unlink(), "No such file"),
        (lambda p: p.with_suffix(".pt").write_bytes(b"x"), "damaged"),
        (
            lambda p: p.unlink(),
            "cannot be read as JSON: No such file or directory; expected what `python inter",
        ),
        (
            lambda p: p.write_text("{"),
            "cannot be read as JSON: Expecting .*; expected what `python interpret.py",
        ),
        (lambda p: p.write_text("[]"), "no JSON object"),
        (lambda p: p.write_text("{}"), "holds no sparse autoencoder"),
        (
            lambda p: p.write_text(p.read_text().replace('"width": 140', '"width": 141')),
            "holds no sparse",
        ),
        (lambda p: p.write_text(p.read_text().replace('"h": 128', '"h": "x"')), "holds no sparse"),
    ],
)
def test_damaged_files_are_told_in_one_sentence(harm, words, tmp_path):
    model = tiny()
    sae.save(tmp_path, SAE(128, 140, 0, l1=1e-3), model, {})
    path = next(tmp_path.glob("*.json"))
    harm(path)
    with pytest.raises(UserError, match=words) as told:
        sae.load(path, model)
    assert "\n" not in str(told.value)


def test_autoencoder_of_another_checkpoint_is_refused(tmp_path):
    sae.save(tmp_path, SAE(128, 140, 0, l1=1e-3), tiny(), {})
    with pytest.raises(UserError, match="another checkpoint"):
        sae.load(next(tmp_path.glob("*.json")), tiny(seed=1))
    assert sae.fingerprint(tiny()) != sae.fingerprint(tiny(seed=1))


# ---- the command -----------------------------------------------------------------------------------------

FLAGS = ["--expansion", "2", "--steps", "12", "--batch", "32", "--tokens", "300"]


def command(ckpt, *flags, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["interpret.py", "sae", ckpt, *flags])
    return interpret.main()


def test_command_writes_results_figure_and_all_of_the_folder(ckpt, monkeypatch, capsys):
    command(ckpt, *FLAGS, monkeypatch=monkeypatch)
    out = Path(ckpt).parent / "interpret"
    first = json.loads((out / "sae-L1.json").read_text())
    assert (
        len(first["saes"]) == 3 and first["formulas"] == sae_fit.FORMULAS and first["seed"] == 1337
    )
    assert "recovered" in capsys.readouterr().out
    assert (out / "sae-L1.png").read_bytes().startswith(b"\x89PNG")
    bytes_of = {p.name: p.read_bytes() for p in out.glob("*.pt")}
    command(ckpt, *FLAGS, "--k", "4,8", monkeypatch=monkeypatch)
    both = json.loads((out / "sae-L1.json").read_text())
    assert sorted(one["name"] for one in both["saes"]) == [
        "x2-k4",
        "x2-k8",
        "x2-l1-0.0001",
        "x2-l1-0.0002",
        "x2-l1-5e-05",
    ]
    l0 = [one["held_out"]["L0"] for one in both["saes"]]
    assert l0 == sorted(l0)
    command(ckpt, *FLAGS, monkeypatch=monkeypatch)  # the same seed: the same bytes
    assert all((out / name).read_bytes() == content for name, content in bytes_of.items())
    model, _ = checkpoint.load(ckpt)
    assert sae.load(out / "sae-L1-x2-k4.json", model)[1]["checkpoint"]["sha256"]


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--layer 2", "layer 2 is not there"),
        ("--layer -1", "layer -1 is not there"),
        ("--l1 nan", "--l1 'nan' is no list"),
        ("--l1 1e-4,", "is no list"),
        ("--l1 -1", "must not be below 0"),
        ("--k 0", "--k 0 must lie in 1 to 256"),
        ("--k 257", "must lie"),
        ("--k 2.5", "no list"),
        ("--k many", "no list"),
        ("--lr nan", "--lr nan must be above 0"),
        ("--steps 0", "--steps 0"),
        ("--expansion -3", "--expansion"),
        ("--batch 9999999", "--batch"),
        ("--lyer 1", "did you mean --layer"),
        ("--data nowhere.txt", "No corpus"),
        ("--device cuda:77", "not available"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(flags, words, ckpt, monkeypatch, capsys):
    with pytest.raises(SystemExit) as left:
        cli.run(lambda: command(ckpt, *FLAGS, *flags.split(), monkeypatch=monkeypatch))
    told = capsys.readouterr().err
    assert (
        left.value.code == 2
        and words in told
        and told.count("\n") == 1
        and told.startswith("error: ")
    )
