"""The cache of generation: the same logits and the same text as without it, in half of GPT-2's memory."""

import pytest
import torch
from conftest import assert_close
from hypothesis import given
from hypothesis import strategies as st

from crate_mini import UserError, model, ops
from crate_mini.generate import remember

T, V = 12, 37


def tiny(kind, seed=0, **changes):
    torch.manual_seed(seed)
    lm = model.LM(
        model.preset(
            "2L",
            kind,
            vocab_size=V,
            block_size=T,
            n_embd=16,
            n_head=2,
            **({"query_rank": 3} if kind == "crate+" else {}),
            **changes,
        )
    ).eval()
    lm.tokens.weight.data *= 8  # so that next tokens are not all alike
    if kind == "crate+":  # B starts at zero: give the query correction something to do
        for block in lm.blocks:
            torch.nn.init.normal_(block.attention.query[1])
    return lm


@pytest.mark.parametrize("kind", model.KINDS)
@given(
    cuts=st.lists(st.integers(1, T - 1), unique=True, max_size=4),
    rows=st.integers(1, 3),
    backend=st.sampled_from(["reference", "auto"]),
    seed=st.integers(0, 9),
)
def test_cached_logits_are_those_of_the_whole_text(kind, cuts, rows, backend, seed):
    """However the text is cut into passes; held to the equation in float64 by the one tolerance policy."""
    lm = tiny(kind, seed)
    names, weights = zip(*((n, w.detach()) for n, w in lm.named_parameters()))
    idx = torch.randint(V, (rows, T), generator=torch.Generator().manual_seed(seed))
    with ops.use_backend(backend), torch.no_grad(), remember(lm, T):
        cuts = [0, *sorted(cuts), T]
        got = torch.cat([lm(idx[:, a:b]) for a, b in zip(cuts, cuts[1:])], 1)

    def whole(*weights):
        with ops.use_backend("reference"), torch.no_grad():
            return [torch.func.functional_call(lm, dict(zip(names, weights)), (idx,))]

    assert_close([got], whole, *weights, names=["logits"])


@pytest.mark.parametrize("kind", model.KINDS)
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_text_is_the_same_with_and_without_also_beyond_the_window(kind, temperature):
    lm, idx = tiny(kind), torch.arange(10).view(2, 5)
    texts = [
        lm.generate(idx, 2 * T, temperature, 9, torch.Generator().manual_seed(3), cache=cache)
        for cache in (True, False)
    ]
    assert texts[0].shape == (2, 5 + 2 * T) and torch.equal(*texts)
    assert lm.past is None and all(b.attention.past is None for b in lm.blocks)


def test_the_cache_saves_passes_over_old_tokens():
    lm, seen = tiny("crate"), []
    handle = lm.tokens.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1]))
    lm.generate(torch.arange(5)[None], T - 4)
    assert seen == [5] + [1] * (T - 5)
    handle.remove()


def test_crate_needs_half_of_what_its_twin_needs():
    kept = {}
    for kind in model.KINDS:
        lm = tiny(kind)
        with torch.no_grad(), remember(lm, 5) as past:
            lm(torch.arange(5)[None])
        kept[kind] = sum(t.numel() for tensors in past.kept.values() for t in tensors)
    assert kept["crate"] == kept["crate+"] == 2 * T * 16 and kept["gpt2"] == 2 * kept["crate"]


def test_a_text_longer_than_the_context_is_refused_and_errors_leave_no_past():
    lm = tiny("crate")
    with pytest.raises(UserError, match="13 tokens exceed"), remember(lm, 5):
        lm(torch.arange(T)[None])
        lm(torch.arange(1)[None])
    assert lm.past is None and lm(torch.arange(T)[None]).shape == (1, T, V)


def test_single_tokens_go_the_way_that_was_measured_for_few_rows(monkeypatch):
    lm, rows = tiny("crate"), []
    decode = ops.ista_decode
    monkeypatch.setattr(
        ops, "ista_decode", lambda x, *rest: rows.append(x.shape[1]) or decode(x, *rest)
    )
    lm.generate(torch.arange(5)[None], 4)
    assert rows == [1] * 3 * 2  # three new tokens read, in two layers
