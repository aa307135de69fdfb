"""The probe passes a simulator that knows the planted neurons, and no other."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from planted_excerpts import settings

from crate_mini import UserError
from crate_mini.judges import probe


def run_probe(simulate, mode="logprobs"):
    return probe.probe(simulate, mode, ThreadPoolExecutor(1))


def firing_words():
    """{word: explanation} of all words on which a planted neuron fires."""
    words = {}
    for explanation, texts in probe.planted_neurons().items():
        for tokens, levels in texts:
            for token, level in zip(tokens, levels):
                if level:
                    words[token.strip()] = explanation
    return words


def oracle(explanation, tokens):
    """A perfect simulator of the planted neurons."""
    known = firing_words()
    return [10 * (known.get(token.strip()) == explanation) for token in tokens], None


def detecting_oracle(explanation, tokens):
    return [int(max(oracle(explanation, tokens)[0]) > 0)], None


def blind(explanation, tokens):
    return [0] * len(tokens), None


def counting_letters(explanation, tokens):
    return [len(token) for token in tokens], None


def inverted(explanation, tokens):
    return [-level for level in oracle(explanation, tokens)[0]], None


def silent(explanation, tokens):
    return None, "no"


def always_firing(explanation, tokens):
    return [1], None


def test_a_perfect_simulator_passes():
    result = run_probe(oracle)
    assert result["won"] == result["of"] == 3
    assert result["failed"] == 0
    assert probe.passed(result)
    assert all(true == 1 for true, *_ in result["scores"].values())
    assert probe.passed(run_probe(detecting_oracle, "detection"))


@pytest.mark.parametrize("simulate", [blind, counting_letters, inverted, silent])
def test_a_simulator_that_ignores_the_explanation_fails(simulate):
    assert not probe.passed(run_probe(simulate))


def test_always_firing_fails_detection():
    assert not probe.passed(run_probe(always_firing, "detection"))


def model(able, good):
    """A model that has some modes, and is good in some of them."""

    def lacks(mode):
        return None if mode in able else "no such thing"

    def simulate(mode, explanation, tokens):
        return (oracle if mode in good else silent)(explanation, tokens)

    return SimpleNamespace(name="m", lacks=lacks, simulate=simulate)


def choose(model, **changes):
    """(mode, logged lines) of choose_mode."""
    log = []
    asked = settings(rung="auto", **changes)
    return probe.choose_mode(model, asked, ThreadPoolExecutor(1), log.append)[0], log


def test_the_first_mode_that_passes_is_taken():
    mode, log = choose(model(["logprobs", "json"], ["json"]))
    assert mode == "json"
    assert len(log) == 2
    assert log[0].startswith(
        "logprobs: the true explanation wins for 0 of 3 planted neurons, 27 of 27"
    )
    assert choose(model(["json"], ["json"]))[0] == "json"


def test_a_model_that_passes_in_no_mode_is_refused():
    useless = model(["json"], [])
    with pytest.raises(
        UserError, match="logprobs: no such thing; json: .* 0 of 3 .*--despite-probe"
    ):
        choose(useless)
    with pytest.raises(UserError):  # there are no answers at all, so insisting does not help
        choose(useless, despite_probe=True)
