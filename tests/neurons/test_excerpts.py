"""Excerpts are honest: text of their documents with the activations it had, in the protocols' numbers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from little_world import H, recorded, truth

from crate_mini import UserError
from crate_mini.neurons import excerpts
from crate_mini.neurons.documents import PARTS

PROTOCOLS = list(excerpts.CHOOSE)


@given(
    st.sampled_from(PROTOCOLS),
    st.sampled_from(["L0", "L1"]),
    st.integers(0, H - 1),
    st.integers(0, 99),
)
@settings(max_examples=60)
def test_excerpts_are_honest(protocol, site, j, seed):
    """No document on both sides; every excerpt is text of its document with the activations it had there."""
    r = recorded()
    both = excerpts.select(r, site, protocol, j, seed)
    assert not set(both[0].doc) & set(both[1].doc)
    for part, e in zip(PARTS, both):
        n, w = e.acts.shape
        assert e.tokens.shape == (n, w + 1) and len(e.doc) == len(e.at) == len(e.origin) == n
        real = e.tokens[:, 1:] >= 0
        assert np.array_equal(real, ~np.isnan(e.acts)) and e.acts.dtype == np.float32
        chunks = {}
        for doc, ids, acts in truth()[part]:
            chunks.setdefault(doc, []).append((ids, acts[:, int(site[1]), j]))
        for tokens, acts, doc, text in zip(e.tokens, e.acts, e.doc, real):
            m = text.sum()
            assert any(
                np.allclose(acts[:m], there[s : s + m], rtol=1e-3, atol=1e-4)
                and (ids[s - 1] if s else -1) == tokens[0]
                for ids, there in chunks[doc]
                for s in range(len(ids) - m + 1)
                if np.array_equal(ids[s : s + m], tokens[1 : 1 + m])
            )
        assert np.isfinite(e.acts[real]).all()


def test_numbers_of_excerpts_are_those_of_the_protocols():
    r = recorded()
    dense = int(np.argmax(r.site("L0")["density"]))
    sizes = {
        "uniform": None,
        "openai_tar": (5, 10),
        "openai_random": (5, 5),
        "anthropic_crate": (42, None),
    }
    for protocol, expected in sizes.items():
        fit, score = excerpts.select(r, "L0", protocol, dense)
        if expected:
            assert len(fit.acts) == expected[0] and expected[1] in (None, len(score.acts)), protocol
    fit, score = excerpts.select(r, "L0", "uniform", dense)
    assert np.array_equal(
        score.acts, r.site("L0")["uniform_score_acts"][:, :, dense].astype(np.float32)
    )
    assert fit.acts.shape[1] == 64
    top = sum(o == "top" for o in excerpts.select(r, "L0", "openai_tar", dense)[1].origin)
    assert top == 5
    with pytest.raises(UserError, match="protocol 'bogus' is unknown"):
        excerpts.select(r, "L0", "bogus", 0)
    with pytest.raises(UserError, match="no neuron 64"):
        excerpts.select(r, "L0", "uniform", 64)


@given(st.integers(0, H - 1), st.integers(0, 50))
def test_openai_random_is_half_of_openai_tar_and_seeds_decide(j, seed):
    r = recorded()
    tar, random = (
        excerpts.select(r, "L1", f"openai_{name}", j, seed)[1] for name in ("tar", "random")
    )
    mine = [i for i, origin in enumerate(tar.origin) if origin == "random"]
    assert np.array_equal(tar.tokens[mine], random.tokens) and np.array_equal(
        tar.acts[mine], random.acts
    )
    again = excerpts.select(r, "L1", "openai_tar", j, seed)[1]
    assert np.array_equal(again.tokens, tar.tokens) and again.origin == tar.origin
    assert (
        len({excerpts.select(r, "L1", "openai_random", j, s)[1].doc.tobytes() for s in range(9)})
        > 1
    )


class Planted:
    """A record of one site made by hand: uniform windows with given activations, top windows of one kind."""

    def __init__(self, uniform, top=36, peak=1.0):
        n, rng = len(uniform), np.random.default_rng(0)
        self.shared, self.arrays = {}, {"max": np.array([peak])}
        for i, part in enumerate(PARTS):
            self.shared[f"uniform_{part}"] = rng.integers(0, 20, (n, 65))
            self.shared[f"uniform_{part}"][: n // 2] = (
                7  # drawn for all, they are top windows of this one
            )
            self.shared[f"uniform_{part}_doc"] = np.arange(n) + 1000 * i
            acts = np.zeros((1, 36, 64), np.float16)
            acts[0, :top, 10] = peak * (1 - np.arange(top) / 1000)
            doc = np.where(np.arange(36) < top, 500 + 1000 * i + np.arange(36), -1)
            self.arrays |= {
                f"uniform_{part}_acts": uniform[..., None],
                f"top_{part}_acts": acts,
                f"top_{part}_tokens": np.full((1, 36, 65), 7),
                f"top_{part}_doc": doc[None],
                f"top_{part}_at": np.full((1, 36), 10),
            }

    def site(self, name):
        return self.arrays


def test_intervals_hold_the_ranks_and_the_values_they_name():
    rng = np.random.default_rng(1)
    values = rng.permutation(np.linspace(0, 1, 30 * 64)).reshape(30, 64).astype(np.float32)
    for protocol, steps, tops in (
        ("anthropic_crate", 12, (15, 10)),
        ("anthropic_2023", 13, (10, 6)),
    ):
        pair = excerpts.select(Planted(values), "L0", protocol, 0)
        assert [len(e.acts) for e in pair] == ([42, 47] if steps == 12 else [49, 60])
        for e, top in zip(pair, tops):
            at = e.acts[np.arange(len(e.at)), e.at]
            for i in range(steps - 1):
                mine = at[[k for k, origin in enumerate(e.origin) if origin == f"interval {i}"]]
                assert len(mine) == 2 and (mine >= i / steps - 1e-3).all()
                assert (mine <= (i + 1) / steps + 1e-3).all()
            assert f"interval {steps - 1}" not in e.origin and e.origin.count("top") == top
            assert e.origin[:top] == ["top"] * top and (at[:top] > 0.9).all()
    fit, score = excerpts.select(Planted(values), "L0", "anthropic_crate", 0)
    np.testing.assert_allclose(score.acts[:10].max(1), 1 - np.arange(15, 25) / 1000, rtol=1e-3)
    lonely = [i for i, origin in enumerate(score.origin) if origin == "out of context"]
    assert ((score.tokens[lonely, 1:] >= 0).sum(1) == 3).all() and (score.at[lonely] == 1).all()
    np.testing.assert_allclose(score.acts[lonely, 1], 1 - np.arange(25, 35) / 1000, rtol=1e-3)
    fit, score = excerpts.select(Planted(values), "L0", "anthropic_2023", 0)
    elsewhere = [i for i, origin in enumerate(score.origin) if origin == "out of context"]
    assert not (score.tokens[elsewhere] == 7).all(1).any(), (
        "the context of the top windows themselves"
    )
    assert (score.tokens[elsewhere, 1 + score.at[elsewhere]] == 7).all() and len(elsewhere) == 20


def test_sparse_and_dead_neurons_give_what_there_is_and_ties_fall_at_random():
    values = np.zeros((30, 64), np.float32)
    values[3, 40] = 0.5
    fit, score = excerpts.select(Planted(values, top=2), "L0", "anthropic_2023", 0)
    assert score.origin.count("top") == 2
    assert [o for o in score.origin if o.startswith("interval")] == [
        "interval 6"
    ]  # 0.5 of 1 in 13 steps
    assert (
        score.acts[score.origin.index("interval 6"), score.at[score.origin.index("interval 6")]]
        == 0.5
    )
    quiet_ones = [i for i, o in enumerate(score.origin) if o == "random"]
    assert len(quiet_ones) == 10 and score.acts[quiet_ones].max() in (0, 0.5)
    dead = Planted(np.zeros((30, 64), np.float32), top=0, peak=0.0)
    for protocol in PROTOCOLS:
        fit, score = excerpts.select(dead, "L0", protocol, 0)
        assert "top" not in fit.origin + score.origin and not np.nan_to_num(score.acts).any()
    assert excerpts.select(dead, "L0", "openai_random", 0)[0].acts.shape == (0, 64)
    drawn = [excerpts.select(dead, "L0", "anthropic_crate", 0, seed)[0].doc for seed in range(40)]
    first = np.concatenate([doc[:2] for doc in drawn])  # of the lowest ranks: all 30 windows alike
    assert len(set(first)) > 15


def test_the_draw_of_one_part_does_not_depend_on_the_other():
    values = np.random.default_rng(2).random((30, 64)).astype(np.float32)
    one, two = Planted(values), Planted(values)
    two.arrays["uniform_score_acts"] = two.arrays["uniform_score_acts"][:9] * 0.5
    for name in ("uniform_score", "uniform_score_doc"):
        two.shared[name] = two.shared[name][:9]
    for protocol in PROTOCOLS:
        a, b = (excerpts.select(r, "L0", protocol, 0) for r in (one, two))
        assert np.array_equal(a[0].tokens, b[0].tokens) and np.array_equal(a[0].doc, b[0].doc)
        assert not np.array_equal(a[1].doc, b[1].doc)
    fit, score = excerpts.select(
        one, "L0", "anthropic_crate", 0
    )  # as many intervals of equal values
    drawn = [e.doc[[o.startswith("interval") for o in e.origin]] % 1000 for e in (fit, score)]
    assert np.mean(drawn[0] == drawn[1]) < 0.5


@pytest.mark.parametrize("at", [0, 2, 61, 63])
def test_excerpts_move_to_stay_in_their_window(at):
    values = np.zeros((3, 64), np.float32)
    planted = Planted(values)
    for part in PARTS:
        planted.arrays[f"top_{part}_at"][:] = at
        planted.arrays[f"top_{part}_acts"][:] = 0
        planted.arrays[f"top_{part}_acts"][0, :, at] = 1
    fit, score = excerpts.select(planted, "L0", "anthropic_crate", 0)
    assert (fit.acts[np.arange(15), fit.at[:15]] == 1).all() and fit.acts.shape[1] == 8
    assert (score.acts[-10:][np.arange(10), score.at[-10:]] == 1).all()
