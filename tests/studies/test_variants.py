"""Variants of the study: equations, start, causality, cache, initial weights, command."""

import math

import pytest
import torch
import torch.nn.functional as F
from forked import run_script
from tiny_runs import facts, own_place, text, tiny  # noqa: F401 (fixtures)
from torch.utils.flop_counter import FlopCounterMode

from crate_mini import UserError, cli, model, ops, reference
from crate_mini.generate import generate, kv_cache
from crate_mini.studies import variants
from crate_mini.training import checkpoint, device

V, T = 37, 12
D, K = 16, 2
P = D // K
SIZES = dict(vocab_size=V, block_size=T, n_layer=2, n_head=K, n_embd=D, ista_steps=3, eta=0.05)
START_PLAIN = ("query-gain", "log-scale", "nesterov-layers")
WITH_QUERY_RANK = [
    name for name, variant in variants.VARIANTS.items() if "query_rank" not in variant.needs
]
PARAMETRIZED = pytest.mark.parametrize("name", variants.VARIANTS)


def fields(name, **changes):
    """A Config with as many levers on as the variant allows."""
    needs = variants.VARIANTS[name].needs
    key_shift = "key_shift" not in needs
    query_rank = 3 if name in WITH_QUERY_RANK else 0
    levers = dict(residual=True, separate_decoder=True, key_shift=key_shift, query_rank=query_rank)
    return model.Config(**{**SIZES, **levers, **changes})


def variant_lm(name, seed=0, **changes):
    """A new LM of the variant in eval mode."""
    torch.manual_seed(seed)
    with variants.installed(name):
        return model.LM(fields(name, **changes)).eval()


def plain_lm(name, seed=0, **changes):
    """The plain LM that the variant departs from."""
    torch.manual_seed(seed)
    return model.LM(fields(name, **changes)).eval()


@torch.no_grad()
def stirred(lm, scale=0.3):
    """The LM in float64 with noise on all weights: no parameter keeps a special value."""
    generator = torch.Generator().manual_seed(5)
    lm.double()
    for w in lm.parameters():
        w.add_(scale * torch.randn(w.shape, generator=generator, dtype=w.dtype))
    return lm


def token_ids(rows=2, length=T, seed=1):
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(seed))


# ---- equations -----------------------------------------------------------------------------------


def mixed(rows, weights):
    """sum_i weights[i] * rows[s - i] for each row s, zeros before the first."""
    out = []
    for s in range(len(rows)):
        terms = [w * rows[s - i] for i, w in enumerate(weights) if s >= i]
        out.append(sum(terms))
    return torch.stack(out)


def half_mixed(rows, gate):
    share = 1 / (1 + (-gate).exp())
    return mixed(rows, [1 - share, share])


def unit_heads(rows):
    heads = rows.view(len(rows), K, P)
    return (heads / (heads**2).mean(-1, keepdim=True).sqrt()).view(len(rows), D)


def transcribed_inputs(name, w, z):
    """q, k, v (T, d) of a variant for one sequence z (T, d), by its equation."""
    x = F.layer_norm(z, (D,), w["norm.weight"], w["norm.bias"])
    u = x @ w["U"]
    correction = u @ w["query.0"] @ w["query.1"] if "query.0" in w else 0
    q = u + correction
    k = v = u
    if "key_gate" in w:
        k = half_mixed(u, w["key_gate"])
    if name == "query-gain":
        q = w["gain"] * u + correction
    elif name == "value-shift":
        v = half_mixed(u, w["value_gate"])
    elif name == "two-shifts":
        powers = w["shift_logits"].view(3, D).exp()
        k = mixed(u, powers / powers.sum(0))
    elif name == "log-scale":
        q = q * w["log_scale"].exp().repeat_interleave(P)
    elif name == "qk-norm":
        q, k = unit_heads(q), w["key_gain"] * unit_heads(k)
    if name in ("free-query", "free-both"):
        q = x @ w["Q"]
    if name in ("free-value", "free-both"):
        v = x @ w["W"]
    return q, k, v


def transcribed_heads(name, q, k, v):
    """The heads' outputs (T, d), position by position."""
    out = torch.zeros_like(q)
    for t in range(len(q)):
        first_hidden = t if name == "no-self" and t > 0 else t + 1
        for h in range(K):
            head = slice(h * P, (h + 1) * P)
            scores = k[:first_hidden, head] @ q[t, head] / math.sqrt(P)
            weights = scores.exp() / scores.exp().sum()
            out[t, head] = weights @ v[:first_hidden, head]
    return out


ATTENTION = [name for name, variant in variants.VARIANTS.items() if "MSSA" in variant.slots]


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_equals_the_equation_of_its_docstring(name):
    layer = stirred(variant_lm(name)).blocks[1].attention
    w = dict(layer.named_parameters())
    z = torch.randn(1, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    heads = transcribed_heads(name, *transcribed_inputs(name, w, z[0]))
    if name == "paper-output":
        expected = heads @ w["U"].T + w["out_bias"]
    else:
        expected = heads @ w["out.weight"].T + w["out.bias"]
    if name == "half-step":
        c = 1 / (1 + (-w["step_logit"]).exp())
        expected = (1 - c) * z[0] + c * expected - z[0]  # the block adds z
    torch.testing.assert_close(layer(z)[0], expected, rtol=0, atol=1e-5)


def test_half_step_moves_the_stream_by_half_at_the_start():
    lm = variant_lm("half-step")
    z = torch.randn(1, T, D)
    step = z + lm.blocks[0].attention(z)
    plain = plain_lm("half-step").blocks[0].attention
    torch.testing.assert_close(step, 0.5 * z + 0.5 * plain(z))


def test_free_both_is_mhsa_without_biases():
    layer = stirred(variant_lm("free-both")).blocks[0].attention
    twin = model.MHSA(fields("free-both", attention="mhsa", query_rank=0)).double()
    rows = torch.cat([layer.Q.T, layer.U.T, layer.W.T])
    weights = {name: w for name, w in layer.state_dict().items() if name not in ("Q", "U", "W")}
    bias = torch.zeros(3 * D)
    twin.load_state_dict({**weights, "qkv.weight": rows, "qkv.bias": bias})
    z = torch.randn(2, T, D, dtype=torch.float64)
    torch.testing.assert_close(layer(z), twin(z))


def textbook_fista(x, dictionary, eta, lam, steps):
    """Beck & Teboulle (2009), eqs. (4.1) to (4.3), with a >= 0, for one token x (d,)."""
    a = extrapolated = torch.zeros(dictionary.shape[1], dtype=x.dtype)
    t = 1.0
    for _ in range(steps):
        before = a
        gradient = dictionary.T @ (dictionary @ extrapolated - x)
        a = (extrapolated - eta * gradient - eta * lam).clamp(min=0)
        t_before, t = t, (1 + math.sqrt(1 + 4 * t**2)) / 2
        extrapolated = a + (t_before - 1) / t * (a - before)
    return a


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9])
def test_fista_codes_equal_the_textbook_iteration(steps):
    generator = torch.Generator().manual_seed(3)
    dictionary = torch.randn(8, 20, dtype=torch.float64, generator=generator) / 3
    x = torch.randn(5, 8, dtype=torch.float64, generator=generator)
    codes = variants.fista_codes(x, dictionary, 0.1, 0.1, steps)
    expected = [textbook_fista(token, dictionary, 0.1, 0.1, steps) for token in x]
    torch.testing.assert_close(codes, torch.stack(expected), rtol=1e-10, atol=1e-12)
    is_ista = codes.equal(reference.ista_codes(x, dictionary, 0.1, 0.1, steps))
    assert is_ista == (steps <= 2)


def test_fista_reaches_a_lower_objective_than_ista():
    generator = torch.Generator().manual_seed(3)
    dictionary = torch.randn(8, 20, dtype=torch.float64, generator=generator) / 3
    x = torch.randn(5, 8, dtype=torch.float64, generator=generator)
    with_momentum = variants.fista_codes(x, dictionary, 0.1, 0.1, 12)
    without = reference.ista_codes(x, dictionary, 0.1, 0.1, 12)
    objectives = [reference.lasso(x, a, dictionary, 0.1).mean() for a in (with_momentum, without)]
    assert objectives[0] < objectives[1]


@pytest.mark.parametrize("changes", [{}, {"learned_lam": True}, {"debias": True}, {"top_k": 4}])
def test_fista_sparsifier_applies_the_fields_of_ista(changes):
    lm = stirred(variant_lm("fista", **changes), 0.05)
    sparsifier = lm.blocks[0].sparsifier
    z = torch.randn(2, T, D, dtype=torch.float64)
    x, lam = sparsifier.norm(z), sparsifier.threshold()
    codes = variants.fista_codes(x, sparsifier.D, SIZES["eta"], lam, SIZES["ista_steps"])
    if "debias" in changes:
        codes = codes + SIZES["eta"] * lam * (codes > 0)
    if "top_k" in changes:
        codes = reference.top_k(codes, 4)
    y, a = sparsifier(z)
    assert 0 < a.count_nonzero() < a.numel()
    torch.testing.assert_close(a, codes)
    torch.testing.assert_close(y, a @ sparsifier.decoder.T)


def test_nesterov_layers_extrapolate_the_stream_before_each_later_block():
    lm = stirred(variant_lm("nesterov-layers", n_layer=3))
    ids = token_ids()
    z0 = lm.tokens(ids) + lm.positions.weight[:T]
    z1, _ = lm.blocks[0](z0)
    z2, _ = lm.blocks[1](z1 + lm.betas[0] * (z1 - z0))
    z3, _ = lm.blocks[2](z2 + lm.betas[1] * (z2 - z1))
    stream, codes = lm.trunk(ids)
    torch.testing.assert_close(stream, lm.norm(z3))
    assert len(codes) == 3


# ---- the start -----------------------------------------------------------------------------------


@PARAMETRIZED
def test_shared_weights_are_those_of_the_plain_model(name):
    with torch.no_grad():
        weights = dict(variant_lm(name).named_parameters())
        plain = dict(plain_lm(name).named_parameters())
    differing = [n for n in plain if n not in weights or not weights[n].equal(plain[n])]
    if name == "paper-output":  # the one exception, in every matrix after the first U
        assert "blocks.0.attention.out.weight" in differing
        assert "blocks.0.sparsifier.D" in differing
        assert "blocks.0.attention.U" not in differing
    else:
        assert not differing


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_training_starts_from_the_plain_model_where_the_table_says_so(name):
    ids = token_ids()
    same = torch.allclose(variant_lm(name)(ids), plain_lm(name)(ids), atol=1e-6)
    assert same == (name in START_PLAIN)


@pytest.mark.parametrize("name", ["free-query", "free-value", "free-both"])
def test_new_matrices_are_drawn_like_u(name):
    lm = variant_lm(name, n_embd=64, n_layer=1)
    shared = dict(plain_lm(name, n_embd=64, n_layer=1).named_parameters())
    drawn = {n: w for n, w in lm.named_parameters() if n not in shared}
    assert len(drawn) == variants.VARIANTS[name].extra_products
    for w in drawn.values():
        assert w.shape == (64, 64)
        assert 0.019 < w.std().item() < 0.021


@PARAMETRIZED
def test_every_parameter_gets_a_gradient(name):
    lm = stirred(variant_lm(name), 0.1)
    lm(token_ids(), token_ids(seed=4)).backward()
    silent = [n for n, w in lm.named_parameters() if w.grad is None or not w.grad.any()]
    assert not silent


# ---- a language model ----------------------------------------------------------------------------


@PARAMETRIZED
def test_logits_do_not_depend_on_later_tokens(name):
    lm = stirred(variant_lm(name))
    ids = token_ids(rows=1)
    logits = lm(ids)
    for t in range(1, T):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % V
        differs = (lm(changed) != logits).any(-1)[0]
        before, after = differs[:t], differs[t:]
        assert not before.any()
        assert after.any()


@PARAMETRIZED
def test_generation_with_the_cache_equals_generation_without(name):
    lm = stirred(variant_lm(name))
    prompt = token_ids(length=4)
    settings = dict(n_new=T, temperature=0)  # beyond the context, so that the window slides
    cached = generate(lm, prompt, **settings)
    assert cached.equal(generate(lm, prompt, use_cache=False, **settings))


@PARAMETRIZED
def test_bf16_autocast_trains_and_generates(name):
    lm = stirred(variant_lm(name), 0.1).float()
    ids = token_ids()
    exact = lm(ids, ids)
    with torch.autocast("cpu", torch.bfloat16):
        loss = lm(ids, ids)
        loss.backward()
        continued = generate(lm, ids[:, :4], T, temperature=0)
    assert loss.item() != exact.item()
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
    assert all(w.grad.dtype == torch.float32 for w in lm.parameters())
    assert continued.shape == (2, 4 + T)


@PARAMETRIZED
def test_cached_logits_equal_those_of_the_whole_text(name):
    lm = stirred(variant_lm(name))
    ids = token_ids()
    whole = lm(ids)
    with torch.no_grad(), kv_cache(lm, 3):
        parts = [lm(ids[:, :3]), lm(ids[:, 3:4]), lm(ids[:, 4:])]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def matrix_products(lm):
    """FLOP of a forward pass as PyTorch counts them, without the scores of attention."""
    counter = FlopCounterMode(display=False)
    with ops.use_backend("reference"), torch.no_grad(), counter:
        lm(token_ids())
    counts = counter.get_flop_counts()["Global"]
    return sum(n for op, n in counts.items() if "attention" not in str(op))


@PARAMETRIZED
def test_products_counted_by_pytorch_are_those_of_the_table(name):
    config, n_tokens = fields(name), token_ids().numel()
    extra = matrix_products(variant_lm(name)) - matrix_products(plain_lm(name))
    extra_products = variants.VARIANTS[name].extra_products
    assert extra == 2 * n_tokens * config.n_layer * extra_products * D**2
    forward = variants.flops_per_token(name, config, training=False)
    assert forward - device.flops_per_token(config, training=False) == extra / n_tokens
    assert variants.flops_per_token(name, config) == 3 * forward


# ---- checkpoints, refusals -----------------------------------------------------------------------


@PARAMETRIZED
def test_a_checkpoint_loads_with_its_variant_only(name, tmp_path):
    lm = variant_lm(name)
    checkpoint.save(tmp_path, lm, tokenizer={"spec": "bytes"}, training={"step": 1})
    with pytest.raises(UserError, match=f"weights and config do not fit .*variant_{name}"):
        checkpoint.load(tmp_path)
    with variants.installed(name):
        loaded, _ = checkpoint.load(tmp_path)
    assert loaded(token_ids()).equal(lm(token_ids()))
    other = "no-self" if name == "log-scale" else "log-scale"
    with variants.installed(other), pytest.raises(UserError, match="do not fit"):
        checkpoint.load(tmp_path)


def test_plain_classes_return_when_the_block_ends_however_it_ends():
    slots = {slot: getattr(model, slot) for slot in ("LM", "MSSA", "ISTA", "Block")}
    with pytest.raises(ZeroDivisionError), variants.installed("no-self"):
        assert model.MSSA is variants.NoSelf
        assert checkpoint.LM is model.LM is not slots["LM"]
        raise ZeroDivisionError
    assert {slot: getattr(model, slot) for slot in slots} == slots
    assert checkpoint.LM is model.LM


REFUSED = {
    "two-shifts": (dict(key_shift=True), "two-shifts does not go with --key-shift"),
    "free-query": (dict(query_rank=3), "free-query needs --query-rank 0, but it is 3"),
    "free-both": (dict(query_rank=3), "free-both needs --query-rank 0"),
    "fista": (dict(ista_steps=2), "fista needs --ista-steps 3 or more, but it is 2"),
    "nesterov-layers": (dict(n_layer=1), "nesterov-layers needs --n-layer 2 or more"),
    "no-self": (dict(attention="mhsa", query_rank=0), "no-self needs --attention mssa"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_config_that_contradicts_the_variant_is_refused(name):
    changes, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        variant_lm(name, **changes)


def test_fista_refuses_an_mlp():
    with pytest.raises(UserError, match="fista needs --sparsifier ista, but it is mlp"):
        variant_lm("fista", sparsifier="mlp")


# ---- the command ---------------------------------------------------------------------------------


def command(*words):
    """`python -m crate_mini.studies.variants WORDS` in a child, to its end."""
    return run_script(["-m", "crate_mini.studies.variants", *words], timeout=180)


def test_the_command_trains_resumes_and_records_itself(text, tmp_path):  # noqa: F811
    out = str(tmp_path / "run")
    done = command("free-both", *tiny(text, out, 2))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("variant   free-both: ")
    assert "2 d^2 products per token and layer not counted below" in done.stdout
    recorded = facts(out)["command"]
    assert recorded.startswith("python -m crate_mini.studies.variants free-both --")
    with variants.installed("free-both"):
        lm, _ = checkpoint.load(tmp_path / "run" / "last")
    assert type(lm.blocks[0].attention) is variants.FreeBoth
    resumed = command("free-both", "--resume", out, "--train-steps", "3")
    assert resumed.returncode == 0, resumed.stderr
    assert "step 3/3" in resumed.stdout


def test_the_command_refuses_in_one_sentence():
    cases = {
        (): "no variant given; choose query-gain, ",
        ("no-sef",): "unknown variant 'no-sef' (did you mean no-self?); choose ",
        ("no-self", "--model", "gpt2"): "variant no-self needs --attention mssa",
        ("no-self", "--train-step", "2"): "unknown argument '--train-step'",
    }
    for words, message in cases.items():
        done = command(*words)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {message}")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [["--help"], ["-h"], []])
def test_the_list_has_one_line_per_variant(words):
    done = command(*words)
    lines = done.stdout.splitlines()[2:]
    assert [line.split()[0] for line in lines] == list(variants.VARIANTS)
    assert max(map(len, lines)) < 100


def test_every_need_names_a_field_of_config():
    for name, variant in variants.VARIANTS.items():
        for field in variant.needs:
            assert hasattr(model.Config, field), name
            assert cli.flag_name(field).startswith("--")
