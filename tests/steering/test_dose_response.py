"""steer.py measure: what it writes, and each number by hand."""

import json
import math
from operator import itemgetter

import numpy as np
import pytest
import steer_command
import torch
from hypothesis import given
from hypothesis import strategies as st
from steer_command import run_steer, steer_error
from tiny_checkpoints import H, save_checkpoint, write_scores
from tiny_models import tiny

from crate_mini import UserError, model
from crate_mini.intervene import Intervention, hook_codes, steer
from crate_mini.lab import Lab
from crate_mini.neurons.relatives import atoms
from crate_mini.sae import autoencoder
from crate_mini.steering import dose_response, measure
from crate_mini.steering.known import maxima
from crate_mini.training import checkpoint

SMALL = ("--neurons", "2", "--doses", "1,4", "--tokens", "64")

# Fixtures.
cache = steer_command.cache
text = steer_command.text
ckpt = steer_command.ckpt


def written(folder):
    return json.loads((folder / "steering.json").read_text())


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", model.KINDS)
def test_measure_has_controls_and_inserting_a_neuron_costs_nothing(text, tmp_path, kind):
    ckpt = save_checkpoint(tmp_path / "best", text, kind)
    lm, _ = checkpoint.load(ckpt)
    facts = autoencoder.save(tmp_path, autoencoder.SAE(H, 256, layer=1, k=8), lm, {})
    write_scores(ckpt)
    sae = str(tmp_path / f"sae-L1-{facts['name']}")
    output = run_steer("measure", *SMALL, "--sae", sae, ckpt=ckpt)
    assert f"`python interpret.py report {ckpt}` shows it" in output
    result = written(tmp_path / "interpret")
    for row in result["inserted"]:
        costs = row["kind"] == "feature"
        assert (row["kl"] > 0) == costs and (row["loss"] != 0) == costs
    assert {(row["layer"], row["kind"]) for row in result["inserted"]} == {
        (0, "neuron"),
        (1, "neuron"),
        (1, "feature"),
        (1, "feature+error"),
    }
    of_neurons = 2 * 2 * 2 * 2  # layers, neurons, kinds, doses
    of_features = 2 * 2 * 2
    assert len(result["rows"]) == of_neurons + of_features
    for summary in result["summary"].values():
        for intervals in summary["doses"].values():
            for interval in intervals.values():
                assert interval["ci95"][0] <= interval["mean"] <= interval["ci95"][1]
    assert result["command"].startswith("python steer.py measure") and result["seed"] == 1337
    assert result["machine"]["commit"] and result["checkpoint"]["sha256"]
    first = result["live"][0]
    assert 3 not in first["drawn"] and first["live"] < H  # the dead one
    assert (tmp_path / "interpret" / "steering.png").read_bytes().startswith(b"\x89PNG")
    assert "| 0 | neuron | 0 | +0 |" in output and "feature+error | 1x" in output
    last = [row for row in result["attribution"] if row["layer"] == 1]
    assert len(result["attribution"]) == 4
    for row in last:
        assert row["correlation"] > 0.8
        assert row["null"] < row["correlation"]  # another neuron's attribution tells less


def test_measure_is_the_same_for_the_same_seed(ckpt, tmp_path, monkeypatch):
    def no_figure(drawn, target):
        return target

    monkeypatch.setattr(measure, "figure", no_figure)
    rows = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run_steer("measure", *SMALL, "--seed", seed, "--out", str(tmp_path / name), ckpt=ckpt)
        rows.append(written(tmp_path / name)["rows"])
    assert rows[0] == rows[1] != rows[2]


def test_the_figure_shows_other_models_too(ckpt, tmp_path):
    run_steer("measure", *SMALL, "--out", str(tmp_path / "a"), ckpt=ckpt)
    other = str(tmp_path / "a" / "steering.json")
    words = ("--out", str(tmp_path / "b"), "--beside", other)
    run_steer("measure", *SMALL, *words, ckpt=ckpt)
    alone, together = ((tmp_path / name / "steering.png").stat().st_size for name in "ab")
    assert together > alone


@pytest.mark.parametrize(
    "words, message",
    [
        (("--doses", "0,1"), "--doses '0,1' must lie above 0"),
        (("--doses", "x"), "is not a list of numbers"),
        (("--doses", "nan"), "is not a list of numbers"),
        (("--doses", "1,nan"), "is not a list of numbers"),
        (("--doses", "1e19"), "is not a list of numbers"),
        (("--doses", "1e7"), "at most a million"),
        (("--tokens", "90000"), "lower --tokens"),
        (("--neurons", "0"), "--neurons 0 must lie in 1 to"),
        (
            ("--beside", "none.json"),
            "directory; expected what `python steer.py measure CKPT` writes",
        ),
        (
            ("--sae", "none"),
            "directory; expected a file that `python interpret.py sae CKPT` writes",
        ),
    ],
)
def test_bad_settings_are_answered_in_one_sentence(ckpt, tmp_path, words, message):
    assert message in steer_error("measure", *SMALL, "--out", str(tmp_path), *words, ckpt=ckpt)


def test_what_cannot_be_drawn_or_written_is_refused_before_the_work(ckpt, tmp_path, monkeypatch):
    def too_late(*_, **__):
        pytest.fail("measured before the settings were checked")

    monkeypatch.setattr(dose_response, "measure", too_late)
    other = tmp_path / "other.json"
    other.write_text('{"runs": []}')
    message = steer_error("measure", "--beside", str(other), ckpt=ckpt)
    assert "is not a steering.json" in message
    assert "it is not a folder" in steer_error("measure", "--out", str(other), ckpt=ckpt)


# ---- what is measured ----------------------------------------------------------------------------


def test_windows_share_no_token(ckpt):
    corpus = Lab(ckpt).held_out()
    available = []
    for x, _ in corpus.blocks("val", 256, 16):
        if x.shape[1] == 16:
            available += x.tolist()
    parts = [x.tolist() for x, _, _ in dose_response.windows(corpus, 16, 20, seed=0)]
    assert [len(part) for part in parts[:2]] == [20, 20]
    assert sorted(sum(parts, [])) == sorted(available)
    with pytest.raises(UserError, match="lower --tokens"):
        dose_response.windows(corpus, 16, 10**5, seed=0)


def test_followers_are_what_follows():
    """A neuron planted on token 5 is followed by 9 and 7, not by what is frequent elsewhere."""
    lm = tiny("crate")
    x = torch.tensor([[1, 2, 5, 9, 5, 7], [5, 9, 1, 2, 1, 2]])
    y = torch.tensor([[2, 5, 9, 5, 7, 1], [9, 1, 2, 1, 2, 1]])

    def plant(codes):
        return torch.cat(((x == 5)[..., None].float(), codes[..., 1:]), -1)

    with hook_codes(lm, 0, plant):
        followers = dose_response.followers(lm, 0, None, [0], [(x, y)], 2)
        assert sorted(followers.tolist()[0]) == [7, 9]
        assert maxima(lm, 0, [x])[0] == 1


def test_a_response_is_measured_on_text_that_chose_nothing():
    """KL(unsteered || steered), loss and log-probabilities by hand; continuations elsewhere."""
    lm = tiny("crate")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        lm.tokens.weight.mul_(8)
    V = lm.config.vocab_size

    def batch():
        return torch.randint(V, (2, 6), generator=generator)

    choose, measured = (batch(), batch()), (batch(), batch())
    intervention = Intervention(0, 5, "add", 4.0)
    baseline = dose_response.Baseline(lm, choose, measured, 20)

    def log_p(ids, *interventions):
        with torch.no_grad(), steer(lm, interventions):
            return lm(ids).flatten(0, 1).log_softmax(-1)

    x, y = measured
    p, q = log_p(x), log_p(x, intervention)
    response = baseline.response(intervention, {"some": torch.tensor([2, 7])})
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    reverse = (q.exp() * (q - p)).sum(-1).mean().item()
    assert response["kl"] == pytest.approx(kl, rel=1e-3)
    assert response["kl"] != pytest.approx(reverse, rel=1e-2)
    loss = (p - q)[range(12), y.flatten()].mean().item()
    assert response["loss"] == pytest.approx(loss, rel=1e-4)
    assert response["some"] == pytest.approx((q - p)[:, [2, 7]].mean().item(), rel=1e-4)
    raised = []
    for ids in (choose[0], x):
        change = log_p(ids, intervention).exp().mean(0) - log_p(ids).exp().mean(0)
        raised.append(change.topk(20).indices.tolist())
    assert baseline.continuations(intervention).tolist() == raised[0] != raised[1]
    assert response["windows"] == [1, 1]  # each its own document here
    for name in ("kl", "loss", "some"):
        assert np.mean(response["by_group"][name]) == pytest.approx(response[name], rel=1e-4)


def test_the_first_kind_names_the_continuations_of_all():
    class Fake:
        def continuations(self, intervention):
            assert intervention.value == dose_response.CHOOSE * 0.5
            return torch.tensor([intervention.neuron])

        def response(self, intervention, tokens):
            return {name: (intervention.value, ids.tolist()) for name, ids in tokens.items()}

    kinds = {"neuron": Intervention(0, 7), "random": Intervention(0, 9)}
    rows = dose_response.responses(Fake(), kinds, 0.5, [1.0, 4.0], torch.tensor([3]))
    expected = []
    for kind, own in (("neuron", 7), ("random", 9)):
        for value in (0.5, 2.0):
            expected.append((kind, (value, [7]), (value, [own]), (value, [3])))
    assert [(row["kind"], row["effect"], row["own"], row["seen"]) for row in rows] == expected


# ---- summaries -----------------------------------------------------------------------------------


def test_features_of_two_autoencoders_are_two_though_they_share_a_number():
    rows = []
    for name, effect in (("a", 1.0), ("b", 3.0)):
        for kind in ("feature", "feature+error"):
            for dose in (0.5, 2):
                row = {"layer": 0, "sae": name, "neuron": 5, "kind": kind, "dose": dose}
                row |= {"kl": dose / 10, "loss": 0.0, "seen": 0.0}
                rows.append({**row, "effect": effect * dose, "own": effect * dose})
    own = dose_response.summary(rows, 0)["feature"]["at_kl"]["own"]
    assert own["n"] == 2
    contrasts = dose_response.contrasts(rows, 0)
    assert contrasts["feature - feature+error"]["own"]["n"] == 2
    alone = []
    for name in "ab":
        features = [row for row in rows if (row["sae"], row["kind"]) == (name, "feature")]
        alone.append(dose_response.at_kl(features, "own"))
    assert own["mean"] == pytest.approx(sum(alone) / 2)


def made_up_rows(neuron, kind, gain, smallest=0.01):
    rows = []
    for kl in (smallest, 0.05, 0.5):
        row = {"layer": 0, "neuron": neuron, "kind": kind, "kl": kl}
        rows.append({**row, "own": gain, "seen": 2 * gain})
    return rows


def test_pairs_compare_the_same_neurons_where_both_reach_the_side_effect():
    rows = [
        *made_up_rows(1, "neuron", 3.0),
        *made_up_rows(1, "random", 1.0),
        *made_up_rows(2, "neuron", 5.0),
        *made_up_rows(2, "random", 4.5),
        *made_up_rows(3, "neuron", 90.0),
    ]
    assert dose_response.contrasts(rows, 0).keys() == {"neuron - random"}
    feature = made_up_rows(1, "feature", 7.0)
    with_error = made_up_rows(1, "feature+error", 8.0)
    contrasts = dose_response.contrasts([*rows, *feature, *with_error], 0)
    assert contrasts["neuron - random"]["own"]["mean"] == pytest.approx(1.25)
    assert contrasts["neuron - random"]["seen"]["mean"] == pytest.approx(2.5)
    assert contrasts["neuron - random"]["own"]["n"] == 2
    assert contrasts["feature - feature+error"]["own"]["mean"] == -1
    costly = [{**row, "kl": 1.0} for row in feature]  # above the side effect from the start
    contrasts = dose_response.contrasts([*costly, *with_error], 0)
    assert "feature - feature+error" not in contrasts


POINTS = st.lists(
    st.tuples(st.floats(1e-6, 2), st.floats(-3, 3)),
    min_size=1,
    max_size=6,
    unique_by=itemgetter(0),
)


@given(POINTS)
def test_effects_at_equal_side_effect(points):
    rows = [{"kl": kl, "effect": effect} for kl, effect in points]
    interpolated = dose_response.at_kl(rows, "effect")
    sides = [kl for kl, _ in points]
    effects = [effect for _, effect in points]
    if min(sides) <= dose_response.AT_KL <= max(sides):
        assert min(effects) - 1e-9 <= interpolated <= max(effects) + 1e-9
    else:
        assert interpolated is None


def test_between_doses_the_effect_is_linear_in_the_logarithm_of_the_side_effect():
    rows = []
    for factor in (0.25, 1.0):
        rows.append({"kl": 2 * dose_response.AT_KL * factor, "effect": math.log(factor)})
    assert dose_response.at_kl(rows, "effect") == pytest.approx(math.log(0.5))


def crossed(rng, neurons, groups, share=0.6):
    """Versions of values that neurons and groups of documents shift, each by an effect of its own.

    share: of the documents' effect in that of the neurons.
    """
    effects = rng.normal(1.0, 1.0, neurons), share * rng.normal(size=groups)
    cells = effects[0] + effects[1][:, None] + 0.5 * rng.normal(size=(groups, neurons))
    without = (cells.sum(0) - cells) / (groups - 1)
    return [cells.mean(0).tolist(), *without.tolist()]


def share_covered(versions_of_one):
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        low, high = dose_response.interval(versions_of_one(rng), rng)["ci95"]
        hits += low <= 1.0 <= high
    return hits / 400


def test_intervals_hold_the_mean_as_often_as_they_claim():
    assert 0.90 <= share_covered(lambda rng: [rng.normal(1.0, 2.0, 40).tolist()]) <= 0.98
    assert 0.90 <= share_covered(lambda rng: crossed(rng, 24, 8)) <= 0.98
    assert 0.90 <= share_covered(lambda rng: crossed(rng, 12, 16)) <= 0.98
    neurons_alone = share_covered(lambda rng: crossed(rng, 24, 8)[:1])
    assert neurons_alone < 0.88, "the planted fault: documents are not redrawn"
    rng = np.random.default_rng(0)
    nothing = {"n": 0, "mean": None, "ci95": None}
    assert dose_response.interval([[None, None]], rng) == nothing
    assert dose_response.interval([[None, 2.0]], rng) == {"n": 1, "mean": 2.0, "ci95": None}


def test_a_row_without_a_group_of_documents_is_that_of_the_others():
    row = {"kl": 0.2, "own": 1.5, "windows": [3, 1], "by_group": {"kl": [0.1, 0.5], "own": [1, 3]}}
    whole, first, second = dose_response.versions_of([row])
    assert whole == [row]
    assert first == [{**row, "kl": 0.5, "own": 3.0}]
    assert second == [{**row, "kl": pytest.approx(0.1), "own": 1.0}]
    plain = {"kl": 0.2, "own": 1.5}
    assert dose_response.versions_of([plain]) == [[plain]]
    one = {**row, "windows": [4], "by_group": {"kl": [0.2], "own": [1.5]}}
    assert dose_response.versions_of([one]) == [[one], [one]]


def test_windows_are_measured_by_the_documents_they_begin_in(ckpt):
    lab = Lab(ckpt)
    corpus, eot = lab.held_out(), lab.tokenizer.eot
    ids = corpus.streams["val"].read(0, corpus.n_tokens["val"])
    _, measuring, _ = dose_response.windows(corpus, 16, 20, seed=0, eot=eot)
    starts = {tuple(ids[i : i + 16].tolist()): i for i in range(0, len(ids) - 16, 16)}
    for x, document in zip(measuring[0].tolist(), measuring[2].tolist()):
        assert document == int((ids[: starts[tuple(x)]] == eot).sum())


@pytest.mark.parametrize("kind", model.KINDS)
def test_random_directions_move_the_stream_as_far(kind):
    lm = tiny(kind)
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        codes = lm.trunk(ids)[1][1]
    neuron = int((codes > 0).float().mean((0, 1)).argmax())
    change = Intervention(1, neuron, "set", 2.0)
    control = dose_response.random_control(change, lm, torch.Generator().manual_seed(0))
    where = torch.ones(2, 10, dtype=torch.bool)
    with torch.no_grad():
        moved = [(i.apply(codes, where) - codes) @ atoms(lm, 1).T for i in (change, control)]
    torch.testing.assert_close(moved[0].norm(dim=-1), moved[1].norm(dim=-1))
    assert torch.nn.functional.cosine_similarity(*moved, dim=-1).abs().max() < 0.9
    again = dose_response.random_control(change, lm, torch.Generator().manual_seed(0))
    assert torch.equal(control.along, again.along)
