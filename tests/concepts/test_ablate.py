"""Directions are what their names say, are removed exactly, and the model runs on without them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_classifiers import KINDS, SPEC, TEXTS, D, random_classifier

from crate_mini import UserError
from crate_mini.concepts import ablate
from crate_mini.concepts.classifier import encode
from crate_mini.concepts.types import SPLITS, Codes, Vectors
from crate_mini.data.tokenizer import load_tokenizer


@given(st.integers(1, 6), st.integers(2, 9), st.integers(0, 99))
def test_exactly_one_direction_is_removed(n, d, seed):
    generator = torch.Generator().manual_seed(seed)
    h, u = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    u = ablate.unit(u)
    rest = ablate.without(h, u)
    torch.testing.assert_close((rest * u).sum(1), torch.zeros(n, dtype=torch.float64))
    torch.testing.assert_close(ablate.without(rest, u), rest)  # twice is once
    torch.testing.assert_close(h - rest, (h * u).sum(1, keepdim=True) * u)  # nothing else moved
    P = torch.eye(d, dtype=torch.float64) - u[0][:, None] * u[0]
    assert torch.linalg.matrix_rank(P) == d - 1
    assert torch.equal(ablate.without(h, ablate.unit(torch.zeros_like(u))), h)


@given(st.integers(0, 50))
def test_partners_have_the_class_that_they_should(seed):
    label = torch.tensor([0, 1, 1, 0, 2, 2, 1])
    partners = ablate.partners(label, seed)
    assert all((other != np.arange(len(label))).all() for other in partners.values())
    assert (label[partners["same class"]] == label).all()
    assert (label[partners["other class"]] != label).all()


def test_a_text_without_a_partner_is_one_sentence():
    with pytest.raises(UserError, match="no partner for 'same class'"):
        ablate.partners(torch.tensor([0, 1, 1, 0, 2]), 0)


def test_directions_are_what_their_names_say():
    """Every word, code and split has its own vector."""
    generator, n, seed = torch.Generator().manual_seed(0), 12, 3
    x = torch.randn(2 * n, 5, generator=generator).numpy()
    label = torch.arange(n) % 3
    v = Vectors(
        lower=x,
        upper=x[::-1],
        sentence=np.arange(2 * n),
        word=np.zeros(2 * n),
        position=np.zeros(2 * n),
        label=np.arange(2 * n) % 3,
        split=np.array([SPLITS["train"], SPLITS["test"]] * n),
        vocabulary=["w"],
    )
    centroids = torch.randn(2 * n, 5, generator=generator).numpy()
    codes = Codes("all", 0, np.arange(2 * n)[::-1].copy(), centroids)
    row = np.flatnonzero(v.rows("test"))
    texts = ablate.SalientTexts(row, row, None, None, label, torch.zeros(n, 5), None)
    directions, equal = ablate.code_directions(codes, v, texts, seed)
    shared = ablate.shared_directions(v, texts, seed)

    code, partner = codes.assignment[row], ablate.partners(label, seed)
    mean = centroids[codes.assignment[v.rows("train")]].mean(0)
    expected = {
        "own": centroids[code],
        "centred": centroids[code] - mean,
        "centred, another": centroids[code[partner["another"]]] - mean,
        **{name: centroids[code[other]] for name, other in partner.items()},
    }
    assert set(directions) == set(expected) == set(ablate.CODE_VARIANTS)
    assert set(equal.values()) == {0.0}
    expected |= {"mean": np.tile(x[v.rows("train")].mean(0), (n, 1)), "raw": x[row]}
    directions |= {name: shared[name] for name in ("mean", "raw")}
    for name, u in directions.items():
        torch.testing.assert_close(u, ablate.unit(torch.from_numpy(expected[name])))


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_without_a_direction_is_what_a_whole_pass_gives(kind):
    model, layer = random_classifier(kind), 1
    texts = [*TEXTS, "two words", "again such"]
    ids, lengths = encode(load_tokenizer(SPEC), texts, 40, "start")
    n = len(ids)
    numbers, states = np.arange(n), torch.zeros(n, D)
    salient = ablate.SalientTexts(numbers, numbers, ids, lengths, torch.zeros(n), states, states)
    upper = ablate.UpperLayers(model, salient, layer, size=2)
    generator = torch.Generator().manual_seed(0)
    directions = [
        ablate.unit(torch.randn(n, D, generator=generator, dtype=torch.float64)) for _ in range(2)
    ]
    z = model.states(ids, layer)
    for u, result in zip(directions, upper.remove_from_last(directions)):
        changed = z.clone()
        for i, end in enumerate(lengths - 1):
            changed[i, end] = ablate.without(changed[i, end], u[i])
        torch.testing.assert_close(result, model.run_from(changed, layer, lengths))
        everywhere = model.run_from(ablate.without(z, u[:, None]), layer, lengths)
        torch.testing.assert_close(upper.remove_everywhere(u), everywhere)
    assert model.lm.cache is None
