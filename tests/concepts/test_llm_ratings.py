"""Language models rate concepts blindly, and their agreement is counted as in worked examples."""

import json

import numpy as np
import pytest
from planted_reviews import EVIL

from crate_mini import UserError
from crate_mini.concepts import command, llm_ratings
from crate_mini.judges.queries import NoAnswer


class WordJudge:
    """A judge that rates 3 whatever holds the word "good", else 1; "fails" never answers.

    last_query: the last one that any of them was asked.
    """

    style = "chat"
    can = {"can": ["chat"]}
    last_query = None

    def __init__(self, spec, cache, url, key_env):
        self.name = spec

    def ask(self, query):
        WordJudge.last_query = query
        if "fails" in self.name:
            raise NoAnswer("no answer")
        _, message = query["chat"][-1]
        return {"text": " 3." if '"good"' in message.split("Words:")[1] else "1"}


def cards(n=12):
    concepts = {"clvq": ["good", "warm"], "kmeans": ["the"], "sae": []}
    common = {"answer": "pos", "right": True, "classes": ["neg", "pos"], "concepts": concepts}
    return [{"text": f"a text {EVIL} {i}", **common} for i in range(n)]


@pytest.fixture
def rate(tmp_path, monkeypatch):
    """A function of the judges' specs that returns llm_ratings.run with WordJudges."""
    monkeypatch.setattr(llm_ratings, "LanguageModel", WordJudge)

    def rate(*judges):
        return llm_ratings.run(cards(), judges, tmp_path, command.Settings())

    return rate


def test_judges_that_agree_are_counted_so(rate):
    result = rate("hf:one", "hf:two")
    means = {name: by_judge["hf:one"]["mean"] for name, by_judge in result["methods"].items()}
    assert means == {"clvq": 3, "kmeans": 1, "sae": 1}
    assert result["agreement"] == {
        "krippendorff": 1,
        "pearson": pytest.approx(1),
        "kendall_w": 1,
        "spearman": pytest.approx(1),
    }


def test_one_judge_has_nobody_to_agree_with(rate):
    assert rate("hf:one")["agreement"] is None


def test_judges_are_blind(rate):
    rate("hf:one")
    query = json.dumps(WordJudge.last_query)
    assert not any(name in query for name in ("clvq", "kmeans", "sae"))
    assert "Answer: pos" in query


def test_a_judge_that_never_answers_is_refused(rate):
    with pytest.raises(UserError, match="it cannot judge"):
        rate("hf:fails")


def test_every_concept_of_every_card_is_asked_about_in_a_random_order():
    order = llm_ratings.questions(cards(), 0)
    assert sorted(order) == sorted((i, name) for i in range(12) for name in cards()[0]["concepts"])
    assert order != sorted(order)


def test_krippendorffs_alpha_of_a_worked_example():
    """Krippendorff 2011, four observers and twelve units: interval alpha 0.849."""
    a = np.nan
    ratings = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, a, a, a],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, a, 3],
        [a, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, a],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, a],
    ]
    assert llm_ratings.krippendorff(ratings) == pytest.approx(0.849, abs=5e-4)
    assert llm_ratings.krippendorff([[1.0, 2.0]]) is None


def test_kendalls_w_by_hand():
    assert llm_ratings.kendall([[1, 2, 3], [1, 2, 3]]) == 1
    assert llm_ratings.kendall([[1, 2, 3], [3, 2, 1]]) == 0
    assert llm_ratings.kendall([[1, 1, 2], [1, 1, 2]]) == pytest.approx(1)
    assert llm_ratings.kendall([[1, 2, 3]]) is None
