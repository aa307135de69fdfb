"""k-means and its seeding, nearest centres, statistics of a codebook."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crate_mini import UserError
from crate_mini.concepts import kmeans


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_centres_are_means_and_rows_are_with_their_nearest(n, d, k, seed):
    """Of any rows, even if fewer differ than centres are asked for."""
    x = torch.randint(-2, 3, (n, d), generator=generator(seed)).float()
    if k > n:
        with pytest.raises(UserError, match="codes cannot be made of"):
            kmeans.kmeans(x, k, seed)
        return
    centres, index = kmeans.kmeans(x, k, seed)
    D = (x[:, None] - centres).square().sum(-1)
    assert torch.allclose(D.gather(1, index[:, None])[:, 0], D.min(1).values, atol=1e-4)
    for j in index.unique():
        assert torch.allclose(centres[j], x[index == j].mean(0), atol=1e-5)
    assert torch.equal(centres, kmeans.kmeans(x, k, seed)[0])


def test_a_centre_without_rows_stays_where_it_was():
    x = torch.tensor([[1.0], [3.0]])
    centres, index, cost = kmeans.lloyd(x, torch.tensor([[0.0], [99.0]]), steps=100)
    assert centres.tolist() == [[2.0], [99.0]] and index.tolist() == [0, 0] and cost == 2


def test_distances_keep_their_digits_next_to_a_large_shared_part():
    x = torch.randn(50, 16, generator=generator()) + 1000
    exact = (x.double()[:, None] - x.double()[:7]).square().sum(-1)
    assert torch.allclose(kmeans.distances(x, x[:7]).double(), exact, rtol=1e-3, atol=1e-2)


def test_nearest_in_chunks_is_nearest_at_once(monkeypatch):
    x = torch.randn(50, 4, generator=generator())
    index, distance = kmeans.nearest(x, x[:9])
    monkeypatch.setattr(kmeans, "CELLS", 20)
    index_in_chunks, distance_in_chunks = kmeans.nearest(x, x[:9])
    assert torch.equal(index, index_in_chunks)
    assert torch.allclose(distance, distance_in_chunks, atol=1e-5)


def test_spherical_centres_have_the_direction_and_the_mean_norm_of_their_members():
    """Two directions, norms 1 to 3 and 10: clustered by direction; zero rows do not count."""
    x = torch.tensor([[1.0, 0], [3, 0], [0, 10], [0, 0]])
    centres = kmeans.spherical(x, 2, 0)
    ordered = centres[centres[:, 0].argsort()]
    assert torch.allclose(ordered, torch.tensor([[0.0, 10], [2, 0]]), atol=1e-5)
    with pytest.raises(UserError, match="4 codes cannot be made of 3"):
        kmeans.spherical(x, 4, 0)


def test_seeding_prefers_what_is_far():
    """Of 99 rows at one place and one far away, the far one is always among two."""
    x = torch.zeros(100, 3)
    x[37] = 9.0
    for seed in range(10):
        assert kmeans.seeding(x, 2, generator(seed)).sum() == 27


def test_usage_by_hand():
    usage = kmeans.usage(torch.tensor([0, 0, 1, 1]), torch.tensor([[2.0, 0], [0, 5], [1, 1]]))
    expected = {"active": 2, "largest": 0.5}
    expected |= {"perplexity": pytest.approx(2), "cosine": pytest.approx(0)}
    assert usage == expected
    usage = kmeans.usage(torch.tensor([0, 1, 1, 2]), torch.tensor([[1.0, 0], [1, 0], [0, 1]]))
    assert usage["cosine"] == pytest.approx(1 / 3) and usage["largest"] == 0.5
    assert usage["perplexity"] == pytest.approx(2**1.5)
    assert kmeans.usage(torch.tensor([1, 1]), torch.eye(2))["cosine"] is None
