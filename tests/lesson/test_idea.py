"""The page crate_mini/course/idea.md is true: its code prints what it shows, its claims hold.

The first part runs the page; then one part for each of its sections.
"""

import contextlib
import io
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny

from crate_mini import course, intervene, loss, model, reference
from crate_mini.model import KINDS, MHSA, MSSA, Block, Config, attend, shift_keys

PAGE = Path(course.__file__).with_name("idea.md").read_text(encoding="utf-8")
PROSE = " ".join(re.sub(r"^(```.*?^```|    .*?$)", "", PAGE, flags=re.S | re.M).split())
SEEDS = st.integers(0, 2**31)
FULL = 40.0  # a gate whose sigmoid is 1 in float64
fuzz = pytest.mark.fuzz


def normal(seed, *shape):
    """Standard normal numbers, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def orthonormal(seed, d, K):
    """K orthonormal bases (K, d, d / K) that together span everything."""
    return torch.linalg.qr(normal(seed, d, d))[0].unflatten(1, (K, -1)).transpose(0, 1)


def heads(Z, U):
    """u_k = Z U_k of every head, (K, N, p)."""
    return torch.einsum("nd,kdp->knp", Z, U)


def rate(Z, U):
    return reference.compression_rate(heads(Z, U).transpose(0, 1)).item()


def causal(scores):
    """Scores (.., T, T) with 0 for later tokens."""
    return scores.tril()


def gradient(function, start):
    """The gradient of a scalar function at `start`, by autograd."""
    start = start.clone().requires_grad_()
    return torch.autograd.grad(function(start), start)[0]


# ---- the page ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page():
    """Everything that the page's code defines, and [(printed, shown)] for each block."""
    names, outputs = {}, []
    blocks = re.findall(r"^```python\n(.*?)^```\n```text\n(.*?)^```", PAGE, re.S | re.M)
    assert len(blocks) == PAGE.count("```python")
    for code, shown in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        outputs.append((printed.getvalue(), shown))
    return names, outputs


def test_each_block_prints_what_the_page_shows(page):
    for printed, shown in page[1]:
        assert printed == shown


def test_the_numbers_in_the_prose_are_those_of_the_code(page):
    names = page[0]
    Z, M, U, downhill = (names[name] for name in ("Z", "M", "U", "downhill"))
    across = names["across"]
    pairs = [(M - Z, downhill), (M, downhill), (-Z, downhill), (across(M), across(downhill))]
    for step, direction in pairs:
        cosine = F.cosine_similarity(step.flatten(), direction.flatten(), dim=0)
        assert f"{cosine:+.2f}" in PROSE
    normed = F.layer_norm(Z + M, Z.shape[1:])
    assert f"from {rate(Z, U):.1f} to {rate(Z + M, U):.1f}" in PROSE
    assert f"R^c is lower: {rate(normed, U):.1f}" in PROSE
    gradient_step = F.layer_norm(names["gradient_step"], Z.shape[1:])
    share = (rate(Z, U) - rate(normed, U)) / (rate(Z, U) - rate(gradient_step, U))
    assert round(1 / share) == 7 and "about a seventh" in PROSE
    alpha = 32 / (64 * reference.EPS2)
    largest = torch.linalg.matrix_norm(heads(Z, U), 2).max() ** 2
    assert f"it is {round(alpha * largest.item(), -3):,.0f}." in PROSE
    assert f"ln 101 = {math.log(101):.3f}" in PROSE
    assert f"ln 51 = {math.log(51):.3f}" in PROSE


def test_the_code_that_the_page_names_exists():
    places = (reference, model, intervene, loss, Config(), Path(course.__file__).parents[1])
    for name in re.findall(r"`(\w+(?:\.py)?)`", PROSE):
        found = [place for place in places if hasattr(place, name)]
        assert found or (places[-1] / name).exists(), name


def test_the_page_lists_all_that_crate_plus_changes():
    listed = dict(re.findall(r"`(\w+)=(\w+)`", PROSE))
    changes = {name: str(value) for name, value in KINDS["crate+"].items()}
    assert {"attention": "mssa", "sparsifier": "ista", **listed} == changes


def test_the_page_can_be_read_in_ten_minutes():
    assert len(PROSE.split()) <= 1900


# ---- 1: the objective ----------------------------------------------------------------------------


@fuzz
@given(seed=SEEDS, N=st.integers(1, 12), d=st.integers(1, 9))
def test_every_direction_costs_half_the_logarithm_of_its_variance_over_the_error(seed, N, d):
    Z = normal(seed, N, d)
    variances = torch.linalg.svdvals(Z).square() / N
    expected = 0.5 * (variances * d / reference.EPS2).log1p().sum()
    torch.testing.assert_close(reference.coding_rate(Z), expected)


# ---- 2: attention --------------------------------------------------------------------------------


@fuzz
@given(seed=SEEDS, N=st.integers(1, 12))
def test_the_gradient_is_what_ridge_regression_leaves_of_each_token(seed, N):
    """(I + alpha G)^-1 u = u - G (G + I / alpha)^-1 u, the residual of kernel ridge regression."""
    Z, U = normal(seed, N, 8), normal(seed + 1, 2, 8, 4)
    alpha = 4 / (N * reference.EPS2)
    u = heads(Z, U)
    gram = u @ u.mT
    identity = torch.eye(N, dtype=Z.dtype)
    predicted = gram @ torch.linalg.solve(gram + identity / alpha, u)
    expected = alpha * torch.einsum("knp,kdp->nd", u - predicted, U)
    torch.testing.assert_close(reference.compression_gradient(Z, U), expected)
    inverse = torch.linalg.inv(identity + alpha * gram)
    written = alpha * torch.einsum("knp,kdp->nd", inverse @ u, U)
    torch.testing.assert_close(written, expected)


@fuzz
@given(seed=SEEDS, kappa=st.floats(0.01, 1))
def test_the_step_shrinks_each_token_and_moves_it_towards_similar_ones(seed, kappa):
    """To first order it is the derived half step, with alpha u u^T where MSSA has a softmax."""
    Z, U = normal(seed, 12, 8), orthonormal(seed + 1, 8, 2)
    alpha = 4 / (12 * reference.EPS2)
    c = kappa * alpha
    u = heads(Z, U)
    attracted = torch.einsum("knp,kdp->nd", alpha * u @ u.mT @ u, U)
    expected = (1 - c) * Z + c * attracted
    torch.testing.assert_close(reference.compression_step(Z, U, kappa), expected)
    averaged = torch.einsum("knp,kdp->nd", (u @ u.mT).softmax(-1) @ u, U)
    torch.testing.assert_close(reference.mssa(Z, U, causal=False), averaged)


def across(step, Z):
    """The part of a step that turns each token but leaves its length."""
    return step - (step * Z).sum(1, keepdim=True) / Z.square().sum(1, keepdim=True) * Z


@fuzz
@given(seed=SEEDS)
def test_the_derived_step_is_downhill_and_attention_without_its_weights_is_not(seed):
    """On random tokens: the page's experiment, for every seed."""
    Z = F.layer_norm(normal(seed, 64, 128), (128,))
    U = orthonormal(seed + 1, 128, 4)
    M = reference.mssa(Z, U, scale=32**-0.5, causal=False)
    downhill = -reference.compression_gradient(Z, U)
    assert ((M - Z) * downhill).sum() > 0 > (M * downhill).sum()
    assert (across(M, Z) * across(downhill, Z)).sum() > 0
    gradient_step = Z + downhill * (M - Z).norm() / downhill.norm() / 2
    assert rate(gradient_step, U) < rate((Z + M) / 2, U) < rate(Z, U) < rate(Z + M, U)
    derived = F.layer_norm((Z + M) / 2, (128,))
    deployed = F.layer_norm(Z + M, (128,))
    torch.testing.assert_close(derived, deployed, rtol=1e-4, atol=1e-4)  # the eps of LayerNorm
    gradient_step = F.layer_norm(gradient_step, (128,))
    assert rate(gradient_step, U) < rate(deployed, U) < rate(Z, U)


def test_no_theorem_makes_the_derived_step_go_down():
    """The page's two tokens on a line."""
    assert "Tokens 1 and 5 on a line" in PROSE
    Z = torch.tensor([[1.0], [5.0]], dtype=torch.float64)
    U = torch.ones(1, 1, 1, dtype=torch.float64)
    M = reference.mssa(Z, U, causal=False)
    assert 1 < M[0] < 5
    for c in (0.01, 0.1, 0.5):
        assert rate((1 - c) * Z + c * M, U) > rate(Z, U)


# ---- 3: one projection ---------------------------------------------------------------------------


@fuzz
@given(seed=SEEDS)
def test_the_gradient_sees_tokens_only_through_their_projections(seed):
    Z, other = normal(seed, 12, 8), normal(seed + 1, 12, 8)
    U = orthonormal(seed + 2, 8, 4)[:2]  # two of the four subspaces
    basis = U.transpose(0, 1).flatten(1)
    unseen = other - other @ basis @ basis.T
    expected = reference.compression_gradient(Z, U)
    torch.testing.assert_close(reference.compression_gradient(Z + unseen, U), expected)
    assert not torch.allclose(reference.compression_gradient(Z + other, U), expected)


# ---- 4: the sparsifier ---------------------------------------------------------------------------


def sparse_coding(seed, d=5, h=9):
    """x (4, d), non-negative codes a (4, h) and D (d, h)."""
    return normal(seed, 4, d), normal(seed + 1, 4, h).relu(), normal(seed + 2, d, h)


@fuzz
@given(seed=SEEDS, eta=st.floats(0.01, 1), lam=st.floats(0, 1), size=st.floats(1e-3, 1))
def test_a_step_is_the_exact_minimum_of_the_penalty_near_a_gradient_step(seed, eta, lam, size):
    x, a, D = sparse_coding(seed)
    moved = a + eta * (x - a @ D.T) @ D

    def proximal(b):
        return lam * b.sum(-1) + (b - moved).square().sum(-1) / (2 * eta)

    best = reference.ista_step(a, x - a @ D.T, D, eta, lam)
    other = (best + size * normal(seed + 3, 4, 9)).relu()
    assert (best >= 0).all()
    assert (proximal(other) >= proximal(best)).all()


@fuzz
@given(seed=SEEDS, stability=st.floats(0.01, 1.99), lam=st.floats(0, 1))
def test_a_step_below_the_stability_limit_never_raises_the_lasso(seed, stability, lam):
    x, a, D = sparse_coding(seed)
    eta = stability / torch.linalg.matrix_norm(D, 2).item() ** 2
    for start in (a, torch.zeros_like(a)):
        stepped = reference.ista_step(start, x - start @ D.T, D, eta, lam)
        before = reference.lasso(x, start, D, lam)
        assert (reference.lasso(x, stepped, D, lam) <= before * (1 + 1e-12)).all()


@pytest.mark.parametrize("stability", [2.1, 2.5, 4])
def test_a_step_beyond_the_stability_limit_can_raise_it(stability):
    x = D = torch.ones(1, 1)
    a = reference.ista_codes(x, D, stability, 0.0, 1)
    assert reference.lasso(x, a, D, 0.0) > 0.5


@fuzz
@given(seed=SEEDS)
def test_the_first_step_is_a_relu_layer_and_the_second_subtracts_what_is_explained(seed):
    x, _, D = sparse_coding(seed)
    first = (0.1 * x @ D - 0.01).relu()
    torch.testing.assert_close(reference.ista_codes(x, D, 0.1, 0.1, 1), first)
    second = (first + 0.1 * x @ D - 0.01 - 0.1 * first @ (D.T @ D)).relu()
    torch.testing.assert_close(reference.ista_codes(x, D, 0.1, 0.1, 2), second)


def test_the_step_size_starts_near_its_limit():
    torch.manual_seed(0)
    D = model.LM(model.preset("1L", vocab_size=8, block_size=4)).blocks[0].sparsifier.D
    limit = 0.1 * torch.linalg.matrix_norm(D, 2).item() ** 2
    assert limit == pytest.approx(1.8, abs=0.1)
    assert Config().eta == 0.1 and Config().ista_steps == 2


def test_the_reconstruction_replaces_the_stream_and_is_not_sparse():
    lm = tiny("crate")
    block, z = lm.blocks[0], normal(0, 1, 12, 16).float()
    output, a = block(z)
    torch.testing.assert_close(output, a @ block.sparsifier.D.T)
    assert (a == 0).float().mean() > 0.1
    assert (output != 0).all()


# ---- 5: the language model -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_asks_for_nothing_but_the_next_token(kind):
    lm = tiny(kind).train()
    ids = torch.randint(37, (2, 13), generator=torch.Generator().manual_seed(0))
    expected = F.cross_entropy(lm(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(lm(ids[:, :-1], ids[:, 1:]), expected)


@fuzz
@given(seed=SEEDS)
def test_a_head_averages_its_own_past_with_scores_over_sqrt_p(seed):
    u = normal(seed, 1, 2, 7, 4)
    weights = causal((u @ u.mT / 2).exp())
    expected = weights / weights.sum(-1, keepdim=True) @ u
    torch.testing.assert_close(attend(u, u, u), expected)


# ---- 6: scores that cannot look back -------------------------------------------------------------


@fuzz
@given(seed=SEEDS, T=st.integers(2, 12), p=st.integers(1, 5))
def test_no_two_tokens_both_score_the_other_above_themselves(seed, T, p):
    u = normal(seed, T, p)
    scores = u @ u.T
    torch.testing.assert_close(scores, scores.T)
    longest = u.norm(dim=-1).argmax()
    assert scores[longest].argmax() == longest
    prefers = scores > scores.diagonal()[:, None]  # [t, s]: t scores s above itself
    assert not (prefers & prefers.T).any()
    longer = u.norm(dim=-1)[None] > u.norm(dim=-1)[:, None]
    assert not (prefers & ~longer).any()


def test_lengths_that_fall_along_the_text_are_a_loophole():
    """Seven positions that turn by 40 degrees and halve: each scores its predecessor highest."""
    t = torch.arange(7, dtype=torch.float64)
    angles = t * math.radians(40)
    u = torch.stack([angles.cos(), angles.sin()], 1) * 0.5 ** t[:, None]
    scores = (u @ u.T).masked_fill(torch.ones(7, 7).triu(1) > 0, -math.inf)
    assert scores[1:].argmax(1).tolist() == list(range(6))


def last_output(layer, Z):
    with torch.no_grad():
        return layer(Z[None])[0, -1]


@pytest.mark.parametrize("kind", [MSSA, MHSA])
@pytest.mark.parametrize("key_shift", [False, True])
def test_attention_in_one_layer_needs_the_shift_to_see_the_order_of_the_past(kind, key_shift):
    config = Config(vocab_size=8, n_embd=8, n_head=2, key_shift=key_shift)
    layer = kind(config).double()
    for seed in range(5):
        for i, weights in enumerate(layer.parameters()):
            weights.data.copy_(normal(seed + i, *weights.shape))
        Z = normal(seed, 9, 8)
        order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
        reordered = torch.cat([Z[order], Z[-1:]])
        same = torch.allclose(last_output(layer, Z), last_output(layer, reordered))
        assert same != key_shift


def walsh(n):
    """n orthogonal rows of 1 and -1; all but the first have mean 0, so LayerNorm keeps them."""
    rows = torch.ones(1, 1, dtype=torch.float64)
    while len(rows) < n:
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    return rows


@fuzz
@given(order=st.permutations(range(7)), place=st.integers(0, 5))
def test_a_shifted_head_finds_what_followed_and_a_plain_one_finds_the_token_itself(order, place):
    """Seven words in any order, then one of them again; U is set by hand, nothing is trained."""
    words = walsh(8)[1:]
    text = torch.tensor([*order, order[place]])
    for key_shift, expected in ((False, order[place]), (True, order[place + 1])):
        layer = MSSA(Config(vocab_size=8, n_embd=8, n_head=1, key_shift=key_shift)).double()
        layer.U.data.copy_(2 * torch.eye(8))
        layer.out.weight.data.copy_(torch.eye(8))
        layer.out.bias.data.zero_()
        if key_shift:
            layer.key_gate.data.fill_(FULL)
        assert (words @ last_output(layer, words[text])).argmax() == expected


# ---- 6: how the key shift stands to the theory ---------------------------------------------------


def sequence(seed, T, p):
    """Tokens u (T, p), their predecessors with 0 before the first, and A = sum u_{s-1}^T u_s."""
    u = normal(seed, T, p)
    previous = F.pad(u, (0, 0, 1, -1))
    return u, previous, previous.T @ u


def pair_rate(y, u, previous, alpha):
    """R of all pairs (u_{s-1}, u_s) and of the unfinished pair (u_t, y), t the last token."""
    unfinished = torch.cat([u[-1], y])[None]
    pairs = torch.cat([torch.cat([previous, u], 1), unfinished])
    N, width = pairs.shape
    return reference.coding_rate(pairs, eps2=width / (N * alpha))


def pair_slope(y, u, previous, alpha):
    """grad_y of pair_rate."""
    return gradient(partial(pair_rate, u=u, previous=previous, alpha=alpha), y)


def linear_head(u, gate):
    """A causal head with shifted keys and without softmax, at the last token."""
    keys = shift_keys(u[None, None], gate)[0, 0]
    return (causal(u @ keys.T) @ u)[-1]


SIZES = dict(seed=SEEDS, T=st.integers(2, 20), p=st.integers(1, 6))


@fuzz
@given(**SIZES)
def test_a_shifted_head_without_softmax_returns_what_the_page_writes(seed, T, p):
    u, _, A = sequence(seed, T, p)
    gate = torch.full((p,), FULL, dtype=torch.float64)
    torch.testing.assert_close(linear_head(u, gate), u[-1] @ A)


@fuzz
@given(**SIZES)
def test_it_is_the_first_order_gradient_step_on_the_rate_of_pairs(seed, T, p):
    """The neglected rest of -grad_y R is of order alpha^3: halving alpha divides it by eight."""
    u, previous, A = sequence(seed, T, p)
    blank = torch.zeros(p, dtype=u.dtype)
    rests = []
    for alpha in (1e-5, 5e-6):
        downhill = -pair_slope(blank, u, previous, alpha)
        rests.append((downhill - alpha**2 * (u[-1] @ A)).norm().item())
    assert rests[0] / rests[1] == pytest.approx(8, rel=0.05)


@fuzz
@given(**SIZES, alpha=st.floats(1e-3, 1e3))
def test_the_cheapest_end_of_a_pair_is_the_ridge_prediction_of_the_next_token(seed, T, p, alpha):
    u, previous, A = sequence(seed, T, p)
    penalty = torch.eye(p, dtype=u.dtype) / alpha
    ridge = u[-1] @ torch.linalg.solve(penalty + previous.T @ previous, A)
    slope = pair_slope(ridge, u, previous, alpha)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-8)
    best = pair_rate(ridge, u, previous, alpha)
    for size in (-1.0, 0.1, 1.0):
        other = ridge + size * normal(seed + 1, p)
        assert pair_rate(other, u, previous, alpha) > best


def test_far_from_first_order_it_can_point_uphill():
    slopes = []
    for seed in range(20):
        u, previous, A = sequence(seed, 16, 8)
        slope = pair_slope(torch.zeros_like(u[0]), u, previous, 50.0)
        slopes.append((slope @ (u[-1] @ A)).item())
    assert min(slopes) < 0 < max(slopes)


@fuzz
@given(**SIZES)
def test_it_is_one_gradient_step_of_in_context_regression(seed, T, p):
    u, previous, A = sequence(seed, T, p)
    W = torch.zeros(p, p, dtype=u.dtype)
    slope = gradient(lambda W: 0.5 * (u - previous @ W).square().sum(), W)
    torch.testing.assert_close(slope, -A)


@fuzz
@given(**SIZES, alpha=st.floats(1e-3, 1e3))
def test_a_small_such_step_lowers_the_rate_of_the_residuals(seed, T, p, alpha):
    u, previous, A = sequence(seed, T, p)

    def residual_rate(size):
        return reference.coding_rate(u - size * previous @ A, eps2=p / (T * alpha))

    start = torch.zeros((), dtype=u.dtype)
    slope = gradient(residual_rate, start)
    inverse = torch.linalg.inv(torch.eye(p, dtype=u.dtype) + alpha * u.T @ u)
    torch.testing.assert_close(slope, -alpha * (A @ inverse @ A.T).trace())
    assert slope < 0


@fuzz
@given(**SIZES)
def test_a_partial_shift_without_softmax_adds_the_two_steps(seed, T, p):
    u, _, A = sequence(seed, T, p)
    gate = normal(seed + 1, p)
    share = gate.sigmoid()
    expected = u[-1] * (1 - share) @ (u.T @ u) + u[-1] * share @ A
    torch.testing.assert_close(linear_head(u, gate), expected)


@fuzz
@given(**SIZES)
def test_the_softmax_multiplies_the_two_similarities_and_averages(seed, T, p):
    """With a full shift that is kernel regression of the next token on the token."""
    u, previous, _ = sequence(seed, T, p)
    for gate in (normal(seed + 1, p), torch.full((p,), FULL, dtype=torch.float64)):
        share = gate.sigmoid()
        like_itself = (u @ (u[-1] * (1 - share)) / math.sqrt(p)).exp()
        like_previous = (previous @ (u[-1] * share) / math.sqrt(p)).exp()
        weights = like_itself * like_previous
        expected = weights @ u / weights.sum()
        tokens = u[None, None]
        output = attend(tokens, shift_keys(tokens, gate), tokens)[0, 0, -1]
        torch.testing.assert_close(output, expected)
    assert (like_itself == 1).all() and like_previous[0] == 1


# ---- 7: crate+ -----------------------------------------------------------------------------------


@fuzz
@given(seed=SEEDS)
def test_one_tied_step_has_a_symmetric_jacobian_without_negative_eigenvalues(seed):
    x, _, D = sparse_coding(seed)
    decoder = normal(seed + 3, *D.shape)

    def step(x, decoder=D):
        return reference.ista(x, D, 0.1, 0.1, 1, decoder)[0]

    jacobian = torch.autograd.functional.jacobian(step, x[0])
    torch.testing.assert_close(jacobian, jacobian.T)
    assert torch.linalg.eigvalsh(jacobian).min() > -1e-12
    free = torch.autograd.functional.jacobian(partial(step, decoder=decoder), x[0])
    assert torch.allclose(free, free.T) == (not free.any())


def test_the_sparsifier_of_crate_plus_is_an_mlp_with_a_fixed_threshold():
    lm = tiny("crate+")
    block, z = lm.blocks[0], normal(0, 1, 12, 16).float()
    D, decoder = block.sparsifier.D, block.sparsifier.decoder
    middle = z + block.attention(z)
    hidden = (0.1 * block.sparsifier.norm(middle) @ D - 0.1 * 0.1).relu()
    torch.testing.assert_close(block(z)[0], middle + hidden @ decoder.T)


def test_the_query_correction_makes_scores_asymmetric():
    torch.manual_seed(0)
    A, B = tiny("crate+").blocks[0].attention.query
    u = normal(0, 12, 16).float()
    scores = (u + u @ A @ B) @ u.T
    assert not torch.allclose(scores, scores.T)
    assert torch.linalg.matrix_rank(A @ B) == 3


# ---- 8: neurons ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_setting_a_neuron_moves_the_output_along_its_atom(kind):
    lm = tiny(kind)
    block, z = lm.blocks[1], normal(0, 1, 12, 16).float()
    sparsifier = block.sparsifier
    writers = {"crate": "D", "crate+": "decoder", "gpt2": "proj.weight"}
    atom = dict(sparsifier.named_parameters())[writers[kind]][:, 5]
    output, a = block(z)

    def set_neuron(codes):
        codes = codes.clone()
        codes[..., 5] = 3.0
        return codes

    with intervene.hook_codes(lm, 1, set_neuron):
        steered, _ = block(z)
    expected = output + (3.0 - a[..., 5:6]) * atom
    torch.testing.assert_close(steered, expected, rtol=1e-4, atol=1e-5)
    with intervene.hook_codes(lm, 1, torch.clone):  # every neuron at its own value
        assert torch.equal(block(z)[0], output)


@fuzz
@given(seed=SEEDS, lam=st.floats(0, 1))
def test_a_neuron_first_fires_when_its_atom_exceeds_the_threshold(seed, lam):
    x, _, D = sparse_coding(seed)
    a = reference.ista_codes(x, D, 0.1, lam, 1)
    assert torch.equal(a > 0, x @ D > lam)


def test_the_twin_is_the_other_filling_of_both_slots():
    twin, crate = Block(model.preset("3L", "gpt2")), Block(model.preset("3L", "crate"))
    assert isinstance(twin.attention, MHSA) and isinstance(crate.attention, MSSA)
    assert twin.residual and not crate.residual
