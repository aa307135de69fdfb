"""`interpret.py selftest`: what is expected of simulators and metrics on planted neurons."""

import contextlib
import io
import json

import numpy as np
import pytest

import interpret
from crate_mini.neurons import selftest, selftest_beyond
from crate_mini.neurons.beyond_token import Texts
from crate_mini.neurons.planted import INDEX
from crate_mini.neurons.planted_states import MISLEADING
from crate_mini.neurons.text_states import NAMES


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """(what the command prints, its selftest.json)."""
    folder = tmp_path_factory.mktemp("selftest")
    words = ["interpret.py", "selftest", "--documents", "600", "--out", str(folder)]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr("sys.argv", words)
        assert not interpret.main()
    return printed.getvalue(), json.loads((folder / "selftest.json").read_text())


def test_the_table_and_the_file(outcome):
    printed, result = outcome
    assert "perfect reader" in printed
    assert "8 of 8" in printed
    assert "half as many added" in printed
    assert result["documents"] == 600


def test_simulators_pass_what_they_can_express(outcome):
    passed = {}
    for simulator, judged in outcome[1]["simulators"].items():
        passed[simulator] = {name for name, result in judged.items() if result["passes"]}
    easy = {"token set", "noise", "dead", "always on", "negative only"}
    assert passed["perfect reader"] == set(INDEX)
    assert passed["token"] == easy
    assert passed["ngram"] == easy | {"bigram"}
    assert passed["trie"] == easy | {"bigram", "third token back"}


def test_metrics_punish_missing_and_superfluous_activations(outcome):
    metrics = outcome[1]["metrics"]
    for metric in ("uniform r", "uniform f1", "uniform auprc"):
        assert metrics[metric]["passes"], metric
    assert set(metrics) >= {"openai_tar", "openai_random", "anthropic_crate", "anthropic_2023"}


def test_a_nearly_perfect_prediction_scores_1_in_every_metric(outcome):
    printed, result = outcome
    assert len(result["metrics"]) == 7
    for metric, judged in result["metrics"].items():
        assert judged["nearly"] == pytest.approx(1, abs=0.01), metric
        assert judged["reaches_1"], metric
    assert "truth off by 1e-6" in printed


def test_spoiling_removes_or_adds_half():
    predicted, rng = np.zeros(200_000), np.random.default_rng(0)
    predicted[:20_000] = 1
    removed = selftest.spoil(predicted, "removed", 0.1, rng)
    assert removed.sum() == pytest.approx(10_000, rel=0.05)
    added = selftest.spoil(predicted, "added", 0.1, rng)
    assert added.sum() == pytest.approx(30_000, rel=0.05)


def test_scores_beyond_the_token_find_what_is_planted(outcome):
    printed, result = outcome
    judged = result["beyond"]
    assert f"{len(NAMES)} of {len(NAMES)} planted neurons" in printed
    assert all(found["passes"] for found in judged["properties"].values())
    neurons = judged["neurons"]
    assert set(neurons) == set(MISLEADING)
    assert all(found["passes"] for found in neurons.values()), neurons
    assert neurons["a random number for each token"]["r"] is None
    assert neurons["one word, in quotes only"]["r"] > 0.9


def test_scores_that_forget_the_token_fail_the_selftest(tmp_path, monkeypatch):
    """A planted fault: without removing token means, a number for each token scores."""
    monkeypatch.setattr(Texts, "residual", lambda texts, x: x - x[texts.is_fit].mean(0))
    judged = selftest_beyond.solve(tmp_path, log=lambda line: None)
    assert not judged["neurons"]["a random number for each token"]["passes"]
