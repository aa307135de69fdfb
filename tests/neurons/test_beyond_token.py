"""Scores beyond the token against brute force, on planted neurons; their intervals."""

import numpy as np
import pytest
import torch
from little_world import BYTES, T, world
from made_up_texts import made_up_texts

from crate_mini.neurons import beyond_token, feature_sets
from crate_mini.neurons.beyond_token import Properties, correlate
from crate_mini.neurons.documents import FitScoreSplit
from crate_mini.neurons.feature_sets import Features
from crate_mini.neurons.record import sites
from crate_mini.neurons.text_states import NAMES, TextStates

TEXTS = made_up_texts()
PROPERTIES = Properties(TEXTS)
FIT = TEXTS.is_fit.numpy()


def planted(seed=1):
    """(N, 7): four neurons of one property each with noise, and three that mislead.

    5: a random number for each token; 6: property 0, but only on token 3; 7: noise.
    """
    rng = np.random.default_rng(seed)
    holds = TEXTS.states.numpy()
    token = TEXTS.token.numpy()
    follow = holds + 0.3 * rng.normal(size=holds.shape)
    by_token = rng.normal(size=len(TEXTS.ids))[token]
    on_one_type = holds[:, 0] * (token == 3)
    columns = [*follow.T, by_token, on_one_type, rng.normal(size=len(token))]
    return torch.from_numpy(np.stack(columns, 1)).float()


def brute_force(x, holds, part):
    """r of two columns (N,) of a part, less the means of each type in the fit part."""
    token = TEXTS.token.numpy()
    left = np.zeros((2, len(token)))
    for row, values in zip(left, (x, holds)):
        for type in range(len(TEXTS.ids)):
            row[token == type] = values[token == type] - values[FIT & (token == type)].mean()
    return np.corrcoef(left[:, part])[0, 1]


def test_r_beyond_the_token_is_what_its_definition_says():
    acts = planted()
    correlations = correlate(TEXTS, PROPERTIES, Features(acts))
    for part, mask in (("fit", FIT), ("score", ~FIT)):
        for j in (0, 2, 5, 6):
            for p in range(4):
                expected = brute_force(
                    acts[:, j].double().numpy(), TEXTS.states[:, p].numpy(), mask
                )
                assert correlations.r[part][j, p] == pytest.approx(expected, abs=1e-5)


def test_planted_neurons_are_found_and_the_token_scores_nothing():
    correlations = correlate(TEXTS, PROPERTIES, Features(planted()))
    assert beyond_token.best_features(correlations.r["fit"]).tolist() == [0, 1, 2, 3]
    assert correlations.r["score"][range(4), range(4)].min() > 0.8
    assert np.isnan(correlations.r["score"][4]).all(), "a number for each token: no variation left"
    properties, own = beyond_token.neuron_scores(correlations)
    assert properties[:4].tolist() == [0, 1, 2, 3] and own[:4].min() > 0.8
    assert np.isnan(own[4])
    assert properties[5] == 0 and own[5] > 0.99 > 0.5 > correlations.r["score"][5, 0]
    assert abs(own[6]) < 0.1


def test_blocks_of_features_do_not_matter(monkeypatch):
    whole = correlate(TEXTS, PROPERTIES, Features(planted()))
    monkeypatch.setattr(beyond_token, "BLOCK_FLOATS", 3 * len(FIT))
    pieces = correlate(TEXTS, PROPERTIES, Features(planted()))
    assert np.allclose(whole.r["score"], pieces.r["score"], atol=1e-6, equal_nan=True)


def test_rare_properties_are_not_scored():
    texts = made_up_texts()
    texts.states[:, 1] = False
    texts.states[:, 2] = texts.token == 5  # a function of the token
    texts.states[:, 3] &= torch.from_numpy(texts.document < 6)  # in six documents, three a part
    assert Properties(texts).numbers.tolist() == [0]


# ---- reading -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts():
    """The Texts of the little world, whose rarest characters have too few tokens."""
    corpus = world()[1]
    documents = FitScoreSplit(corpus, "val", BYTES.eot, T, 0, 12_000)
    return beyond_token.read_texts(documents, TextStates(BYTES.token_bytes))


def test_tokens_of_types_that_the_fit_part_hardly_holds_are_left_out(texts):
    assert (texts.counts >= beyond_token.LEAST).all()
    assert len(texts.kept) == len(texts.token) == len(texts.document) == len(texts.states)
    assert texts.states.shape[1] == len(NAMES)
    assert not set(texts.document[texts.is_fit]) & set(texts.document[~texts.is_fit])


def test_codes_belong_to_their_tokens(texts):
    """Padding and batches do not matter: each chunk alone gives the same codes."""
    model = world()[0]
    codes = beyond_token.read_codes(model, texts, sites(model), torch.float32)
    ids, states, alone = [], [], []
    reader = TextStates(BYTES.token_bytes)
    for _, chunks in texts.batches:
        for chunk in chunks:
            with torch.no_grad():
                alone.append(model.trunk(torch.from_numpy(chunk.ids)[None])[1][1][0])
            ids.append(chunk.ids)
            states.append(reader.of(chunk.ids))
    kept = texts.kept
    assert np.array_equal(texts.ids[texts.token], np.concatenate(ids)[kept])
    assert np.array_equal(texts.states, np.concatenate(states)[kept])
    assert torch.allclose(codes["L1"].float(), torch.cat(alone)[kept], atol=1e-3)


# ---- controls ------------------------------------------------------------------------------------


def test_controls_score_what_they_must():
    rng = np.random.default_rng(0)
    acts = planted().half()
    sets = {
        "shuffled": feature_sets.shuffled(acts, TEXTS, rng),
        "token table": feature_sets.TokenMeans(acts, TEXTS),
    }
    for name, features in sets.items():
        r = correlate(TEXTS, PROPERTIES, features).r["score"]
        assert np.nanmax(abs(np.append(r, 0))) < 0.08, name
    order = sets["shuffled"].acts
    for part in (FIT, ~FIT):
        for type in (0, 7):
            rows = torch.from_numpy(part & (TEXTS.token.numpy() == type))
            assert torch.equal(order[rows].sort(0).values, acts[rows].sort(0).values)


@pytest.mark.parametrize("make", [feature_sets.rotation, feature_sets.principal_components])
def test_directions_are_orthogonal_and_fire_as_often_as_the_neurons(make):
    acts = torch.relu(planted(2)).half()
    density = feature_sets.density(acts[TEXTS.is_fit])
    features = make(acts, density, TEXTS.is_fit, np.random.default_rng(3))
    eye = features.directions.T @ features.directions
    assert torch.allclose(eye, torch.eye(7), atol=1e-5)
    x = features.columns(np.arange(7))
    fires = (x[TEXTS.is_fit] > 0).float().mean(0).numpy()
    assert fires == pytest.approx(features.density, abs=0.002)
    assert sorted(features.density) == pytest.approx(sorted(density))
    assert torch.equal(features.columns(np.array([4, 2])), x[:, [4, 2]])


def test_cut_to_a_density():
    acts = torch.relu(planted()).half()
    x = feature_sets.cut(acts, TEXTS.is_fit, 0.05)
    assert ((x[TEXTS.is_fit] > 0).float().mean(0) <= 0.051).all()
    assert torch.equal(x[x > 0], acts[x > 0])


# ---- intervals -----------------------------------------------------------------------------------


def test_coverage_on_all_documents_is_the_mean_of_the_correlations():
    features = Features(planted())
    r = correlate(TEXTS, PROPERTIES, features).r["score"]
    chosen = np.array([0, 1, 6, 4])  # the last does not vary: 0
    moments = beyond_token.document_moments(TEXTS, PROPERTIES, features, chosen)
    assert moments.shape == (20, 6, 4)
    expected = (r[0, 0] + r[1, 1] + r[6, 2]) / 4
    assert beyond_token.coverage_of(moments.sum(0)) == pytest.approx(expected, abs=1e-5)
    by_document = beyond_token.coverage_by_document(moments)
    assert by_document.shape == (20,) and by_document.mean() == pytest.approx(expected, abs=0.02)


def repeated(rng, documents=40, length=30):
    """(documents, 6, 3) moments of three neurons that share what a document does to them."""
    shape = documents, 1, 3
    holds = rng.normal(size=shape) + rng.normal(size=(documents, length, 3))
    acts = 0.4 * holds + rng.normal(size=shape) + rng.normal(size=(documents, length, 3))
    ones = np.ones_like(acts)
    moments = (ones, acts, holds, acts * acts, holds * holds, acts * holds)
    return np.stack([moment.sum(1) for moment in moments], 1)


@pytest.mark.parametrize("windows", [False, True])
def test_intervals_cover_as_often_as_they_say(windows):
    """95 % intervals of coverage on correlated documents; redrawing pieces of them covers less."""
    rng = np.random.default_rng(0)
    true = float(beyond_token.coverage_of(repeated(rng, 40_000).sum(0)))
    hits = 0
    for i in range(200):
        values = beyond_token.coverage_by_document(repeated(rng))
        low, high = beyond_token.interval(values, i)
        if windows:  # as if each document were ten independent ones
            middle, half = (low + high) / 2, (high - low) / 2 / np.sqrt(10)
            low, high = middle - half, middle + half
        hits += low <= true <= high
    assert (hits / 200 < 0.6) if windows else (0.9 <= hits / 200 <= 0.98)


def test_pieces_beyond_float16_share_a_power_of_two():
    pieces = beyond_token._HalfPieces()
    acts = torch.rand(3, 5, 4) * torch.tensor([1.0, 1e6, 1e4])[:, None, None]
    for piece in acts:
        pieces.add(piece)
    kept = torch.stack(pieces.pieces).float() * 2.0**pieces.exponent
    assert pieces.exponent > 0
    torch.testing.assert_close(kept, acts, rtol=1e-3, atol=1e-2)
    plain = beyond_token._HalfPieces()
    plain.add(acts[0])
    assert torch.equal(plain.pieces[0], acts[0].half())
