"""Excerpts are text of their documents with the activations it had, as many as protocols take."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from little_world import H, recorded, truth
from numpy.lib.stride_tricks import sliding_window_view

from crate_mini import UserError
from crate_mini.neurons.documents import PARTS
from crate_mini.neurons.excerpts import SELECTORS, select

PROTOCOLS = list(SELECTORS)


def occurs(tokens, acts, chunks):
    """Whether a chunk (ids, acts) holds tokens[1:] with these activations, after tokens[0]."""
    n = len(acts)
    for ids, true in chunks:
        if len(ids) < n:
            continue
        matches = (sliding_window_view(ids, n) == tokens[1:]).all(1)
        for start in np.flatnonzero(matches):
            before = ids[start - 1] if start else -1
            close = np.allclose(acts, true[start : start + n], rtol=1e-3, atol=1e-4)
            if close and before == tokens[0]:
                return True
    return False


@given(
    st.sampled_from(PROTOCOLS),
    st.sampled_from(["L0", "L1"]),
    st.integers(0, H - 1),
    st.integers(0, 99),
)
@settings(max_examples=60)
def test_excerpts_are_honest(protocol, site, j, seed):
    """Text of its document with the activations it had there; no document is in both parts."""
    both = select(recorded(), site, protocol, j, seed)
    assert not set(both[0].doc) & set(both[1].doc)
    for part, chosen in zip(PARTS, both):
        n, w = chosen.acts.shape
        assert chosen.tokens.shape == (n, w + 1)
        assert len(chosen.doc) == len(chosen.position) == len(chosen.origin) == n
        real = chosen.tokens[:, 1:] >= 0
        assert np.array_equal(real, ~np.isnan(chosen.acts)) and chosen.acts.dtype == np.float32
        assert np.isfinite(chosen.acts[real]).all()
        chunks = {}
        for doc, ids, acts in truth()[part]:
            chunks.setdefault(doc, []).append((ids, acts[:, int(site[1]), j]))
        for i, doc in enumerate(chosen.doc):
            m = real[i].sum()
            assert occurs(chosen.tokens[i, : m + 1], chosen.acts[i, :m], chunks[doc])


def test_numbers_of_excerpts_are_those_of_the_protocols():
    r = recorded()
    dense = int(np.argmax(r.site("L0")["density"]))

    def numbers(protocol):
        fit, score = select(r, "L0", protocol, dense)
        return len(fit.acts), len(score.acts)

    assert numbers("openai_tar") == (5, 10)
    assert numbers("openai_random") == (5, 5)
    assert numbers("anthropic_crate")[0] == 42
    assert select(r, "L0", "openai_tar", dense)[1].origin.count("top") == 5
    fit, score = select(r, "L0", "uniform", dense)
    acts = r.site("L0")["uniform_score_acts"][:, :, dense].astype(np.float32)
    assert np.array_equal(score.acts, acts)
    assert fit.acts.shape[1] == 64


def test_unknown_protocols_and_neurons_are_named():
    with pytest.raises(UserError, match="protocol 'bogus' is unknown"):
        select(recorded(), "L0", "bogus", 0)
    with pytest.raises(UserError, match="no neuron 64"):
        select(recorded(), "L0", "uniform", 64)


@given(st.integers(0, H - 1), st.integers(0, 50))
def test_openai_random_is_half_of_openai_tar_and_seeds_decide(j, seed):
    def score_part(protocol, seed):
        return select(recorded(), "L1", protocol, j, seed)[1]

    tar, random = score_part("openai_tar", seed), score_part("openai_random", seed)
    half = [i for i, origin in enumerate(tar.origin) if origin == "random"]
    assert np.array_equal(tar.tokens[half], random.tokens)
    assert np.array_equal(tar.acts[half], random.acts)
    again = score_part("openai_tar", seed)
    assert np.array_equal(again.tokens, tar.tokens) and again.origin == tar.origin
    assert len({score_part("openai_random", s).doc.tobytes() for s in range(9)}) > 1


class HandMade:
    """A record of one site with one neuron: given uniform activations, top windows of one token.

    uniform (n, 64); top: how many top windows there are, with peaks from `peak` downwards.
    """

    def __init__(self, uniform, top=36, peak=1.0):
        n, rng = len(uniform), np.random.default_rng(0)
        self.shared, self.arrays = {}, {"max": np.array([peak])}
        slots = np.arange(36)
        for i, part in enumerate(PARTS):
            tokens = rng.integers(0, 20, (n, 65))
            tokens[: n // 2] = 7  # drawn for all neurons, these are top windows of this one
            acts = np.zeros((1, 36, 64), np.float16)
            acts[0, :top, 10] = peak * (1 - np.arange(top) / 1000)
            docs = np.where(slots < top, 500 + 1000 * i + slots, -1)
            self.shared[f"uniform_{part}"] = tokens
            self.shared[f"uniform_{part}_doc"] = np.arange(n) + 1000 * i
            self.arrays[f"uniform_{part}_acts"] = uniform[..., None]
            self.arrays[f"top_{part}_acts"] = acts
            self.arrays[f"top_{part}_tokens"] = np.full((1, 36, 65), 7)
            self.arrays[f"top_{part}_doc"] = docs[None]
            self.arrays[f"top_{part}_at"] = np.full((1, 36), 10)

    def site(self, name):
        return self.arrays


def evenly_spread():
    """(30, 64): each activation from 0 to 1 once, in random order."""
    values = np.random.default_rng(1).permutation(np.linspace(0, 1, 30 * 64))
    return values.reshape(30, 64).astype(np.float32)


def chosen_acts(excerpts, origin):
    """Activations of one origin's excerpts, each at the position that it was chosen for."""
    acts = excerpts.acts[np.arange(len(excerpts.acts)), excerpts.position]
    return acts[[name == origin for name in excerpts.origin]]


@pytest.mark.parametrize(
    "protocol, steps, sizes, tops",
    [
        ("anthropic_crate", 12, (42, 47), (15, 10)),
        ("anthropic_2023", 13, (49, 60), (10, 6)),
    ],
)
def test_intervals_hold_the_ranks_and_the_values_they_name(protocol, steps, sizes, tops):
    both = select(HandMade(evenly_spread()), "L0", protocol, 0)
    assert tuple(len(chosen.acts) for chosen in both) == sizes
    for chosen, top in zip(both, tops):
        for i in range(steps - 1):
            acts = chosen_acts(chosen, f"interval {i}")
            assert len(acts) == 2 and (acts >= i / steps - 1e-3).all()
            assert (acts <= (i + 1) / steps + 1e-3).all()
        assert f"interval {steps - 1}" not in chosen.origin
        assert chosen.origin.count("top") == top and chosen.origin[:top] == ["top"] * top
        assert (chosen_acts(chosen, "top") > 0.9).all()


def test_out_of_context_is_three_tokens_in_the_papers_code():
    _, score = select(HandMade(evenly_spread()), "L0", "anthropic_crate", 0)
    peaks = 1 - np.arange(36) / 1000
    np.testing.assert_allclose(score.acts[:10].max(1), peaks[15:25], rtol=1e-3)
    alone = [i for i, origin in enumerate(score.origin) if origin == "out of context"]
    assert ((score.tokens[alone, 1:] >= 0).sum(1) == 3).all()
    assert (score.position[alone] == 1).all()
    np.testing.assert_allclose(score.acts[alone, 1], peaks[25:35], rtol=1e-3)


def test_out_of_context_is_another_place_of_the_token_in_bricken():
    _, score = select(HandMade(evenly_spread()), "L0", "anthropic_2023", 0)
    elsewhere = [i for i, origin in enumerate(score.origin) if origin == "out of context"]
    assert len(elsewhere) == 20
    in_top_window = (score.tokens[elsewhere] == 7).all(1)
    assert not in_top_window.any(), "the context of the top windows themselves"
    assert (score.tokens[elsewhere, 1 + score.position[elsewhere]] == 7).all()


def test_a_sparse_neuron_gives_what_there_is():
    acts = np.zeros((30, 64), np.float32)
    acts[3, 40] = 0.5
    _, score = select(HandMade(acts, top=2), "L0", "anthropic_2023", 0)
    assert score.origin.count("top") == 2
    intervals = [origin for origin in score.origin if origin.startswith("interval")]
    assert intervals == ["interval 6"]  # 0.5 of 1 in 13 steps
    assert chosen_acts(score, "interval 6") == 0.5
    random = [i for i, origin in enumerate(score.origin) if origin == "random"]
    assert len(random) == 10 and score.acts[random].max() in (0, 0.5)


def test_a_dead_neuron_has_no_top_and_ties_fall_at_random():
    dead = HandMade(np.zeros((30, 64), np.float32), top=0, peak=0.0)
    for protocol in PROTOCOLS:
        fit, score = select(dead, "L0", protocol, 0)
        assert "top" not in fit.origin + score.origin
        assert not np.nan_to_num(score.acts).any()
    assert select(dead, "L0", "openai_random", 0)[0].acts.shape == (0, 64)
    lowest = []  # documents of the lowest ranks, which any of the 30 windows may hold
    for seed in range(40):
        lowest += select(dead, "L0", "anthropic_crate", 0, seed)[0].doc[:2].tolist()
    assert len(set(lowest)) > 15


def test_the_draw_of_one_part_does_not_depend_on_the_other():
    acts = np.random.default_rng(2).random((30, 64)).astype(np.float32)
    whole, cut = HandMade(acts), HandMade(acts)
    cut.arrays["uniform_score_acts"] = cut.arrays["uniform_score_acts"][:9] * 0.5
    for name in ("uniform_score", "uniform_score_doc"):
        cut.shared[name] = cut.shared[name][:9]
    for protocol in PROTOCOLS:
        fit, score = select(whole, "L0", protocol, 0)
        same_fit, other_score = select(cut, "L0", protocol, 0)
        assert np.array_equal(fit.tokens, same_fit.tokens)
        assert np.array_equal(fit.doc, same_fit.doc)
        assert not np.array_equal(score.doc, other_score.doc)
    windows = []  # of the intervals, which are as many in both parts, with equal values
    for chosen in select(whole, "L0", "anthropic_crate", 0):
        in_interval = [origin.startswith("interval") for origin in chosen.origin]
        windows.append(chosen.doc[in_interval] % 1000)
    assert np.mean(windows[0] == windows[1]) < 0.5


@pytest.mark.parametrize("peak", [0, 2, 61, 63])
def test_excerpts_move_to_stay_in_their_window(peak):
    planted = HandMade(np.zeros((3, 64), np.float32))
    for part in PARTS:
        planted.arrays[f"top_{part}_at"][:] = peak
        planted.arrays[f"top_{part}_acts"][:] = 0
        planted.arrays[f"top_{part}_acts"][0, :, peak] = 1
    fit, score = select(planted, "L0", "anthropic_crate", 0)
    assert (fit.acts[np.arange(15), fit.position[:15]] == 1).all() and fit.acts.shape[1] == 8
    assert (score.acts[-10:][np.arange(10), score.position[-10:]] == 1).all()
