"""The KV cache: the same logits and the same text as without it, in half of GPT-2's memory."""

import pytest
import torch
from closeness import assert_close
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import VARIANTS, T, V, tiny

from crate_mini import UserError, ops
from crate_mini.generate import generate, kv_cache


@pytest.mark.parametrize("kind", VARIANTS)
@given(
    cuts=st.lists(st.integers(1, T - 1), unique=True, max_size=4),
    rows=st.integers(1, 3),
    backend=st.sampled_from(["reference", "auto"]),
    seed=st.integers(0, 9),
)
def test_cached_logits_are_those_of_the_whole_text(kind, cuts, rows, backend, seed):
    """However the text is cut into passes; judged in float64 by the tolerance policy."""
    lm = tiny(kind, seed)
    names = [name for name, _ in lm.named_parameters()]
    weights = [w.detach() for w in lm.parameters()]
    ids = torch.randint(V, (rows, T), generator=torch.Generator().manual_seed(seed))
    ends = [0, *sorted(cuts), T]
    with ops.use_backend(backend), torch.no_grad(), kv_cache(lm, T):
        passes = [lm(ids[:, start:end]) for start, end in zip(ends, ends[1:])]

    def whole(*weights):
        with ops.use_backend("reference"), torch.no_grad():
            return [torch.func.functional_call(lm, dict(zip(names, weights)), (ids,))]

    assert_close([torch.cat(passes, 1)], whole, *weights, names=["logits"])


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_text_is_the_same_with_and_without_cache_even_beyond_the_window(kind, temperature):
    lm = tiny(kind)
    ids = torch.arange(10).view(2, 5)
    texts = []
    for use_cache in (True, False):
        generator = torch.Generator().manual_seed(3)
        texts.append(generate(lm, ids, 2 * T, temperature, 9, generator, use_cache))
    assert texts[0].shape == (2, 5 + 2 * T)
    assert torch.equal(*texts)
    assert lm.cache is None
    assert all(block.attention.cache is None for block in lm.blocks)


def test_the_cache_saves_passes_over_old_tokens():
    lm, lengths = tiny("crate"), []
    handle = lm.tokens.register_forward_hook(lambda m, args, out: lengths.append(args[0].shape[1]))
    generate(lm, torch.arange(5)[None], T - 4)
    handle.remove()
    assert lengths == [5] + [1] * (T - 5)


def test_crate_needs_half_of_what_its_twin_needs():
    kept = {}
    for kind in VARIANTS:
        lm = tiny(kind)
        with torch.no_grad(), kv_cache(lm, 5) as cache:
            lm(torch.arange(5)[None])
        kept[kind] = sum(t.numel() for tensors in cache.kept.values() for t in tensors)
    assert kept["crate"] == kept["crate+"] == 2 * T * 16
    assert kept["crate, key shift"] == kept["crate"]  # shifted keys are made from u
    assert kept["gpt2"] == kept["gpt2, key shift"] == 2 * kept["crate"]


def test_a_text_longer_than_the_context_is_refused_and_errors_leave_no_cache():
    lm = tiny("crate")
    with pytest.raises(UserError, match="13 tokens exceed"), kv_cache(lm, 5):
        lm(torch.arange(T)[None])
        lm(torch.arange(1)[None])
    assert lm.cache is None
    assert lm(torch.arange(T)[None]).shape == (1, T, V)


def test_single_tokens_take_the_path_measured_for_few_rows(monkeypatch):
    lm, rows = tiny("crate"), []
    choose = ops.choose

    def counted(op, x):
        if op == "ista_decode":
            rows.append(x.shape[1])
        return choose(op, x)

    monkeypatch.setattr(ops, "choose", counted)
    generate(lm, torch.arange(5)[None], 4)
    assert rows == [1] * 3 * 2  # three new tokens read, in two layers


def test_generation_is_greedy_seeded_and_bounded():
    lm = tiny("crate")
    ids = torch.randint(V, (2, 5), generator=torch.Generator().manual_seed(0))
    out = generate(lm, ids, T, temperature=0)
    assert out.shape == (2, 5 + T)
    assert torch.equal(out[:, :5], ids)
    assert torch.equal(out[:, 5], lm(ids)[:, -1].argmax(-1))
    samples = []
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        samples.append(generate(lm, ids, 9, top_k=5, generator=generator))
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def test_logits_that_are_not_finite_are_refused():
    lm = tiny("crate")
    with pytest.raises(UserError, match="not finite numbers; raise the temperature"):
        generate(lm, torch.arange(5)[None], 3, temperature=1e-45)
    with torch.no_grad():
        lm.blocks[1].sparsifier.D.fill_(float("nan"))
    with pytest.raises(UserError, match="take an earlier checkpoint"):
        generate(lm, torch.arange(5)[None], 3)


@pytest.mark.parametrize(
    "tokens, settings, message",
    [
        (5, {"temperature": -1}, "temperature -1; give 0, which is greedy, or more"),
        (5, {"temperature": float("nan")}, "temperature nan"),
        (5, {"temperature": float("inf")}, "temperature inf"),
        (5, {"top_k": 0}, "top_k 0; give 1 or more, or None"),
        (5, {"top_k": -3}, "top_k -3"),
        (5, {"n_new": -1}, "n_new -1"),
        (0, {}, "an empty prompt"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tokens, settings, message):
    with pytest.raises(UserError, match=message):
        generate(tiny("crate"), torch.arange(tokens)[None], **{"n_new": 2, **settings})
