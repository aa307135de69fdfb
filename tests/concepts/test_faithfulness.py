"""Probes judge honestly; ablations find what is planted, and nothing where nothing is."""

import numpy as np
import pytest
import torch
from planted_concepts import planted_concepts

from crate_mini import UserError
from crate_mini.concepts import ablate, faithfulness, probe

# ---- probes --------------------------------------------------------------------------------------


def test_folds_are_stratified():
    label = np.repeat([0, 1], [60, 30])
    fold = probe.stratified_folds(label, 10, 0)
    assert all(np.bincount(label[fold == f]).tolist() == [6, 3] for f in range(10))


def test_no_text_is_judged_by_a_probe_that_saw_it():
    """Noise with random labels: nothing can be learned except by memorizing."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(200, 64, generator=generator)
    label = torch.randint(2, (200,), generator=generator)
    right = probe.Probes(h, label, 2, 10).right(h)
    assert 0.35 < right.mean() < 0.65
    with pytest.raises(UserError, match="too few for 20 folds"):
        probe.Probes(h[:39], label[:39], 2)


def test_a_probe_is_trained_and_stopped_without_the_texts_that_it_is_judged_on(monkeypatch):
    """Other labels in a fold change all probes but the one that is judged on it."""

    def every_fifth(label, folds, seed):
        return np.arange(len(label)) % folds

    monkeypatch.setattr(probe, "stratified_folds", every_fifth)
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(60, 8, generator=generator)
    label = torch.randint(2, (60,), generator=generator)
    other = torch.where(torch.arange(60) % 5 == 2, 1 - label, label)
    weights, other_weights = (probe.Probes(h, y, 2, 5).weights[0] for y in (label, other))
    same = [torch.equal(a, b) for a, b in zip(weights, other_weights)]
    assert same == [False, False, True, False, False]


# ---- verdicts ------------------------------------------------------------------------------------


def verdict(n_right, n_intact=100, chance=0.5, least=None):
    right, intact = (np.arange(100) < n for n in (n_right, n_intact))
    return faithfulness.outcome(right, intact, chance, least=least)["verdict"]


def test_below_chance_is_called_a_sign_flip():
    assert verdict(6) == "sign flip"
    assert verdict(50) == "at chance"
    assert verdict(80) == "drop"
    assert verdict(100) == "no drop"
    # Of five classes the smallest, answered to every text, is still chance.
    assert verdict(17, chance=0.24, least=0.17) == "at chance"
    assert verdict(6, chance=0.24, least=0.17) == "sign flip"
    assert verdict(6, n_intact=55) == "nothing to lose"


def test_one_text_has_its_own_value_for_an_interval():
    outcome = faithfulness.outcome(np.array([False]), np.array([True]), 0.0)
    assert outcome["drop_ci95"] == [1.0, 1.0]


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Texts are drawn; a text is right or wrong before and after, or its probability changes."""
    rng, hits = np.random.default_rng(0), {"accuracy": 0, "drop": 0, "change": 0, "90 % planted": 0}
    for _ in range(400):
        intact = rng.random(60) < 0.9
        right = intact & (rng.random(60) < 0.8)
        outcome = faithfulness.outcome(right, intact, 0.5)
        hits["accuracy"] += outcome["ci95"][0] <= 0.72 <= outcome["ci95"][1]
        low, high = outcome["drop_ci95"]
        hits["drop"] += low <= 0.18 <= high
        low, high = faithfulness.interval(rng.beta(0.5, 2, 60))
        hits["change"] += low <= 0.2 <= high
        less = 0.16 * (high - low) / 2  # 1.645 of 1.96
        hits["90 % planted"] += low + less <= 0.2 <= high - less
    shares = {name: count / 400 for name, count in hits.items()}
    planted = shares.pop("90 % planted")
    assert all(0.90 <= share <= 0.98 for share in shares.values()), shares
    assert planted < shares["change"] - 0.02


def test_a_shared_mean_makes_an_ablation_flip_the_sign():
    """The README's caution, on data: codes share a large mean, and the class is a small part."""
    generator = torch.Generator().manual_seed(0)
    u, m = ablate.unit(torch.randn(2, 64, generator=generator))
    y = (torch.arange(400) % 2).float()[:, None] * 2 - 1
    h = 20 * m + 1.5 * y * u + 0.3 * torch.randn(400, 64, generator=generator)
    label = (y[:, 0] > 0).long()
    probes = probe.Probes(h, label, 2, 10)
    ablated = ablate.without(h, ablate.unit(20 * m + 5.0 * y * u))
    outcome = faithfulness.outcome(probes.right(ablated), probes.right(h), 0.5)
    assert probes.right(h).mean() > 0.95 and outcome["verdict"] == "sign flip"
    retrained = probe.Probes(ablated, label, 2, 10)
    assert retrained.right(ablated).mean() > 0.95  # nothing was lost


# ---- ablations -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes():
    """(outcomes of the planted codes, outcomes of the shared controls)."""
    model, vectors, codes, texts = planted_concepts()
    ablations = faithfulness.Ablations(model, vectors, texts, seed=0, n_all=100)
    shared_right, shared = ablations.shared_controls()
    return ablations.of_codes(codes, shared_right), shared


@pytest.mark.parametrize("form", faithfulness.FORMS)
def test_the_true_code_is_missed_and_a_random_direction_is_not(outcomes, form):
    outcomes, shared = outcomes
    intact, own, noise = shared[form]["intact"], outcomes[form]["own"], shared[form]["gaussian"]
    survives = outcomes["survives"][form]
    assert intact["accuracy"] > 0.95 and noise["accuracy"] > 0.95
    assert noise["verdict"] == "no drop"
    assert own["accuracy"] < 0.65 and own["verdict"] in ("at chance", "drop", "sign flip")
    assert own["drop"] == pytest.approx(intact["accuracy"] - own["accuracy"])
    assert survives["gaussian"]["passes"]
    assert form in faithfulness.PROBES or own["probability_change"] < 0
    # The codes of both classes are one line, so another text's code does the same harm.
    assert not survives["another"]["passes"]
    assert outcomes[form]["retrained"]["accuracy"] < 0.65  # gone, not moved


def test_every_variant_and_control_is_there(outcomes):
    outcomes, shared = outcomes
    for form in faithfulness.FORMS:
        assert set(outcomes[form]) == {*ablate.CODE_VARIANTS, "retrained"}
        assert set(shared[form]) == {*ablate.SHARED_VARIANTS, "intact"}
    assert set(outcomes["partners"]) == {"another", "same class", "other class"}
    assert "own" in faithfulness.table({"planted": outcomes}, shared, "probe, mean")
