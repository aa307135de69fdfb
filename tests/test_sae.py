"""Sparse autoencoders: planted features found, formulas that mean what they say, splices without a trace."""

import json
import math
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import interpret  # noqa: E402
from crate_mini import UserError, checkpoint, cli, data, sae, sae_fit  # noqa: E402
from crate_mini.model import LM, preset  # noqa: E402
from crate_mini.sae import SAE  # noqa: E402

KINDS = ["crate", "gpt2", "crate+"]
TEXT = " ".join(f"{'abc'[i % 3]}{i * i % 97} sparse{i % 7} code." for i in range(3000))


def tiny(kind="crate", seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LM(preset("2L", kind, vocab_size=320, block_size=64, n_embd=32)).eval()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text(TEXT)
    return data.open_corpus(str(folder / "text.txt"), data.load_tokenizer("bytes"), folder / "cache",
                            log=lambda *words: None)


@pytest.fixture
def ckpt(tmp_path, corpus, monkeypatch):
    """A checkpoint with a text beside it, as train.py would have left them."""
    monkeypatch.setenv("CRATE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(TEXT)
    tokenizer = data.load_tokenizer("bytes")
    own = data.open_corpus(str(tmp_path / "text.txt"), tokenizer, log=lambda *words: None)
    return saved(tmp_path / "run" / "best", tiny(), own.meta)


def saved(path, model, corpus_meta):
    text = str(path.parents[1] / "text.txt")
    checkpoint.save(path, model, tokenizer={"spec": "bytes", "hash": data.load_tokenizer("bytes").hash},
                    training={"settings": {"data": text, "seed": 1, "val_fraction": 0.1},
                              "corpus": corpus_meta})
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


# ---- training --------------------------------------------------------------------------------------------

def planted(seed=0, h=24, width=32, active=2):
    """Endless batches of sparse non-negative mixtures of unit rows, and the rows."""
    draw = torch.Generator().manual_seed(seed)
    rows = F.normalize(torch.randn(width, h, generator=draw), dim=1)

    def batches():
        while True:
            f = torch.rand(256, width, generator=draw) + 0.5
            keep = torch.rand(256, width, generator=draw).topk(active, 1).indices
            yield torch.zeros_like(f).scatter(1, keep, f.gather(1, keep)) @ rows
    return batches(), rows


@pytest.mark.parametrize("kind", [{"l1": 8e-3}, {"k": 2}])
def test_planted_dictionary_is_recovered(kind):
    batches, rows = planted()
    one = SAE(24, 64, seed=1, **kind)
    before = (rows @ one.W.detach().T).max(1).values.mean()
    sae_fit.fit([one], batches, 1200, 3e-3)
    met, x = sae_fit.Agreement(), next(batches)
    f = one.encode(x).detach()
    met.add(x, one.decode(f).detach())
    found = (rows @ one.W.detach().T).max(1).values
    assert before < 0.7 and (found > 0.9).double().mean() >= 0.9, found.sort().values
    assert met.explained_variance() > 0.9 and (f > 0.05).sum(1).double().mean() < 4


def test_rows_keep_norm_one():
    batches, _ = planted()
    one = SAE(24, 48, l1=1e-3)
    optimizer = torch.optim.Adam(one.parameters(), 1e-2)
    for _ in range(20):
        sae_fit.one_step(one, optimizer, next(batches), 1e-2)
        assert torch.allclose(one.W.norm(dim=1), torch.ones(48), atol=1e-6)


def test_gradient_is_projected_before_the_optimizer_sees_it():
    batches, _ = planted()
    one, seen = SAE(24, 48, l1=1e-3), []
    rows = one.W.detach().clone()
    optimizer = torch.optim.SGD(one.parameters(), 0.0)
    step = optimizer.step
    optimizer.step = lambda: (seen.append((one.W.grad * rows).sum(1).abs().max().item()), step())
    sae_fit.one_step(one, optimizer, next(batches), 0.0)
    assert seen[0] < 1e-5 * one.W.grad.norm(dim=1).max()


def test_resampling_revives_dead_features_and_only_them():
    batches, _ = planted()
    x, one = next(batches), SAE(24, 40, l1=1e-3)
    optimizer = torch.optim.Adam(one.parameters(), 1e-3)
    sae_fit.one_step(one, optimizer, x, 1e-3)
    dead = torch.arange(40) % 3 == 0
    with torch.no_grad():
        one.c[dead] = -100.0
    assert not (one.encode(x)[:, dead] > 0).any()
    old = {name: w.detach().clone() for name, w in one.state_dict().items()}
    assert sae_fit.resample(one, optimizer, x, dead, torch.Generator().manual_seed(0)) == int(dead.sum())
    assert (one.encode(x)[:, dead] > 0).any(0).all() and torch.allclose(one.W.norm(dim=1), torch.ones(40))
    assert torch.equal(one.b, old["b"]) and torch.equal(one.c[~dead], old["c"][~dead])
    assert torch.equal(one.W[~dead], old["W"][~dead]) and torch.equal(one.E[:, ~dead], old["E"][:, ~dead])
    moments = optimizer.state[one.W]["exp_avg"], optimizer.state[one.E]["exp_avg_sq"].T
    assert all((m[dead] == 0).all() and (m[~dead] != 0).any() for m in moments)


def test_resampling_prefers_what_is_badly_explained_and_stops_at_the_number_of_inputs():
    one = SAE(6, 30, l1=1e-3).requires_grad_(False)
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    one.E.zero_()
    x = torch.zeros(10, 6)                                       # nothing fires, x' = 0
    x[3] = torch.tensor([0.0, 0, 5, 0, 0, 0])
    dead = torch.ones(30, dtype=torch.bool)
    assert sae_fit.resample(one, optimizer, x, dead, torch.Generator().manual_seed(0)) == 1
    assert torch.allclose(one.W[0], F.normalize(x[3], dim=0))
    assert sae_fit.resample(one, optimizer, torch.zeros(4, 6), dead, torch.Generator()) == 0


def test_dead_features_of_a_run_are_resampled_and_counted():
    batches, _ = planted()
    one = SAE(24, 40, k=2)
    with torch.no_grad():
        one.c[:30] = -1e3           # the ten that are left cannot do the work of 32
    assert sae_fit.fit([one], batches, 300, 3e-3)[0] >= 30
    assert (one.encode(next(batches))[:, :30] > 0).any(0).sum() > 10      # without: none


@pytest.mark.parametrize("bad", [torch.zeros(64, 8), torch.ones(64, 8)])
def test_codes_that_never_vary_are_refused(bad):
    with pytest.raises(UserError, match="dead layer"):
        sae_fit.fit([SAE(8, 16, 0)], iter([bad] * 9), 5, 1e-3)


def test_divergence_is_told():
    with pytest.raises(UserError, match="diverged; try a lower --lr"):
        sae_fit.fit([SAE(24, 48, 0, l1=1e-3)], planted()[0], 60, 1e30)


def test_stream_covers_the_training_split_once_per_window_and_is_deterministic(corpus, monkeypatch):
    model, taken = tiny(), []
    monkeypatch.setattr(sae_fit, "BUFFER", (1000, 2 ** 27))
    real = corpus.batch
    spy = SimpleNamespace(n_tokens=corpus.n_tokens,
                          batch=lambda seed, split, *rest: taken.append(split) or real(seed, split, *rest))
    first, again, other = ([next(batches) for _ in range(60)] for batches in (
        sae_fit.stream(model, spy, 1, 100, 5), sae_fit.stream(model, corpus, 1, 100, 5),
        sae_fit.stream(model, corpus, 1, 100, 6)))
    assert set(taken) == {"train"} and all(x.shape == (100, 128) for x in first)
    assert all(torch.equal(a, b) for a, b in zip(first, again)) and not torch.equal(first[0], other[0])
    with torch.no_grad():
        rows = torch.cat([model.trunk(real(5, "train", step, 32, 64)[0])[1][1].flatten(0, 1)
                          for step in range(len(taken))])
    recorded, handed = (Counter(row.tobytes() for row in x.numpy()) for x in (rows, torch.cat(first)))
    assert handed <= recorded           # none that was not recorded, none twice
    early = Counter(row.tobytes() for row in rows[:2048].numpy())
    assert early - Counter(row.tobytes() for row in first[0].numpy()) and (handed & early).total() > 1500


def test_training_is_deterministic_and_leaves_the_global_generator_alone(corpus, monkeypatch):
    monkeypatch.setattr(sae_fit, "BUFFER", (2000, 2 ** 27))
    model, found, state = tiny(), [], torch.get_rng_state()
    for _ in range(2):
        saes = [SAE(128, 160, 0, l1=1e-4), SAE(128, 160, 0, k=4)]
        sae_fit.fit(saes, sae_fit.stream(model, corpus, 0, 64, 3), 30, 1e-3)
        found.append(torch.cat([w.flatten() for one in saes for w in one.state_dict().values()]))
    assert torch.equal(*found) and torch.equal(state, torch.get_rng_state())


# ---- the formulas ----------------------------------------------------------------------------------------

CUTS = st.lists(st.integers(1, 59), max_size=5)


def agreement(x, y, cuts=()):
    met = sae_fit.Agreement()
    for a, b in zip(torch.tensor_split(x, cuts), torch.tensor_split(y, cuts)):
        if len(a):
            met.add(a, b)
    return met


def sample(seed, n=60, h=5):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, h, generator=draw, dtype=torch.float64) + 1
    return x, x + 0.5 * torch.randn(n, h, generator=draw, dtype=torch.float64)


@given(st.integers(0, 99), st.floats(-1e4, 1e4), st.floats(1e-3, 1e3), CUTS)
def test_explained_variance_means_what_it_says(seed, shift, scale, cuts):
    x, y = sample(seed)
    want = 1 - ((x - y) ** 2).sum().item() / ((x - x.mean(0)) ** 2).sum().item()
    assert agreement(x, y, sorted(cuts)).explained_variance() == pytest.approx(want, abs=1e-9)
    moved = agreement(x * scale + shift, y * scale + shift, sorted(cuts)).explained_variance()
    assert moved == pytest.approx(want, abs=1e-6)
    assert agreement(x, x, cuts).explained_variance() == 1
    mean = x.mean(0).expand_as(x)
    assert agreement(x, mean, sorted(cuts)).explained_variance() == pytest.approx(0, abs=1e-9)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    assert agreement(x[order], y[order]).explained_variance() == pytest.approx(want, abs=1e-9)


@given(st.integers(0, 99), st.floats(1e-3, 1e3), CUTS)
def test_cosine_and_mean(seed, scale, cuts):
    x, y = sample(seed)
    x[::7] = 0
    met = agreement(x, y * scale, sorted(cuts))
    some = x.any(1)
    want = ((x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1)))[some].mean().item()
    assert met.cosine() == pytest.approx(want, abs=1e-9) and torch.allclose(met.mean, x.mean(0))
    assert agreement(x, -x).cosine() == pytest.approx(-1)


def test_what_is_undefined_is_none():
    same = torch.ones(4, 3)
    assert agreement(same, same * 2).explained_variance() is None
    assert agreement(same * 0, same).cosine() is None
    assert sae_fit.recovered(sae=3.0, model=2.0, ablated=2.0) is None
    assert sae_fit.recovered(sae=3.0, model=2.0, ablated=6.0) == 0.75


# ---- splices ---------------------------------------------------------------------------------------------

def identity(h):
    """An autoencoder that gives non-negative codes back exactly."""
    one = SAE(h, h).requires_grad_(False)
    one.W.copy_(torch.eye(h))
    one.E.copy_(torch.eye(h))
    return one


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
    for layer, one, words in ((2, SAE(128, 8), "layer 2 is not there"), (-1, SAE(128, 8), "layer -1"),
                              (0, SAE(64, 8), "for the 64 codes"), (0, SAE(128, 8, layer=1), "of layer 1")):
        with pytest.raises(UserError, match=words), sae.splice(model, layer, one):
            pass


# ---- judging ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["crate", "gpt2"])
@torch.no_grad()
def test_evaluation_equals_brute_force(kind, corpus, monkeypatch):
    monkeypatch.setattr(sae_fit, "ROWS", 50)
    model, layer, limit = tiny(kind), 1, 500
    saes = [SAE(128, 160, layer, l1=0.1), SAE(128, 160, layer, k=3, seed=2)]
    saes[1].c[::2] = -1e3
    found = sae_fit.evaluate(model, corpus, layer, saes, limit, batch=3)
    ids = torch.cat([y.flatten() for _, y in corpus.blocks("val", 4, 64)])
    ids = torch.cat([next(iter(corpus.blocks("val", 1, 64)))[0][0, :1], ids])
    windows = [(ids[i:i + 64], ids[i + 1:i + 65]) for i in range(0, limit, 64)]
    windows[-1] = tuple(part[:limit % 64] for part in windows[-1])
    codes = torch.cat([model.trunk(x[None])[1][layer][0] for x, _ in windows]).double()

    def loss(replace):
        handle = model.blocks[layer].sparsifier.code.register_forward_hook(lambda m, i, a: replace(a))
        total = sum(F.cross_entropy(model(x[None])[0], y, reduction="sum").item() for x, y in windows)
        handle.remove()
        return total / limit

    mean = codes.mean(0)
    ablated = {"zero": loss(torch.zeros_like), "mean": loss(lambda a: mean.float().expand_as(a))}
    base = loss(lambda a: None)
    for one, result in zip(saes, found):
        f = one.encode(codes.float())
        y = one.decode(f).double()
        spliced = loss(lambda a, one=one: one.decode(one.encode(a)))
        want = {"sae": spliced, "model": base, **ablated}
        assert result["loss"] == pytest.approx(want, abs=1e-5)
        assert result["L0"] == pytest.approx((f > 0).sum(1).double().mean().item())
        assert result["dead"] == pytest.approx((f == 0).all(0).double().mean().item())
        assert result["explained_variance"] == pytest.approx(
            (1 - (codes - y).square().sum() / (codes - mean).square().sum()).item(), abs=1e-5)
        assert result["cosine"] == pytest.approx(F.cosine_similarity(codes, y).mean().item(), abs=1e-5)
        loss_of = result["loss"]
        for name in ablated:
            harm = loss_of[name] - loss_of["model"]
            share = (loss_of[name] - loss_of["sae"]) / harm if harm > 0 else None
            assert result["recovered"][name] == (share and pytest.approx(share))
    assert found[1]["L0"] <= 3 and found[1]["dead"] >= 0.5
    assert sae_fit.evaluate(model, corpus, layer, [identity(128)], limit)[0]["explained_variance"] \
        == pytest.approx(1, abs=1e-9)


def test_broken_weights_are_told(corpus):
    model = tiny()
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    with pytest.raises(UserError, match="loss .model. is nan"):
        sae_fit.evaluate(model, corpus, 0, [SAE(128, 130, 0)], 100)
    with torch.no_grad():
        model.blocks[0].sparsifier.D[0, 0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        next(sae_fit.stream(model, corpus, 1, 10, 0))


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


@pytest.mark.parametrize("harm, words", [
    (lambda p: p.with_suffix(".pt").unlink(), "No such file"),
    (lambda p: p.with_suffix(".pt").write_bytes(b"x"), "damaged"),
    (lambda p: p.unlink(), "cannot be read as JSON: No such file or directory; expected what `python inter"),
    (lambda p: p.write_text("{"), "cannot be read as JSON: Expecting .*; expected what `python interpret.py"),
    (lambda p: p.write_text("[]"), "no JSON object"),
    (lambda p: p.write_text("{}"), "holds no sparse autoencoder"),
    (lambda p: p.write_text(p.read_text().replace('"width": 140', '"width": 141')), "holds no sparse"),
    (lambda p: p.write_text(p.read_text().replace('"h": 128', '"h": "x"')), "holds no sparse")])
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
    assert len(first["saes"]) == 3 and first["formulas"] == sae_fit.FORMULAS and first["seed"] == 1337
    assert "recovered" in capsys.readouterr().out
    assert (out / "sae-L1.png").read_bytes().startswith(b"\x89PNG")
    bytes_of = {p.name: p.read_bytes() for p in out.glob("*.pt")}
    command(ckpt, *FLAGS, "--k", "4,8", monkeypatch=monkeypatch)
    both = json.loads((out / "sae-L1.json").read_text())
    assert sorted(one["name"] for one in both["saes"]) == \
        ["x2-k4", "x2-k8", "x2-l1-0.0001", "x2-l1-0.0002", "x2-l1-5e-05"]
    l0 = [one["held_out"]["L0"] for one in both["saes"]]
    assert l0 == sorted(l0)
    command(ckpt, *FLAGS, monkeypatch=monkeypatch)              # the same seed: the same bytes
    assert all((out / name).read_bytes() == content for name, content in bytes_of.items())
    model, _ = checkpoint.load(ckpt)
    assert sae.load(out / "sae-L1-x2-k4.json", model)[1]["checkpoint"]["sha256"]


@pytest.mark.parametrize("flags, words", [
    ("--layer 2", "layer 2 is not there"), ("--layer -1", "layer -1 is not there"),
    ("--l1 nan", "--l1 'nan' is no list"), ("--l1 1e-4,", "is no list"), ("--l1 -1", "must not be below 0"),
    ("--k 0", "--k 0 must lie in 1 to 256"), ("--k 257", "must lie"), ("--k 2.5", "no list"),
    ("--k many", "no list"), ("--lr nan", "--lr nan must be above 0"), ("--steps 0", "--steps 0"),
    ("--expansion -3", "--expansion"), ("--batch 9999999", "--batch"), ("--lyer 1", "did you mean --layer"),
    ("--data nowhere.txt", "No corpus"), ("--device cuda:77", "not available")])
def test_bad_input_is_one_sentence_and_exit_code_2(flags, words, ckpt, monkeypatch, capsys):
    with pytest.raises(SystemExit) as left:
        cli.run(lambda: command(ckpt, *FLAGS, *flags.split(), monkeypatch=monkeypatch))
    told = capsys.readouterr().err
    assert left.value.code == 2 and words in told and told.count("\n") == 1 and told.startswith("error: ")
