"""Levels from the log-probabilities of tokens, also where 10 is two tokens."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from crate_mini.judges.queries import level_logprobs
from crate_mini.neurons import metrics


@given(st.floats(0.02, 0.98), st.floats(0.01, 0.98))
def test_a_ten_in_two_tokens_is_divided_from_the_one(one, zero):
    """What follows a "1" divides it into 1 and 10; another digit makes it neither."""
    twelve = (1 - zero) / 2
    alternatives = {"1": np.log(one), "5": np.log(1 - one), "the": -0.1}
    after_one = {"0": np.log(zero), "2": np.log(twelve), "\n": np.log(1 - zero - twelve)}
    levels = level_logprobs(alternatives, lambda: after_one)
    assert np.isclose(np.exp(levels["10"]), one * zero, atol=1e-3)
    assert np.isclose(np.exp(levels["1"]), one * twelve, atol=1e-3)
    assert set(levels) == {"1", "5", "10"}
    assert 0 <= metrics.expected(levels) <= 10


def test_nothing_more_is_asked_than_needed():
    def never():
        raise AssertionError("not needed")

    sure = level_logprobs({"1": -1.0, "10": -2.0, " 1": -1.0}, never)
    assert sure == {"1": -0.3069, "10": -2}
    unlikely = level_logprobs({"1": -9.0, "0": -0.1, "11": -1.0, "x": 0.0}, never)
    assert unlikely == {"1": -9, "0": -0.1}
    assert level_logprobs({"a": -1.0}, never) == {}
