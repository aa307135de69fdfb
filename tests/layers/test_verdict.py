"""The verdict in words: models with planted behaviour, planted numbers, singular and plural."""

import dataclasses

import pytest
import torch
from tiny_layers import KINDS, D, gaussian, tiny, token_ids

from crate_mini.layers import verdict
from crate_mini.layers.measure import measure_layers


def judged(lm, untrained=None):
    """The verdict on a model, whose control is `untrained`, or itself."""
    trained = measure_layers(lm, [token_ids()])
    control = trained if untrained is None else measure_layers(untrained, [token_ids()])
    config = dataclasses.asdict(lm.config)
    return verdict.judge(
        {"checkpoint": {"config": config}, "trained": trained, "untrained": control}
    )


def sentences(judgement):
    """Every sentence of a verdict that belongs to a layer."""
    found = []
    for layer in judgement["layers"]:
        found += [layer[name]["sentence"] for name in judgement["theory"]]
    return found


# ---- models with planted behaviour ---------------------------------------------------------------


@torch.no_grad()
def with_attention(kind):
    """A model whose first attention compresses, expands, or does nothing.

    It adds one vector to all tokens: a large one makes them alike; if they were alike, its opposite
    sets them apart.
    """
    lm = tiny()
    attention = lm.blocks[0].attention
    common = 100 * gaussian(D).float()
    attention.out.weight.zero_()
    lm.positions.weight.zero_()
    if kind == "compresses":
        attention.out.bias.copy_(common)
    if kind == "expands":
        lm.tokens.weight += common
        attention.out.bias.copy_(-common)
    return lm


@pytest.mark.parametrize(
    "kind, direction",
    [("compresses", "falls"), ("expands", "rises"), ("hardly changes R^c", "stays")],
)
def test_planted_attention_is_recognised(kind, direction):
    judgement = judged(with_attention(kind))
    attention = judgement["layers"][0]["attention"]
    assert attention["direction"] == direction
    assert attention["holds"] == (direction == "falls")
    assert attention["change"] == pytest.approx(attention["after"] - attention["before"])
    subject = "it" if direction == "stays" else "R^c"
    opening = f"{kind}: {subject} goes from {attention['before']:.1f} to {attention['after']:.1f} "
    assert attention["sentence"].startswith(opening)
    assert ("in 3 of 3 windows" in attention["sentence"]) == (direction != "stays")
    assert f"attention {kind}, {attention['before']:.1f} to " in judgement["layers"][0]["brief"]
    assert f"{kind} in " in judgement["overall"]


@torch.no_grad()
def with_dictionary(size, steps=2):
    """A model with an orthogonal D (d, d) of eta |D|^2 = size, and its layers' verdicts."""
    lm = tiny(expansion=1, ista_steps=steps)
    for block in lm.blocks:
        D_of_size_1 = torch.linalg.qr(gaussian(D, D)).Q.float()
        block.sparsifier.D.copy_((size / lm.config.eta) ** 0.5 * D_of_size_1)
    judgement = judged(lm)
    return judgement, judgement["layers"][0]


def test_a_step_of_size_1_reaches_the_optimum_of_orthogonal_atoms():
    judgement, layer = with_dictionary(1.0)
    assert layer["ISTA steps"]["directions"] == ["falls", "stays"]
    assert layer["ISTA steps"]["holds"]
    assert layer["ISTA steps"]["sentence"].startswith(
        "step 1 lowers the objective, step 2 does not change the objective: per coordinate it is"
    )
    assert layer["optimum"]["holds"]
    assert layer["optimum"]["share_of_the_way"] == pytest.approx(1, abs=1e-3)
    assert layer["optimum"]["sentence"].startswith("the codes are as good as the best ones:")
    assert layer["step size"]["holds"]
    assert layer["step size"]["eta_norm2"] == pytest.approx(1.0)
    assert "No ISTA step raises its objective." in judgement["overall"]
    assert "The codes are as good as the best ones, with " in judgement["overall"]
    assert "in the stable range: eta |D|^2 = 1.00, below 2." in judgement["overall"]


def test_small_steps_descend_and_stop_on_the_way():
    judgement, layer = with_dictionary(0.1)
    assert layer["ISTA steps"]["directions"] == ["falls", "falls"]
    assert layer["ISTA steps"]["sentence"].startswith("both steps lower the objective: ")
    assert not layer["optimum"]["holds"]
    # Without a threshold each step leaves 0.9 of the error, so two make 1 - 0.9^4 of the way.
    assert layer["optimum"]["share_of_the_way"] == pytest.approx(1 - 0.9**4, abs=0.02)
    assert "200 steps of this size would not take" in layer["step size"]["sentence"]
    assert "Every ISTA step lowers its objective. The codes go 3" in judgement["overall"]


def test_steps_beyond_the_limit_raise_the_objective():
    judgement, layer = with_dictionary(4.0, steps=1)
    assert layer["ISTA steps"]["directions"] == ["rises"]
    assert not layer["ISTA steps"]["holds"]
    assert layer["ISTA steps"]["sentence"].startswith("step 1 raises the objective: ")
    assert layer["optimum"]["share_of_the_way"] < 0
    assert layer["optimum"]["sentence"].startswith("the codes are worse than zero codes: ")
    assert not layer["step size"]["holds"]
    assert layer["step size"]["sentence"] == (
        "eta |D|^2 = 4.00 is beyond the limit 2; 1 step of this size would take the objective "
        "above that of zero codes."
    )
    assert "An ISTA step raises its objective in both layers." in judgement["overall"]
    assert "The codes are worse than zero codes in both layers." in judgement["overall"]
    assert "In both layers the dictionary is outside the stable range: " in judgement["overall"]
    assert "steps of this size do not converge" in judgement["overall"]
    assert "(after 1 at most)" in judgement["overall"]


def test_the_answer_counts_what_holds():
    good, _ = with_dictionary(1.0)
    for layer in good["layers"]:
        layer["attention"]["holds"] = True
    assert verdict._answer(good["layers"]) == "yes"
    good["layers"][1]["attention"]["holds"] = False
    assert verdict._answer(good["layers"]) == "in part"
    bad, _ = with_dictionary(4.0, steps=1)
    for layer in bad["layers"]:
        layer["attention"]["holds"] = False
    assert verdict._answer(bad["layers"]) == "no"
    for judgement in (good, bad):
        assert judgement["overall"].startswith(verdict.ANSWERS[judgement["answer"]])


def test_training_that_left_the_stable_range_is_named():
    with torch.no_grad():
        lm = tiny()
        for block in lm.blocks:
            block.sparsifier.D.mul_(2)
    overall = judged(lm, untrained=tiny())["overall"]
    assert "In both layers the dictionary has left the stable range: " in overall
    assert "Training took it there: at the start eta |D|^2 was " in overall
    assert "Training" not in judged(lm)["overall"]  # the control is outside, too


def test_steps_beyond_the_limit_that_do_no_harm_are_told_from_those_that_do():
    harmless = {"exceeds_start": None, "steps": 200}
    harmful = {"exceeds_start": 7, "steps": 7}
    none = verdict._after_more_steps({0: harmless, 1: harmless})
    assert none.startswith("; even so, 200 steps of this size do not take the objective above")
    both = verdict._after_more_steps({0: harmful, 1: {**harmful, "exceeds_start": 9}})
    assert both.startswith("; steps of this size do not converge, but")
    assert both.endswith("(after 9 at most)")
    one = verdict._after_more_steps({0: harmless, 1: harmful})
    assert one.startswith("; steps of this size do not converge in layer 1, but")


# ---- kinds of models -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_judged_on_what_applies_to_it(kind):
    lm = tiny(**KINDS[kind])
    judgement = judged(lm)
    scope = " ".join(judgement["scope"])
    config = lm.config
    is_ista = config.sparsifier == "ista"
    aspects = ["attention"] + ["ISTA steps", "optimum", "step size"] * is_ista
    assert list(judgement["theory"]) == aspects
    for layer in judgement["layers"]:
        assert all((layer[name] is not None) == (name in aspects) for name in verdict.THEORY)
    assert ("value projections stand in" in scope) == (config.attention == "mhsa")
    assert ("An MLP has no objective" in scope) == (not is_ista)
    assert ("as far as the theory applies" in judgement["overall"]) == (not is_ista)
    assert ("nothing else can be judged" in judgement["overall"]) == (not is_ista)
    assert ("another matrix writes to the stream" in scope) == config.separate_decoder
    assert ("are added to the stream" in scope) == (is_ista and config.residual)
    assert ("top-k keeps the 3 largest" in scope) == (is_ista and config.top_k == 3)
    for line in verdict.text(judgement).splitlines():
        assert len(line) <= verdict.WIDTH


def test_codes_after_top_k_are_not_taken_for_those_of_the_steps():
    (layer, _) = judged(tiny(**KINDS["top-k"]))["layers"]
    assert layer["optimum"]["sentence"].startswith("the codes in use ")
    assert "the codes in use" in layer["brief"]


def test_a_config_from_before_top_k_is_read():
    config = dataclasses.asdict(tiny().config)
    del config["top_k"], config["debias"]
    assert verdict.changes_to_codes(config) == ""
    assert verdict.scope(config) == []


# ---- planted numbers -----------------------------------------------------------------------------


def optimum(start=0.5, codes=0.3, best=0.1, **changes):
    found = {
        "tokens": 512,
        "start": start,
        "codes": {"objective": codes, "density": 0.4},
        "best": {"objective": best, "density": 0.2},
        "gap": 0.0001,
        "converged": True,
        "iterations": 300,
    }
    return {**found, **changes}


def test_the_way_to_the_optimum_is_measured_from_zero_codes():
    aspect = verdict.judge_optimum(optimum())
    assert aspect["share_of_the_way"] == pytest.approx(0.5)
    assert aspect["sentence"] == (
        "the codes stop 50 % of the way from zero to the best ones: objective 0.300 with 40 % of "
        "them active; the best, 0.100 with 20 % (on 512 tokens)."
    )
    assert aspect["brief"] == "the codes stop 50 % of the way from zero to the best ones"


def test_an_optimum_that_was_not_reached_by_the_search_is_named():
    aspect = verdict.judge_optimum(optimum(converged=False, gap=0.02, iterations=3000, tokens=1))
    assert aspect["sentence"].endswith(
        "(on 1 token). The search for them has not converged in 3,000 iterations: the lowest "
        "objective may be up to 0.02 lower."
    )


def test_zero_codes_that_are_the_best_are_named():
    aspect = verdict.judge_optimum(optimum(codes=0.6, best=0.5))
    assert aspect["share_of_the_way"] is None
    assert aspect["sentence"].startswith("zero codes are already the best: ")


@pytest.mark.parametrize(
    "objectives, clauses",
    [
        ([0.5, 0.3], "step 1 lowers the objective"),
        ([0.5, 0.3, 0.2, 0.1], "all 3 steps lower the objective"),
        ([0.5, 0.3, 0.4], "step 1 lowers the objective, step 2 raises the objective"),
        ([0.5, 0.6, 0.4, 0.3], "steps 2 and 3 lower the objective, step 1 raises the objective"),
        ([0.5, 0.5, 0.5], "both steps do not change the objective"),
    ],
)
def test_steps_are_counted_in_words(objectives, clauses):
    aspect = verdict.judge_steps(objectives)
    assert aspect["brief"] == clauses
    assert aspect["holds"] == ("raise" not in clauses)


def test_bases_that_disagree_are_named():
    def rates(U, orthonormal):
        means = {"U": U, "orthonormal U": orthonormal, "whole": 50.0}
        return {name: {"mean": mean} for name, mean in means.items()}

    layer = {
        "rate": {"attention input": rates(100.0, 90.0), "after attention": rates(98.0, 95.0)},
        "windows": 1,
        "windows_compressed": {"U": 1},
    }
    sentence = verdict.judge_attention(layer)["sentence"]
    assert sentence == (
        "compresses: R^c goes from 100.0 to 98.0 nats (-2.0) and falls in 1 of 1 window; in "
        "orthonormal bases it changes by +5.0. R(Z) changes by 0.0."
    )


# ---- words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "numbers, total, words",
    [
        ([0], 1, "layer 0"),
        ([0, 1], 2, "both layers"),
        ([0, 1, 2], 3, "all 3 layers"),
        ([2], 3, "layer 2"),
        ([1, 2], 3, "layers 1 and 2"),
        ([0, 2, 3, 4, 5], 12, "layers 0 and 2 to 5"),
        ([0, 2, 4, 5], 12, "layers 0, 2, 4 and 5"),
    ],
)
def test_layers_are_named_in_words(numbers, total, words):
    assert verdict.which(numbers, total) == words


def test_ranges_are_written_once_if_they_read_the_same():
    assert verdict.span([0.231, 0.228], verdict.percent) == "23 %"
    assert verdict.span([0.46, 0.42], verdict.percent) == "42 to 46 %"
    assert verdict.span([3.1, 2.7, 3.0], verdict.two_digits) == "2.70 to 3.10"


def test_the_printed_verdict_and_the_headline_hold_every_sentence():
    judgement = judged(tiny())
    printed = " ".join(verdict.text(judgement).split())
    above = " ".join(verdict.headline(judgement, 90).split())
    for sentence in [*sentences(judgement), *judgement["theory"].values(), judgement["overall"]]:
        assert " ".join(sentence.split()) in printed
    for layer in judgement["layers"]:
        assert layer["brief"] in above
    assert judgement["overall"] in above
    assert max(map(len, verdict.headline(judgement, 90).splitlines())) <= 90
