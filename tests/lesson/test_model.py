"""The model against a slow transcription of the equations, and against the paper's numbers."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from crate_mini import UserError, model, ops
from crate_mini.training.device import flops_per_token

TINY = dict(vocab_size=37, block_size=11, n_layer=2, n_head=2, n_embd=8)


def layer_norm(v, weight, bias):
    centred = v - v.mean()
    normed = centred / ((centred**2).mean() + 1e-5).sqrt() * weight
    return normed if bias is None else normed + bias


def linear(x, weight, bias):
    return weight @ x if bias is None else weight @ x + bias


def attention_inputs(config, w, x):
    """Lists of the query, key and value (d,) of each token x (d,), without the residual path."""
    d = config.n_embd
    if config.attention == "mhsa":
        qkv = [linear(t, w("attention.qkv.weight"), w("attention.qkv.bias")) for t in x]
        q, k, v = ([t[i * d : (i + 1) * d] for t in qkv] for i in range(3))
    else:
        k = v = [w("attention.U").T @ t for t in x]
        A, B = w("attention.query.0"), w("attention.query.1")
        q = k if A is None else [t + B.T @ (A.T @ t) for t in k]
    gate = w("attention.key_gate")
    if gate is not None:
        share = 1 / (1 + (-gate).exp())
        earlier = [torch.zeros_like(k[0]), *k[:-1]]
        k = [(1 - share) * now + share * before for now, before in zip(k, earlier)]
    return q, k, v


def largest(a, k):
    """a with all but its k largest entries 0; all of it if k is 0."""
    if not k:
        return a
    kept = sorted(range(len(a)), key=a.tolist().__getitem__)[-k:]
    return torch.stack([a[i] if i in kept else 0 * a[i] for i in range(len(a))])


def transcribed_attention(config, w, z):
    """The stream after attention, token by token and head by head."""
    p = config.n_embd // config.n_head
    x = [layer_norm(v, w("attention.norm.weight"), w("attention.norm.bias")) for v in z]
    q, k, v = attention_inputs(config, w, x)
    out = []
    for i in range(len(z)):
        heads = []
        for h in range(config.n_head):
            head = slice(h * p, (h + 1) * p)
            scores = [q[i][head] @ k[j][head] / math.sqrt(p) for j in range(i + 1)]
            weights = torch.stack(scores).exp()
            weights = weights / weights.sum()
            heads.append(sum(weights[j] * v[j][head] for j in range(i + 1)))
        heads = torch.cat(heads)
        out.append(z[i] + linear(heads, w("attention.out.weight"), w("attention.out.bias")))
    return out


def transcribed_sparsifier(config, w, z):
    """What the sparsifier makes of one token z (d,), without the residual path."""
    x = layer_norm(z, w("sparsifier.norm.weight"), w("sparsifier.norm.bias"))
    if config.sparsifier == "ista":
        W = w("sparsifier.D").T
        log_lam, decoder = w("sparsifier.log_lam"), w("sparsifier.decoder")
        lam = config.lam if log_lam is None else log_lam.exp()
        a = torch.zeros(config.n_code, dtype=z.dtype)
        for _ in range(config.ista_steps):  # A_t = S(A_{t-1} - eta D^T (D A_{t-1} - x))
            moved = a - config.eta * (W @ (W.T @ a - x))
            a = (moved - config.eta * lam).clamp(min=0)
        if config.debias:
            a = torch.where(moved > config.eta * lam, moved, 0)
        return (W.T if decoder is None else decoder) @ largest(a, config.top_k)
    a = linear(x, w("sparsifier.fc.weight"), w("sparsifier.fc.bias"))
    if config.activation == "gelu":
        cubic = math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)
        a = 0.5 * a * (1 + cubic.tanh())
    else:
        a = a.clamp(min=0)
    a = largest(a, config.top_k)
    return linear(a, w("sparsifier.proj.weight"), w("sparsifier.proj.bias"))


def transcribed(lm, ids):
    """Logits of one sequence by the released code's formulas."""
    config, weights = lm.config, dict(lm.state_dict(keep_vars=True))
    z = []
    for position, token in enumerate(ids.tolist()):
        z.append(weights["tokens.weight"][token] + weights["positions.weight"][position])
    for n in range(config.n_layer):

        def w(name, n=n):
            return weights.get(f"blocks.{n}.{name}")

        z = transcribed_attention(config, w, z)
        y = [transcribed_sparsifier(config, w, v) for v in z]
        z = [v + change for v, change in zip(z, y)] if config.residual else y
    z = [layer_norm(v, weights["norm.weight"], weights.get("norm.bias")) for v in z]
    return torch.stack([weights["tokens.weight"] @ v for v in z])


VARIANTS = {
    "crate": dict(model.KINDS["crate"]),
    "gpt2": dict(model.KINDS["gpt2"]),
    "crate+": {**model.KINDS["crate+"], "query_rank": 3},
    "three steps, learned lam, expansion 2": dict(
        ista_steps=3, learned_lam=True, expansion=2, eta=0.05
    ),
    "mlp with gelu and biases": dict(model.KINDS["gpt2"], bias=True, activation="gelu"),
    "crate, key shift": dict(key_shift=True),
    "gpt2, key shift": dict(model.KINDS["gpt2"], key_shift=True),
    "crate, top-k": dict(top_k=5),
    "crate, debiased, top-k": dict(debias=True, top_k=5),
    "crate, debiased": dict(debias=True, lam=0.9),
    "gpt2, top-k": dict(model.KINDS["gpt2"], top_k=3),
    "mhsa + ista": dict(attention="mhsa", bias=False),
    "mssa + mlp": dict(sparsifier="mlp", bias=False),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_loss_and_gradients_equal_the_transcription(name):
    torch.manual_seed(3)
    lm = model.LM(model.Config(**{**TINY, **VARIANTS[name]})).double()
    with torch.no_grad():
        for w in lm.parameters():  # no zero biases or unit norms: every parameter matters
            w.add_(0.1 * torch.randn_like(w))
    ids, targets = torch.randint(37, (2, 11)), torch.randint(37, (2, 11))
    loss = lm(ids, targets)
    loss.backward()
    gradients = {name: w.grad.clone() for name, w in lm.named_parameters()}
    lm.zero_grad()
    logits = torch.stack([transcribed(lm, row) for row in ids])
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    expected.backward()
    torch.testing.assert_close(lm(ids), logits, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for name, w in lm.named_parameters():
        torch.testing.assert_close(gradients[name], w.grad, rtol=1e-8, atol=1e-12, msg=name)


# Parameters as the paper prints them, in millions (positions excluded, 50,304 ids), and exactly.
PAPER = {
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
    """N(0, 0.02), maps to the stream 0.02 / sqrt(2L), D uniform to sqrt(6 / d), zero biases."""
    torch.manual_seed(0)
    wide = dict(vocab_size=512, block_size=256, n_layer=2)
    for kind in model.KINDS:
        for name, w in model.LM(model.preset("2L", kind, **wide)).named_parameters():
            if name.endswith(("bias", "query.1", "key_gate")):
                assert not w.any(), name
            elif "norm" in name:
                assert (w == 1).all(), name
            elif name.endswith(".D"):
                bound = math.sqrt(6 / 128)
                assert 0.99 * bound < w.abs().max() <= bound
                assert w.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
            else:
                to_stream = name.endswith(("out.weight", "proj.weight", "decoder"))
                deviation = 0.02 / math.sqrt(4 if to_stream else 1)
                assert w.std().item() == pytest.approx(deviation, rel=0.03), name
                assert w.abs().max() > 3 * w.std()  # a normal has tails, a uniform has none


@pytest.mark.parametrize("kind, block", [("crate", 18), ("gpt2", 12), ("crate+", 10)])
def test_flops_count_the_products_that_run(kind, block):
    """Against the documented products per layer, and PyTorch's count of a forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    config = model.preset("3L", kind, vocab_size=64, block_size=7, n_layer=2)
    d = config.n_embd
    with_weights = block * d * d + 2 * d * config.query_rank  # products of a layer
    attention = (config.block_size + 1) * d
    head = d * config.vocab_size
    per_token = config.n_layer * (with_weights + attention) + head
    assert flops_per_token(config) == 6 * per_token
    lm, ids = model.LM(config), torch.randint(64, (3, 7))
    # Kernels would hide their products from the counter.
    with FlopCounterMode(display=False) as counter, ops.use_backend("reference"):
        lm(ids)
    # On some backends it does not see attention: count the products with weights.
    counts = counter.get_flop_counts()["Global"]
    aten = torch.ops.aten
    counted = sum(counts.get(op, 0) for op in (aten.mm, aten.addmm, aten.bmm))
    assert aten.mm in counts
    assert counted == 2 * 21 * (config.n_layer * with_weights + head)


@pytest.mark.parametrize("kind", model.KINDS)
def test_the_future_never_changes_the_past(kind):
    torch.manual_seed(0)
    lm = model.LM(model.preset("2L", kind, vocab_size=50, block_size=9)).double()
    ids = torch.randint(50, (1, 9))
    before = lm(ids)
    for t in range(9):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % 50
        after = lm(changed)
        torch.testing.assert_close(before[:, :t], after[:, :t], rtol=1e-12, atol=1e-12)
        assert not torch.equal(before[:, t], after[:, t])


@pytest.mark.parametrize("kind", model.KINDS)
def test_initial_loss_is_that_of_guessing_and_one_batch_can_be_learned(kind):
    torch.manual_seed(0)
    lm = model.LM(model.preset("1L", kind, vocab_size=64, block_size=16))
    ids, targets = torch.randint(64, (4, 16)), torch.randint(64, (4, 16))
    assert lm(ids, targets).item() == pytest.approx(math.log(64), abs=0.15)
    optimizer = torch.optim.AdamW(lm.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        lm(ids, targets).backward()
        optimizer.step()
    assert lm(ids, targets).item() < 0.2


def test_l1_changes_the_training_loss_only():
    torch.manual_seed(0)
    lm = model.LM(model.Config(**TINY, sparsifier="mlp", l1=0.5))
    ids = torch.randint(37, (2, 11))
    _, codes = lm.trunk(ids)
    penalty = 0.5 * sum(a.sum(-1).mean() for a in codes) / 2
    torch.testing.assert_close(lm(ids, ids) - lm.eval()(ids, ids), penalty)


def test_unit_norm_bounds_the_step():
    torch.manual_seed(0)
    lm = model.LM(model.Config(**TINY, unit_norm=True, eta=1.0))
    for _ in range(400):
        lm(torch.randint(37, (1, 4)))
    norm = torch.linalg.matrix_norm(lm.blocks[0].sparsifier.D, 2).item()
    assert norm == pytest.approx(1, abs=1e-3)
    assert set(lm.state_dict()) == set(model.LM(lm.config).state_dict())


@given(
    st.dictionaries(
        st.sampled_from(sorted(model.Config.__dataclass_fields__)),
        st.integers(-3, 9) | st.floats() | st.text(max_size=4) | st.none() | st.booleans(),
    )
)
def test_a_config_is_valid_or_refused_with_a_reason(changes):
    try:
        config = model.Config(**changes)
    except UserError as error:
        assert str(error).endswith(".") and "\n" not in str(error)
    else:
        assert config.n_embd % config.n_head == 0
        assert config.n_code == config.expansion * config.n_embd


def test_errors_for_unknown_names_list_the_known_ones():
    with pytest.raises(UserError, match="crate, gpt2, crate\\+"):
        model.preset("3L", "bert")
    with pytest.raises(UserError, match="try n_head=3"):
        model.Config(n_embd=9, n_head=4)
    with pytest.raises(UserError, match="block_size=11"):
        model.LM(model.Config(**TINY))(torch.zeros(1, 12, dtype=torch.long))
