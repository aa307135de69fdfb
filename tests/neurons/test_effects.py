"""Effects on the next token equal steering each neuron alone in each context."""

import numpy as np
import pytest
import torch

from crate_mini.intervene import Intervention
from crate_mini.model import LM, preset
from crate_mini.neurons.effects import next_token_effects
from crate_mini.sae.autoencoder import SAE
from crate_mini.steering import next_token


def make_model(size, **changes):
    torch.manual_seed(0)
    return LM(preset(size, n_embd=32, **changes)).eval()


def changes_by_steering(model, contexts, intervention, level):
    """Change of log-probability (C, V) at the last token of each context, one pass for each."""
    rows = []
    for ids in contexts.tolist():
        _, codes = next_token.stream(model, torch.tensor([ids]))
        values = codes[intervention.layer][0, -1]
        if intervention.sae is not None:
            values = intervention.sae.encode(values)
        steered = next_token.next_token(model, ids, [intervention])
        change = steered.after - steered.before
        rows.append(change if values[intervention.neuron] < level else torch.zeros_like(change))
    return torch.stack(rows)


@pytest.mark.parametrize("layer, of_features", [(0, False), (1, False), (0, True), (1, True)])
def test_effects_are_those_of_steering_one_by_one(layer, of_features):
    model = make_model("2L", vocab_size=97, block_size=16)
    contexts, neurons = torch.randint(90, (3, 9)), np.array([0, 5, 77, 8, 30])
    read, following = contexts[:, :-1], contexts[:, -1]
    levels, vocab = np.random.default_rng(0).random(len(neurons)) * 20, 90
    sae, encoder = None, {}
    if of_features:
        sae = SAE(model.config.n_code, 140, layer, l1=1e-3).requires_grad_(False)
        encoder = {"encode": sae.encode, "directions": sae.W}
    effects = next_token_effects(
        model, layer, neurons, levels, contexts, vocab, **encoder, most=3, batch=7
    )
    before = model(read)[:, -1].log_softmax(-1)
    for effect, j, level in zip(effects, neurons.tolist(), levels.tolist(), strict=True):
        intervention = Intervention(layer, j, "set", level, "last", sae, keep_error=of_features)
        change = changes_by_steering(model, read, intervention, level)
        mean = change.mean(0)[:vocab]
        for name, sign in (("raised", 1), ("lowered", -1)):
            values, ids = (sign * mean).topk(3)
            assert [id for id, _ in effect[name]] == ids.tolist()
            expected = pytest.approx((sign * values).tolist(), rel=2e-2, abs=1e-5)
            assert [value for _, value in effect[name]] == expected
        assert effect["clamp"] == pytest.approx(level, rel=1e-3)
        assert effect["positions"] == 3
        kl = -(before.exp() * change).sum(-1).mean().item()
        assert effect["kl"] == pytest.approx(kl, rel=2e-2, abs=1e-6)
        loss = -change[range(3), following].mean().item()
        assert effect["loss"] == pytest.approx(loss, rel=2e-2, abs=1e-5)
    assert not model.blocks[layer].sparsifier.code._forward_hooks


@pytest.mark.parametrize("vocab, most", [(40, 10), (64, 10), (3, 10)])
def test_effects_name_no_id_that_only_pads_the_vocabulary(vocab, most):
    model = make_model("1L", vocab_size=64, block_size=8)
    with torch.no_grad():
        model.tokens.weight[40:] *= 30  # so that the padding ids change most
    contexts = torch.randint(40, (2, 5)) % vocab
    effects = next_token_effects(
        model, 0, np.arange(6), np.full(6, 9.0), contexts, vocab, most=most
    )
    for effect in effects:
        ids = [id for name in ("raised", "lowered") for id, _ in effect[name]]
        assert ids and max(ids) < vocab
        assert vocab < 64 or max(ids) >= 40


def test_a_level_that_is_already_reached_changes_nothing():
    model = make_model("1L", vocab_size=64, block_size=8)
    contexts = torch.randint(64, (2, 5))
    (effect,) = next_token_effects(model, 0, np.array([3]), np.array([-1.0]), contexts, 64)
    assert effect["raised"] == effect["lowered"] == []
    assert effect["kl"] == effect["loss"] == 0
