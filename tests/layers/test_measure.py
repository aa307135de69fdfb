"""Layer measurements: formulas against numpy, what must not change them, planted cases, the command."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import interpret  # noqa: E402
from crate_mini import UserError, cli, model
from crate_mini.data import batches as data
from crate_mini.layers import measure
from crate_mini.training import checkpoint  # noqa: E402

KINDS = {  # name: what makes this model of the paper's one
    "crate": {},
    "gpt2": model.KINDS["gpt2"],
    "crate+": {**model.KINDS["crate+"], "query_rank": 3},
    "mssa-mlp": {"sparsifier": "mlp", "residual": True},
    "mhsa-ista": {"attention": "mhsa"},
    "gelu": {**model.KINDS["gpt2"], "bias": True, "activation": "gelu"},
    "variants": {"unit_norm": True, "learned_lam": True, "ista_steps": 3, "expansion": 1},
}


def tiny(seed=0, **changes):
    size = dict(vocab_size=64, block_size=16, n_layer=2, n_head=2, n_embd=12)
    return measure.untrained(model.Config(**{**size, **changes}), seed)


def ids(seed=0, rows=3, vocab=64, T=16):
    return torch.randint(vocab, (rows, T), generator=torch.Generator().manual_seed(seed))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- coding rate -----------------------------------------------------------------------------------------


def rate_by_definition(u, eps2=0.01):
    """1/2 sum_k logdet(I_N + p/(N eps2) G_k), G_k the Gram matrix of the tokens, head by head."""
    N, K, p = u.shape
    total = 0.0
    for k in range(K):
        v = u[:, k] / np.linalg.norm(u[:, k], axis=1, keepdims=True)
        total += 0.5 * np.linalg.slogdet(np.eye(N) + p / (N * eps2) * v @ v.T)[1]
    return total


shapes = st.tuples(st.integers(1, 24), st.integers(1, 4), st.integers(1, 12), st.integers(0, 99))


@given(shapes)
def test_rate_is_its_definition_and_lies_between_its_bounds(shape):
    N, K, p, seed = shape
    u = draw(2, N, K, p, seed=seed)
    rates = measure.coding_rate(u)
    assert rates.tolist() == pytest.approx([rate_by_definition(v.numpy()) for v in u], rel=1e-10)
    least, most = measure.bounds(N, K, p)
    assert all(least * (1 - 1e-12) <= r <= most * (1 + 1e-12) for r in rates)


@given(shapes)
def test_rate_does_not_see_order_length_or_rotations_inside_a_head(shape):
    N, K, p, seed = shape
    u, rate = draw(N, K, p, seed=seed), measure.coding_rate(draw(N, K, p, seed=seed)).item()
    turns = torch.linalg.qr(draw(K, p, p, seed=seed + 1)).Q
    lengths = draw(N, K, 1, seed=seed + 2).abs() + 0.1
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    for other in (u[order], lengths * u, torch.einsum("nkp,kpq->nkq", u, turns)):
        assert measure.coding_rate(other).item() == pytest.approx(rate, rel=1e-9)


def test_rate_sees_what_mixes_heads_or_stretches_a_basis():
    u = draw(40, 2, 5)
    u[:, 0] = u[:, 0, :1] * u[0, 0]  # one direction in head 0, all in head 1
    mixed = (u.flatten(1) @ torch.linalg.qr(draw(10, 10, seed=1)).Q).view(40, 2, 5)
    stretched = u * torch.tensor([1.0, 1, 1, 1, 30])
    rate = measure.coding_rate(u)
    assert measure.coding_rate(mixed) > rate + 5 and measure.coding_rate(stretched) < rate - 1


def test_alike_and_evenly_spread_tokens_reach_the_bounds():
    K, p = 3, 4
    alike = draw(1, K, p).expand(12, K, p)
    spread = torch.eye(p, dtype=torch.float64).repeat(3, 1)[:, None].expand(12, K, p)
    least, most = measure.bounds(12, K, p)
    assert (
        measure.coding_rate(alike).item() == pytest.approx(least) == K / 2 * math.log(1 + p / 0.01)
    )
    assert measure.coding_rate(spread).item() == pytest.approx(most) == K * p / 2 * math.log(101)
    few = torch.eye(p, dtype=torch.float64)[:2, None]  # fewer tokens than directions
    assert measure.coding_rate(few).item() == pytest.approx(measure.bounds(2, 1, p)[1])


@pytest.mark.parametrize("kind", ["crate", "gpt2", "gelu"])
def test_bases_are_the_models_own_and_orthonormal_ones_span_the_same(kind):
    lm = tiny(**KINDS[kind])
    attention, x = lm.blocks[0].attention, draw(1, 5, 12).float()
    found = measure.bases(attention)
    if kind == "crate":
        own = (x @ attention.U).unflatten(-1, (2, -1))
    else:
        own = attention.qkv(x).unflatten(-1, (3, 2, -1))[:, :, 2]
        own = own - (0 if attention.qkv.bias is None else attention.qkv.bias[24:].view(2, 6))
    assert torch.allclose(
        torch.einsum("btd,dkp->btkp", x.double(), found["U"]), own.double(), atol=1e-6
    )
    for k in range(2):
        Q, U = found["orthonormal U"][:, k], found["U"][:, k]
        assert torch.allclose(Q.T @ Q, torch.eye(6, dtype=Q.dtype), atol=1e-12)
        assert torch.allclose(Q @ Q.T @ U, U, atol=1e-12)
    assert torch.equal(found["whole"][:, 0], torch.eye(12, dtype=torch.float64))


# ---- one layer against numpy -----------------------------------------------------------------------------


def layer_norm(z, norm):
    z = z.double().numpy()
    x = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-5)
    bias = 0 if norm.bias is None else norm.bias.detach().double().numpy()
    return x * norm.weight.detach().double().numpy() + bias


@pytest.mark.parametrize("kind", ["crate", "variants", "mhsa-ista"])
def test_numbers_of_a_layer_are_the_formulas(kind):
    lm = tiny(**KINDS[kind])
    seen = []
    block = lm.blocks[1]
    block.attention.register_forward_pre_hook(lambda m, z: seen.append(z[0]))
    block.sparsifier.register_forward_pre_hook(lambda m, z: seen.append(z[0]))
    found = measure.layers(lm, [ids()])[1]
    for z, rates in zip(seen, found["rate"].values()):
        x = layer_norm(z, block.attention.norm)
        for name, U in measure.bases(block.attention).items():
            each = [rate_by_definition(np.einsum("td,dkp->tkp", v, U.numpy())) for v in x]
            assert rates[name]["mean"] == pytest.approx(np.mean(each), rel=1e-6)
            assert rates[name]["std"] == pytest.approx(np.std(each), rel=1e-4, abs=1e-6)
    m, x = block.sparsifier, layer_norm(seen[1], block.sparsifier.norm).reshape(-1, 12)
    D, a, objective = m.D.detach().double().numpy(), 0, []
    a = np.zeros((len(x), D.shape[1]))
    for step in range(m.steps + 1):
        objective.append(np.mean(0.1 * a.sum(1) + 0.5 * np.square(x - a @ D.T).sum(1)) / 12)
        if step < m.steps:
            a = np.maximum(a + 0.1 * (x - a @ D.T) @ D - 0.01, 0)
    assert found["lasso"] == pytest.approx(objective, rel=1e-5)
    error = np.square(x - a @ D.T).sum() / np.square(x).sum()
    assert found["reconstruction_error"] == pytest.approx(error, rel=1e-5)
    assert found["density"] == pytest.approx(
        np.mean(a > 0), abs=2e-3
    )  # a code may lie on the threshold
    assert found["l0"]["mean"] == pytest.approx(found["density"] * found["neurons"])
    assert found["l0"]["std"] == pytest.approx(np.std((a > 0).sum(1)), abs=0.05)


def norm_by_power_iteration(D, steps=3000):
    v = np.ones(D.shape[1])
    for _ in range(steps):
        v = D.T @ (D @ v)
        v /= np.linalg.norm(v)
    return np.linalg.norm(D @ v) ** 2


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 99))
def test_dictionary_is_its_definitions(d, expansion, seed):
    lm = tiny(seed, n_embd=d, n_head=1, n_layer=1, expansion=expansion)
    found = measure.dictionary(lm.blocks[0].sparsifier)
    D = lm.blocks[0].sparsifier.D.detach().double().numpy()
    h = D.shape[1]
    cosines = [
        abs(D[:, i] @ D[:, j]) / np.linalg.norm(D[:, i]) / np.linalg.norm(D[:, j])
        for i in range(h)
        for j in range(i)
    ] or [0]
    unit = D / np.linalg.norm(D, axis=0)
    assert found["norm2"] == pytest.approx(norm_by_power_iteration(D), rel=1e-3)
    assert found["eta_norm2"] == pytest.approx(0.1 * found["norm2"])
    assert found["coherence"] == pytest.approx(max(cosines)) and found[
        "mean_cosine"
    ] == pytest.approx(np.mean(cosines))
    assert found["welch"] <= found["coherence"] + 1e-9
    assert found["frame_distance"] == pytest.approx(
        np.sqrt(np.square(D @ D.T - h / d * np.eye(d)).sum())
    )
    assert found["frame_distance_unit"] == pytest.approx(
        np.sqrt(np.square(unit @ unit.T - h / d * np.eye(d)).sum()), abs=1e-9
    )


def test_dictionaries_known_by_heart():
    m = tiny().blocks[0].sparsifier
    with torch.no_grad():
        m.D.copy_(3 * torch.eye(12).repeat(1, 4))  # a tight frame of four equal bases
    found = measure.dictionary(m)
    assert found["frame_distance_unit"] == pytest.approx(0, abs=1e-9) and found["coherence"] == 1
    assert found["norm2"] == pytest.approx(36) and found["frame_distance"] == pytest.approx(
        32 * 12**0.5
    )
    assert measure.dictionary(tiny(**KINDS["gpt2"]).blocks[0].sparsifier)["eta_norm2"] is None


# ---- what steps do, planted codes ------------------------------------------------------------------------


@given(st.floats(0.05, 1.0), st.integers(1, 6), st.integers(0, 99))
def test_no_step_raises_the_objective_when_eta_norm2_is_at_most_1(size, steps, seed):
    lm = tiny(seed, unit_norm=True, eta=size, ista_steps=steps, lam=0.3)
    for _ in range(30):
        lm.train()(ids())  # the parametrisation's own power iteration
    for n in measure.layers(lm.eval(), [ids(seed)]):
        if n["dictionary"]["eta_norm2"] <= 1:
            assert all(b <= a * (1 + 1e-6) for a, b in zip(n["lasso"], n["lasso"][1:]))
            assert n["lasso"][-1] < n["lasso"][0]


def test_a_step_far_beyond_the_limit_raises_it():
    n = measure.layers(tiny(eta=2.0), [ids()])[0]
    assert n["dictionary"]["eta_norm2"] > 2 and n["lasso"][-1] > n["lasso"][0]


def test_planted_codes_have_the_density_they_were_planted_with():
    lm = tiny()
    code = lm.blocks[1].sparsifier.code
    on = torch.arange(48)[:, None] > torch.arange(48)  # neuron j is on for 47 - j of 48 tokens
    code.register_forward_hook(lambda m, i, a: on.float().view(3, 16, 48))
    n = measure.layers(lm, [ids()])[1]
    assert n["density_by_neuron"] == [round((47 - j) / 48, 6) for j in range(48)] and n["dead"] == 1
    assert n["density"] == pytest.approx(23.5 / 48) and n["l0"]["mean"] == pytest.approx(23.5)
    assert n["density_deciles"] == pytest.approx(
        np.quantile(np.arange(48) / 48, np.arange(1, 10) / 10)
    )


def test_batches_add_up_and_measuring_leaves_no_trace():
    lm = tiny()
    before = lm(ids(rows=4))
    whole = measure.layers(lm, [ids(rows=4)])
    parts = measure.layers(lm, list(ids(rows=4).split(1)))
    assert [n["density_by_neuron"] for n in whole] == [n["density_by_neuron"] for n in parts]
    for a, b in zip(whole, parts):
        assert a["lasso"] == pytest.approx(b["lasso"])
        assert a["rate"]["after attention"]["U"]["mean"] == pytest.approx(
            b["rate"]["after attention"]["U"]["mean"]
        )
    assert torch.equal(lm(ids(rows=4)), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.modules())


def test_untrained_is_where_training_starts_and_draws_from_no_one():
    config = model.Config(
        vocab_size=64, block_size=16, n_layer=1, n_head=2, n_embd=12, unit_norm=True
    )
    torch.manual_seed(7)
    start, _, state = model.LM(config).state_dict(), torch.rand(3), torch.get_rng_state()
    again = measure.untrained(config, 7).state_dict()
    assert start.keys() == again.keys() and all(torch.equal(start[k], again[k]) for k in start)
    assert torch.equal(torch.get_rng_state(), state)


# ---- the command -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measure")
    path = folder / "text.txt"
    path.write_text(
        "".join(f"line {i * i} speaks of codes and rates number {i}\n" for i in range(400))
    )
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CRATE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def make(folder, text, kind="crate", lm=None, **training):
    tokenizer = data.load_tokenizer("bytes")
    lm = lm or tiny(vocab_size=320, **KINDS[kind])
    corpus = data.open_corpus(str(text), tokenizer, log=lambda *_: None)
    settings = {"data": str(text), "val_fraction": 0.1, "seed": 5, **training}
    checkpoint.save(
        folder / "best",
        lm,
        tokenizer={"spec": "bytes", "hash": tokenizer.hash},
        training={"settings": settings, "step": 1, "corpus": corpus.meta},
    )
    return str(folder / "best")


def call(monkeypatch, capsys, *words):
    """Exit code, stdout, stderr of `python interpret.py WORDS`."""
    monkeypatch.setattr(sys, "argv", ["interpret.py", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.run(interpret.main)
    said = capsys.readouterr()
    return end.value.code, said.out, said.err


@pytest.mark.parametrize("kind", KINDS)
def test_command_on_every_kind_of_model(kind, text, tmp_path, monkeypatch, capsys):
    ckpt = make(tmp_path, text, kind)
    code, out, err = call(monkeypatch, capsys, "layers", ckpt, "--tokens", 600)
    assert not code and not err, err
    found = json.loads((tmp_path / "interpret" / "layers.json").read_text())
    assert (
        found["tokens"] == 592
        and found["seed"] == 5
        and found["machine"]["torch"] == torch.__version__
    )
    assert found["command"].startswith("python interpret.py layers")
    assert [len(found[name]) for name in ("trained", "untrained")] == [2, 2]
    config = model.Config(**found["checkpoint"]["config"])
    for n in found["trained"] + found["untrained"]:
        assert (n["projection"] == "U") == (config.attention == "mssa")
        ista = config.sparsifier == "ista"
        assert (n["lasso"] is not None) == (n["reconstruction_error"] is not None) == ista
        assert not ista or len(n["lasso"]) == config.ista_steps + 1
        assert len(n["density_by_neuron"]) == n["neurons"] == config.n_code
        for name, bound in (("U", "U"), ("orthonormal U", "U"), ("whole", "whole")):
            least, most = found["rate_bounds"][bound]
            assert all(least <= rates[name]["mean"] <= most for rates in n["rate"].values())
    for name in ("layers.png", "l0.png"):
        assert (tmp_path / "interpret" / name).read_bytes().startswith(b"\x89PNG")
    titles = re.findall(
        r"\S+ %|\S+", " ".join(line for line in out.splitlines() if "  layer  " in line)
    )
    assert ("objective" in titles) == (config.sparsifier == "ista") and "coherence" in titles
    assert ("the value projection stands in" in out) == (config.attention == "mhsa")
    for title in set(titles) - {"layer"}:
        assert f"\n{title:<12}" in out, title


def test_equal_commands_equal_numbers_and_seeds_count(text, tmp_path, monkeypatch, capsys):
    ckpt = make(tmp_path, text)  # weights of seed 0, but its record says 5
    results = []
    for out, more in (("a", []), ("b", []), ("c", ["--seed", 0])):
        words = ["layers", ckpt, "--tokens", 64, "--out", tmp_path / out, *more]
        assert not call(monkeypatch, capsys, *words)[0]
        results.append(json.loads((tmp_path / out / "layers.json").read_text()))
    a, b, c = results
    assert a["trained"] == b["trained"] and a["untrained"] == b["untrained"] != a["trained"]
    assert c["untrained"] == c["trained"] == a["trained"] and (a["seed"], c["seed"]) == (5, 0)


def test_note_when_the_text_changed_since_training(text, tmp_path, monkeypatch, capsys):
    other = tmp_path / "other.txt"
    other.write_text(text.read_text())
    ckpt = make(tmp_path, other)
    other.write_text(text.read_text().replace("codes", "words"))
    code, out, _ = call(monkeypatch, capsys, "layers", ckpt, "--tokens", 64)
    assert not code and "is not the text" in out


def spoil(ckpt):
    path = next(Path(ckpt).glob("weights-*.pt"))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--tokens", "0"], "--tokens 0"),
        (["--tokens", "15"], "16"),
        (["--batch", "0"], "--batch 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--tokens", "many"], "many"),
        (["--token", "9"], "mean --token"),
        (["--val-fraction", "7"], "val_fraction is 7"),
        (["--data", "missing.txt"], "missing.txt"),
        (["--device", "abacus"], "abacus"),
        (["--tokenizer", "pydocs"], "Tokenizer pydocs"),
    ],
)
def test_wrong_settings_are_told_in_one_sentence(
    words, reason, text, tmp_path, monkeypatch, capsys
):
    code, _, err = call(monkeypatch, capsys, "layers", make(tmp_path, text), *words)
    assert code == 2 and reason in err and err.count("\n") == 1 and "Traceback" not in err
    assert not (tmp_path / "interpret").exists()


def test_wrong_checkpoints_and_texts_are_told_in_one_sentence(text, tmp_path, monkeypatch, capsys):
    short, taken = tmp_path / "short.txt", tmp_path / "taken"
    short.write_text("a few words only, and then some more for training on them\n")
    taken.write_text("a file")
    broken, sick = make(tmp_path / "broken", text), tiny(vocab_size=320)
    spoil(broken)
    with torch.no_grad():
        sick.blocks[0].attention.out.weight.fill_(float("nan"))
    sick, ours = make(tmp_path / "sick", text, lm=sick), make(tmp_path / "ours", text)
    for words, reason in (
        ([broken], "damaged"),
        ([tmp_path / "nothing"], "No checkpoint"),
        ([sick], "not finite"),
        ([], "CKPT"),
        ([ours, "--data", short], "one window needs 17"),
        ([make(tmp_path / "mute", text, data=None)], "--data"),
        ([ours, "--out", taken], "taken"),
    ):
        code, _, err = call(monkeypatch, capsys, "layers", *words)
        assert code == 2 and reason in err and err.count("\n") == 1, (reason, err)
    assert "did you mean layers?" in call(monkeypatch, capsys, "layer", ours)[2]


def test_a_layer_that_is_not_finite_is_named():
    lm = tiny()
    with torch.no_grad():
        lm.blocks[0].sparsifier.D.fill_(float("inf"))
    with pytest.raises(UserError, match="layer 1"):
        measure.layers(lm, [ids()])
