"""The model against a slow transcription of the paper's equations, and the numbers that the paper states."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from crate_mini import UserError, model, ops, reference
from crate_mini import loss as head

TINY = dict(vocab_size=37, block_size=11, n_layer=2, n_head=2, n_embd=8)


def layer_norm(v, w, b):
    centred = v - v.mean()
    return centred / ((centred**2).mean() + 1e-5).sqrt() * w + (0 if b is None else b)


def transcribed(lm, idx):
    """Logits of one sequence, token by token and head by head, by the released code's formulas."""
    c, s = lm.config, dict(lm.state_dict(keep_vars=True))
    z = [s["tokens.weight"][t] + s["positions.weight"][i] for i, t in enumerate(idx.tolist())]
    d, p = c.n_embd, c.n_embd // c.n_head
    for n in range(c.n_layer):

        def w(name, n=n):
            return s.get(f"blocks.{n}.{name}")

        x = [layer_norm(v, w("attention.norm.weight"), w("attention.norm.bias")) for v in z]
        if c.attention == "mssa":
            k = v = [w("attention.U").T @ t for t in x]
            A, B = w("attention.query.0"), w("attention.query.1")
            q = k if A is None else [t + B.T @ (A.T @ t) for t in k]
        else:
            qkv = [
                w("attention.qkv.weight") @ t + (w("attention.qkv.bias") if c.bias else 0)
                for t in x
            ]
            q, k, v = ([t[i * d : (i + 1) * d] for t in qkv] for i in range(3))
        out = []
        for i in range(len(z)):
            heads = []
            for h in range(c.n_head):
                cut = slice(h * p, (h + 1) * p)
                score = torch.stack([q[i][cut] @ k[j][cut] / math.sqrt(p) for j in range(i + 1)])
                weight = score.exp() / score.exp().sum()
                heads.append(sum(weight[j] * v[j][cut] for j in range(i + 1)))
            bias = w("attention.out.bias")
            out.append(
                z[i] + w("attention.out.weight") @ torch.cat(heads) + (0 if bias is None else bias)
            )
        z = out
        for i, t in enumerate(z):
            x = layer_norm(t, w("sparsifier.norm.weight"), w("sparsifier.norm.bias"))
            if c.sparsifier == "ista":
                W = w("sparsifier.D").T
                lam = c.lam if w("sparsifier.log_lam") is None else w("sparsifier.log_lam").exp()
                a = torch.zeros(c.n_code, dtype=t.dtype)
                for _ in range(c.ista_steps):  # A_t = S(A_{t-1} - eta D^T (D A_{t-1} - x))
                    a = (a - c.eta * (W @ (W.T @ a - x)) - c.eta * lam).clamp(min=0)
                y = (W.T if w("sparsifier.decoder") is None else w("sparsifier.decoder")) @ a
            else:
                a = w("sparsifier.fc.weight") @ x + (w("sparsifier.fc.bias") if c.bias else 0)
                cubic = math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)
                a = 0.5 * a * (1 + cubic.tanh()) if c.activation == "gelu" else a.clamp(min=0)
                y = w("sparsifier.proj.weight") @ a + (w("sparsifier.proj.bias") if c.bias else 0)
            z[i] = t + y if c.residual else y
    z = [layer_norm(v, s["norm.weight"], s.get("norm.bias")) for v in z]
    return torch.stack([s["tokens.weight"] @ v for v in z])


VARIANTS = {
    "crate": dict(model.KINDS["crate"]),
    "gpt2": dict(model.KINDS["gpt2"]),
    "crate+": {**model.KINDS["crate+"], "query_rank": 3},
    "three steps, learned lam, expansion 2": dict(
        ista_steps=3, learned_lam=True, expansion=2, eta=0.05
    ),
    "mlp with gelu and biases": dict(model.KINDS["gpt2"], bias=True, activation="gelu"),
    "mhsa + ista": dict(attention="mhsa", bias=False),
    "mssa + mlp": dict(sparsifier="mlp", bias=False),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_loss_and_gradients_equal_the_transcription(name):
    torch.manual_seed(3)
    lm = model.LM(model.Config(**{**TINY, **VARIANTS[name]})).double()
    with torch.no_grad():
        for w in (
            lm.parameters()
        ):  # away from zero biases and unit norms, so that every parameter matters
            w.add_(0.1 * torch.randn_like(w))
    idx, targets = torch.randint(37, (2, 11)), torch.randint(37, (2, 11))
    loss = lm(idx, targets)
    loss.backward()
    got = {k: w.grad.clone() for k, w in lm.named_parameters()}
    lm.zero_grad()
    logits = torch.stack([transcribed(lm, row) for row in idx])
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    want.backward()
    torch.testing.assert_close(lm(idx), logits, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    for k, w in lm.named_parameters():
        torch.testing.assert_close(got[k], w.grad, rtol=1e-8, atol=1e-12, msg=k)


PAPER = {  # parameters as printed, in millions (positions excluded, 50,304 ids), and to the last one
    ("1L", "crate"): (6.54, 6_538_112),
    ("2L", "crate"): (6.64, 6_637_056),
    ("3L", "crate"): (6.74, 6_736_000),
    ("S", "crate"): (59.9, 59_891_712),  # printed: 55.9
    ("B", "crate"): (81.2, 81_148_416),
    ("1L", "gpt2"): (6.64, 6_635_904),
    ("2L", "gpt2"): (6.83, 6_832_768),
    ("3L", "gpt2"): (7.03, 7_029_632),
    ("S", "gpt2"): (81.1, 81_110_784),
    ("B", "gpt2"): (123.6, 123_587_328),
}


@pytest.mark.parametrize("size, kind", PAPER)
def test_parameter_counts_are_the_papers(size, kind):
    with torch.device("meta"):
        lm = model.LM(model.preset(size, kind))
    printed, exact = PAPER[size, kind]
    assert lm.n_params() == exact
    assert exact / 1e6 == pytest.approx(printed, abs=0.006 if size[-1] == "L" else 0.06)


def test_initial_weights_are_the_released_ones():
    """Normal 0.02, maps into the stream 0.02 / sqrt(2L), D uniform to sqrt(6 / d); biases 0, norms 1."""
    torch.manual_seed(0)
    wide = dict(vocab_size=512, block_size=256, n_layer=2)
    for kind in model.KINDS:
        for name, w in model.LM(model.preset("2L", kind, **wide)).named_parameters():
            if name.endswith(("bias", "query.1")):
                assert not w.any(), name
            elif "norm" in name:
                assert (w == 1).all(), name
            elif name.endswith(".D"):
                bound = math.sqrt(6 / 128)
                assert 0.99 * bound < w.abs().max() <= bound
                assert w.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
            else:
                small = name.endswith(("out.weight", "proj.weight", "decoder"))
                assert w.std().item() == pytest.approx(
                    0.02 / math.sqrt(4 if small else 1), rel=0.03
                ), name
                assert w.abs().max() > 3 * w.std()  # a normal has tails, a uniform has none


@pytest.mark.parametrize("kind, block", [("crate", 18), ("gpt2", 12), ("crate+", 18)])
def test_flops_count_the_products_that_run(kind, block):
    """The documented projections per layer (18 d^2, 12 d^2), and PyTorch's own count of a forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    c = model.preset("3L", kind, vocab_size=64, block_size=7, n_layer=2)
    d, low_rank = c.n_embd, 2 * c.n_embd * c.query_rank
    products = c.n_layer * (block * d * d + low_rank + (c.block_size + 1) * d) + d * c.vocab_size
    assert model.flops_per_token(c) == 6 * products
    lm, idx = model.LM(c), torch.randint(64, (3, 7))
    with (
        FlopCounterMode(display=False) as counter,
        ops.use_backend("reference"),
    ):  # kernels hide products
        lm(idx)
    # the counter skips attention on some backends: compare what it must see, the products with weights
    assert counter.get_flop_counts()["Global"][torch.ops.aten.mm] + sum(
        counter.get_flop_counts()["Global"].get(op, 0)
        for op in (torch.ops.aten.addmm, torch.ops.aten.bmm)
    ) == 2 * 21 * (c.n_layer * (block * d * d + low_rank) + d * c.vocab_size)


@pytest.mark.parametrize("kind", model.KINDS)
def test_the_future_never_changes_the_past(kind):
    torch.manual_seed(0)
    lm = model.LM(model.preset("2L", kind, vocab_size=50, block_size=9)).double()
    idx = torch.randint(50, (1, 9))
    before = lm(idx)
    for t in range(9):
        changed = idx.clone()
        changed[0, t] = (idx[0, t] + 1) % 50
        after = lm(changed)
        torch.testing.assert_close(before[:, :t], after[:, :t], rtol=1e-12, atol=1e-12)
        assert not torch.equal(before[:, t], after[:, t])


@pytest.mark.parametrize("kind", model.KINDS)
def test_initial_loss_is_that_of_guessing_and_one_batch_can_be_learned(kind):
    torch.manual_seed(0)
    lm = model.LM(model.preset("1L", kind, vocab_size=64, block_size=16))
    idx, targets = torch.randint(64, (4, 16)), torch.randint(64, (4, 16))
    assert lm(idx, targets).item() == pytest.approx(math.log(64), abs=0.15)
    optimizer = torch.optim.AdamW(lm.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        lm(idx, targets).backward()
        optimizer.step()
    assert lm(idx, targets).item() < 0.2


@given(
    n=st.integers(1, 70),
    V=st.sampled_from([2, 33, 700]),
    chunk=st.sampled_from([1, 64, 2**20]),
    scale=st.sampled_from([0.1, 1.0, 60.0]),
    seed=st.integers(0, 99),
)
def test_chunked_head_equals_cross_entropy(n, V, chunk, scale, seed):
    g = torch.Generator().manual_seed(seed)
    x, W = torch.randn(n, 8, generator=g) * scale, torch.randn(V, 8, generator=g)
    t = torch.randint(V, (n,), generator=g)
    old, head.CHUNK["cpu"] = head.CHUNK["cpu"], chunk
    try:
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-5)):
            ours = [v.to(dtype).requires_grad_() for v in (x, W)]
            plain = [v.to(dtype).requires_grad_() for v in (x, W)]
            loss, want = head.cross_entropy(*ours, t), reference.cross_entropy(*plain, t)
            (3 * loss).backward()
            (3 * want).backward()
            torch.testing.assert_close(loss, want, rtol=tolerance, atol=tolerance * scale)
            for a, b in zip(ours, plain):
                torch.testing.assert_close(a.grad, b.grad, rtol=tolerance, atol=tolerance * scale)
    finally:
        head.CHUNK["cpu"] = old


def test_head_under_autocast_stays_within_bf16_rounding():
    torch.manual_seed(0)
    x, W, t = torch.randn(300, 32), torch.randn(999, 32) * 0.3, torch.randint(999, (300,))
    exact = [v.double().requires_grad_() for v in (x, W)]
    reference.cross_entropy(*exact, t).backward()
    errors = {}
    for name, loss_of in (("ours", head.cross_entropy), ("plain", reference.cross_entropy)):
        pair = [v.clone().requires_grad_() for v in (x, W)]
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(*pair, t)
        loss.backward()
        errors[name] = [(a.grad - b.grad).norm() / b.grad.norm() for a, b in zip(pair, exact)]
    assert all(a <= 2 * b for a, b in zip(errors["ours"], errors["plain"])), errors


def test_l1_changes_the_training_loss_only():
    torch.manual_seed(0)
    lm = model.LM(model.Config(**TINY, sparsifier="mlp", l1=0.5))
    idx = torch.randint(37, (2, 11))
    _, codes = lm.trunk(idx)
    penalty = 0.5 * sum(a.sum(-1).mean() for a in codes) / 2
    torch.testing.assert_close(lm(idx, idx) - lm.eval()(idx, idx), penalty)


def test_a_hook_on_the_code_steers_and_identity_does_not():
    torch.manual_seed(0)
    for kind in model.KINDS:
        lm = model.LM(model.preset("2L", kind, vocab_size=64, block_size=8)).eval()
        idx, code = torch.randint(64, (1, 8)), lm.blocks[0].sparsifier.code
        plain = lm(idx)
        handle = code.register_forward_hook(lambda m, i, a: a)
        assert torch.equal(lm(idx), plain)
        handle.remove()
        handle = code.register_forward_hook(lambda m, i, a: torch.zeros_like(a))
        assert not torch.equal(lm(idx), plain)
        handle.remove()
        assert torch.equal(lm(idx), plain)


def test_unit_norm_bounds_the_step():
    torch.manual_seed(0)
    lm = model.LM(model.Config(**TINY, unit_norm=True, eta=1.0))
    for _ in range(400):
        lm(torch.randint(37, (1, 4)))
    assert torch.linalg.matrix_norm(lm.blocks[0].sparsifier.D, 2).item() == pytest.approx(
        1, abs=1e-3
    )
    assert set(lm.state_dict()) == set(model.LM(lm.config).state_dict())


def test_generate_is_greedy_seeded_and_bounded():
    torch.manual_seed(0)
    lm = model.LM(model.Config(**TINY)).eval()
    idx = torch.randint(37, (2, 5))
    out = lm.generate(idx, 12, temperature=0)
    assert out.shape == (2, 17) and torch.equal(out[:, :5], idx)
    assert torch.equal(out[:, 5], lm(idx)[:, -1].argmax(-1))
    draws = [
        lm.generate(idx, 9, top_k=5, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@given(
    st.dictionaries(
        st.sampled_from(sorted(model.Config.__dataclass_fields__)),
        st.integers(-3, 9) | st.floats() | st.text(max_size=4) | st.none() | st.booleans(),
    )
)
def test_config_takes_sense_or_says_why(changes):
    try:
        c = model.Config(**changes)
    except UserError as e:
        assert str(e).endswith(".") and "\n" not in str(e)
    else:
        assert c.n_embd % c.n_head == 0 and c.n_code == c.expansion * c.n_embd


def test_unknown_names_are_answered_with_the_known():
    with pytest.raises(UserError, match="crate, gpt2, crate\\+"):
        model.preset("3L", "bert")
    with pytest.raises(UserError, match="try n_head=3"):
        model.Config(n_embd=9, n_head=4)
    with pytest.raises(UserError, match="block_size=11"):
        model.LM(model.Config(**TINY))(torch.zeros(1, 12, dtype=torch.long))
