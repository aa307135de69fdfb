"""The probe passes a simulator that knows the planted neurons, and no other."""

import itertools
import math
import random
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from crate_mini import UserError
from crate_mini.judges import probe
from crate_mini.judges.simulation import MODES

EXECUTOR = ThreadPoolExecutor(1)


def run_probe(simulate, mode="logprobs"):
    return probe.probe(lambda words, shown: simulate(mode, words, shown), mode, EXECUTOR)


def planted_words():
    """{word: explanation} of all words on which a planted neuron fires."""
    words = {}
    for explanation, texts in all_neurons().items():
        for tokens, levels in texts:
            for token, level in zip(tokens, levels):
                if level:
                    words[token.strip()] = explanation
    return words


def all_neurons():
    return {name: texts for group in probe.groups() for name, texts in group.items()}


KNOWN = planted_words()


def oracle(mode, explanation, shown):
    """A perfect simulator of the planted neurons."""

    def fires(token):
        return KNOWN.get(token.strip()) == explanation

    if mode in ("logprobs", "json"):
        return [10 * fires(token) for token in shown], None
    if mode == "detection":
        return int(any(map(fires, shown))), None
    if mode == "fuzzing":
        tokens, marks = shown
        return int(all(fires(tokens[mark]) for mark in marks)), None
    topics = []  # of the marked words in each excerpt
    for tokens, marks in shown:
        topics.append({KNOWN.get(tokens[mark].strip()) for mark in marks})
    for i, own in enumerate(topics, 1):
        others = topics[: i - 1] + topics[i:]
        if all(other == others[0] != own for other in others):
            return i, None
    return 1, None


def blind(mode, explanation, shown):
    return [0] * len(shown) if mode in ("logprobs", "json") else 0, None


def always(mode, explanation, shown):
    return 1, None


def counting_letters(mode, explanation, shown):
    return [len(token) for token in shown], None


def inverted(mode, explanation, shown):
    return [-level for level in oracle(mode, explanation, shown)[0]], None


def barely(mode, explanation, shown):
    """It prefers the true explanation, but by less than the margin."""
    truth = oracle(mode, explanation, shown)[0]
    return [len(token) + 0.02 * level for token, level in zip(shown, truth)], None


def silent(mode, explanation, shown):
    return None, "no"


@pytest.mark.parametrize("mode", MODES)
def test_a_perfect_simulator_passes(mode):
    result = run_probe(oracle, mode)
    assert result["won"] == result["of"] == 12
    assert result["failed"] == 0
    assert probe.passed(result)
    assert all(true == 1 for true, *_ in result["scores"].values())


@pytest.mark.parametrize("simulate", [blind, counting_letters, inverted, barely, silent])
def test_a_simulator_that_ignores_the_explanation_fails(simulate):
    assert not probe.passed(run_probe(simulate))


@pytest.mark.parametrize("mode", ["detection", "fuzzing", "intruder"])
@pytest.mark.parametrize("simulate", [blind, always, silent])
def test_the_same_verdict_everywhere_fails(simulate, mode):
    assert run_probe(simulate, mode)["won"] <= 4


def test_nine_of_twelve_are_enough_and_eight_are_not():
    result = {"won": 9, "of": 12, "needed": probe.needed(), "failed": 0, "asked": 72}
    assert probe.passed(result)
    assert not probe.passed({**result, "won": 8})
    assert not probe.passed({**result, "failed": 4})


def test_a_win_needs_a_margin_over_chance_and_over_every_false_explanation():
    assert probe.wins("logprobs", [0.30, 0.25, None, -0.5])
    assert not probe.wins("logprobs", [0.30, 0.26])
    assert not probe.wins("logprobs", [0.04, -0.5])
    assert not probe.wins("logprobs", [None, None])
    assert not probe.wins("detection", [0.54, 0.1])
    assert probe.wins("intruder", [2 / 3])
    assert not probe.wins("intruder", [0.5])


# ---- the planted neurons -------------------------------------------------------------------------


def test_every_planted_neuron_fires_in_half_of_its_texts_no_two_in_the_same_half():
    for group in probe.groups():
        halves = []
        for texts in group.values():
            halves.append(tuple(max(levels) > 0 for _, levels in texts))
            assert sum(halves[-1]) == 3
        assert len(set(halves)) == len(halves) == 6
    assert probe.neuron_count() >= 10


def test_no_word_of_the_texts_fires_two_neurons_of_a_group():
    for group in probe.groups():
        for rows in zip(*group.values()):
            levels = np.array([levels for _, levels in rows])
            assert (levels > 0).sum(0).max() == 1


def test_every_named_word_is_in_the_texts():
    for heading, body in probe.prompt_files.load("puzzles")[1]:
        if heading != "texts":
            named = set(body.split())
            fired = {word for word, owner in KNOWN.items() if owner == heading}
            assert named == fired


# ---- chance --------------------------------------------------------------------------------------


def permuted_wins(preferred):
    """(n + 1,) probabilities of the neurons won, over all ways to hand out the explanations.

    preferred: for each neuron the explanation that the model finds best, whatever the reason.
    """
    n = len(preferred)
    counts = np.zeros(n + 1)
    for given in itertools.permutations(range(n)):
        counts[sum(best == own for best, own in zip(preferred, given))] += 1
    return counts / math.factorial(n)


def test_a_useless_model_passes_in_at_most_one_percent_of_cases_over_all_modes():
    """Exact: of all preferences that a model can have, none is won more often."""
    partitions = []  # how often each explanation is preferred decides, not which
    for preferred in itertools.combinations_with_replacement(range(6), 6):
        times = sorted((preferred.count(i) for i in range(6)), reverse=True)
        if list(times) == [preferred.count(i) for i in range(6)]:
            partitions.append(permuted_wins(preferred))
    assert len(partitions) == 11
    needed = probe.needed()
    worst = max(
        np.convolve(a, b)[needed:].sum()
        for a, b in itertools.combinations_with_replacement(partitions, 2)
    )
    assert probe.chance("logprobs") == pytest.approx(worst)
    assert sum(map(probe.chance, MODES)) <= 0.01


def test_fixed_points_are_those_of_all_permutations():
    for n in range(1, 7):
        assert np.allclose(probe.fixed_points(n), permuted_wins(range(n)))


def test_the_chance_of_the_intruder_is_that_of_guessing():
    two_of_three = 3 * (1 / 4) ** 2 * (3 / 4) + (1 / 4) ** 3
    exact = sum(
        math.comb(12, k) * two_of_three**k * (1 - two_of_three) ** (12 - k) for k in range(9, 13)
    )
    assert probe.chance("intruder") == pytest.approx(exact)


def test_random_answers_win_about_one_neuron_in_a_group():
    """As many as the chance that is printed assumes."""
    rng = random.Random(0)

    def noise(mode, explanation, shown):
        return [rng.random() for _ in shown], None

    won = [run_probe(noise)["won"] for _ in range(20)]
    assert np.mean(won) < 2.5
    assert max(won) < probe.needed()


# ---- choosing a mode -----------------------------------------------------------------------------


def model(able, good, bad=silent):
    """A model that has some modes, and is good in some of them."""

    def lacks(mode):
        return None if mode in able else "no such thing"

    def simulate(mode, explanation, shown):
        return (oracle if mode in good else bad)(mode, explanation, shown)

    return SimpleNamespace(name="m", lacks=lacks, simulate=simulate)


def choose(model, modes=("logprobs", "json"), despite_probe=False):
    """(mode, logged lines) of choose_mode."""
    log = []
    return probe.choose_mode(model, modes, despite_probe, EXECUTOR, log.append)[0], log


def test_the_first_mode_that_passes_is_taken():
    mode, log = choose(model(["logprobs", "json"], ["json"]))
    assert mode == "json"
    assert log[0].startswith("the probe passes with 9 of 12 planted neurons won; chance: 0.0004")
    assert log[1:] == [
        "logprobs: 72 of 72 questions unanswered (mostly: no)",
        "json: 12 of 12 planted neurons won, 9 needed, 0 of 72 questions unanswered",
    ]
    assert choose(model(["json"], ["json"]))[0] == "json"


def test_a_model_that_answers_wrongly_in_every_mode_is_refused():
    useless = model(["json"], [], bad=blind)
    with pytest.raises(
        UserError, match="not tell true from false .*: no such thing; json: 0 of 12 .*--despite-pr"
    ):
        choose(useless, ["logprobs", "json"])
    assert choose(useless, despite_probe=True)[0] == "json"


@pytest.mark.parametrize("despite_probe", [False, True])
def test_a_model_that_gives_no_answers_is_not_called_a_bad_judge(despite_probe):
    """Why there are none is told; insisting does not help."""
    with pytest.raises(UserError, match="^m gives no usable answers .logprobs: no such") as error:
        choose(model(["json"], []), despite_probe=despite_probe)
    assert "json: 72 of 72 questions unanswered (mostly: no)" in str(error.value)
    assert "does not tell" not in str(error.value)
