"""From selected excerpts of neurons to scores: probe the simulator, explain, simulate, score.

A score is worth what it has over a wrong explanation: every neuron is also simulated from the words
of another neuron, and the difference is the result. An excerpt without a usable answer is missing
and counted; it never becomes a zero.
"""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from crate_mini import UserError
from crate_mini.console import results, terminal
from crate_mini.judges import explanation, price, probe, prompt_files, simulation
from crate_mini.judges.answer_cache import AnswerCache, BudgetSpent
from crate_mini.judges.language_model import LanguageModel
from crate_mini.judges.queries import NoAnswer
from crate_mini.judges.simulation import MODES
from crate_mini.neurons import protocols
from crate_mini.training.device import machine

PROMPTS = ("explain", "puzzles", *(mode.prompt for mode in MODES.values()))
ENOUGH = 40  # simulations after which too many failures end the run
CONSTANT = "simulated activations are constant"  # why a simulation has no correlation
WRONG = ", wrong words"  # in the name of the score with another neuron's explanation
GAIN = ", true - wrong"  # in the name of the difference


def run(selected, decode, settings, folder, log=print):
    """Explain and simulate neurons.

    selected: {neuron: {protocol: (Excerpts to explain, Excerpts to score)}}. decode(ids) -> str.
    settings: command.Settings. folder: where the answers are kept.

    Returns a JSON-able dict, the same for the same answers: explainer, simulator, prompts
    (versions), rung (the mode), probe (results by mode), saw (a sentence), despite_probe, stopped
    (a sentence or None), total (questions, failed, tokens), and neurons: {neuron: what
    `simulate_neuron` returns}. A neuron that the budget did not reach is missing; the same call
    continues there. With dry_run it returns an estimate, see price.py.

    Raises UserError if there is no such model, the server is down, the probe fails, or more than
    5 % of the simulations have no answer.
    """
    if settings.dry_run:
        return price.estimate(selected, decode, settings, log)
    results.ready_folder(folder)
    cache = AnswerCache(Path(folder, "llm-cache.jsonl"), settings.budget, settings.replay)
    simulator, explainer = open_models(settings, cache)
    result = empty_result(simulator, explainer)
    threads = ThreadPoolExecutor(settings.workers if simulator.kind == "http" else 1)
    try:
        for model in dict.fromkeys([simulator, explainer or simulator]):
            # Here, before several threads ask at once.
            log(f"{model.name}: {', '.join(model.can['can']) or 'no usable capability'}")
        modes = price.cheapest_first(selected, decode, settings)
        insist = settings.despite_probe
        mode, result["probe"] = probe.choose_mode(simulator, modes, insist, threads, log)
        result["rung"] = mode
        result["saw"] = MODES[mode].saw
        result["despite_probe"] = not probe.passed(result["probe"][mode])
        explained = explain_all(explainer, selected, decode, threads)
        wrong = words_of_others(explained)

        def judged(neuron):
            words = explained[neuron], wrong[neuron]
            return simulate_neuron(simulator, mode, neuron, selected[neuron], *words, decode)

        jobs = {neuron: threads.submit(judged, neuron) for neuron in selected}
        collect(jobs, result["neurons"], log)
    except BudgetSpent:
        result["stopped"] = (
            f"the budget of {settings.budget:,} tokens is spent; the same command continues from "
            "here"
        )
    finally:
        cache.closed = True  # threads that still ask get BudgetSpent
        threads.shutdown(cancel_futures=True)
        if settings.record and cache.used:
            about = {name: result[name] for name in ("explainer", "simulator", "prompts")}
            cache.record(settings.record, {**about, "machine": machine()})
    result["total"] = cache.total()
    return result


def empty_result(simulator, explainer):
    """What `run` returns, before anything is asked."""
    return {
        "explainer": "template" if explainer is None else explainer.name,
        "simulator": simulator.name,
        "prompts": {name: prompt_files.load(name)[0] for name in PROMPTS},
        "rung": None,
        "probe": None,
        "saw": "",
        "despite_probe": False,
        "stopped": None,
        "neurons": {},
    }


def open_models(settings, cache):
    """(simulator, explainer), which may be the same; the explainer is None for "template"."""

    def open_model(spec):
        return LanguageModel(spec, cache, settings.url, settings.key_env, settings.style)

    simulator = open_model(settings.simulator)
    if settings.explainer == "template":
        return simulator, None
    if settings.explainer == settings.simulator:
        return simulator, simulator
    return simulator, open_model(settings.explainer)


# ---- explanations --------------------------------------------------------------------------------


def explain_all(explainer, selected, decode, threads):
    """{neuron: {protocol: (words or None, why not)}}; see `run` for selected."""
    jobs = {}
    for neuron, excerpts in selected.items():
        jobs[neuron] = threads.submit(explain_neuron, explainer, excerpts, decode)
    return {neuron: job.result() for neuron, job in jobs.items()}


def explain_neuron(explainer, selected, decode):
    """{protocol: (words or None, why not)} of one neuron."""
    explained = {}
    for protocol, (to_explain, _) in selected.items():
        try:
            explained[protocol] = explanation.explain(explainer, to_explain, decode), None
        except NoAnswer as error:
            explained[protocol] = None, str(error)
    return explained


def words_of_others(explained):
    """{neuron: {protocol: the words of another neuron, or None}}: the wrong explanations.

    explained: see `explain_all`. The other neuron is the next one of the same site with different
    words, else the next one anywhere.
    """
    names = list(explained)
    wrong = {}
    for i, neuron in enumerate(names):
        others = names[i + 1 :] + names[:i]
        near = [other for other in others if site_of(other) == site_of(neuron)]
        far = [other for other in others if site_of(other) != site_of(neuron)]
        wrong[neuron] = {}
        for protocol, (own, _) in explained[neuron].items():
            candidates = [explained[other][protocol][0] for other in near + far]
            candidates = [words for words in candidates if words not in (None, own)]
            wrong[neuron][protocol] = candidates[0] if candidates else None
    return wrong


def site_of(neuron):
    """The site in a neuron's name: "L0" of "L0 17"."""
    return str(neuron).rpartition(" ")[0]


# ---- one neuron ----------------------------------------------------------------------------------


def simulate_neuron(simulator, mode, neuron, selected, explained, wrong, decode):
    """Judge one neuron by its explanation and by another neuron's, and score both.

    selected: {protocol: (to explain, to score)}; explained, wrong: by protocol, see above.

    Returns {"explanations", "wrong explanations", "simulated", "simulated wrong" (answers, None
    where failed), "failed" (counts)} by protocol, "scores": {metric: (number or None, reason or
    None)}, see `metric_names`, and "reasons" of what failed. openai_random is scored on the
    excerpts of openai_tar, at no extra cost.
    """
    entry = {
        "explanations": {protocol: words for protocol, (words, _) in explained.items()},
        "wrong explanations": wrong,
        "simulated": {},
        "simulated wrong": {},
        "failed": {},
        "scores": {},
        "reasons": {},
    }
    for protocol, (_, to_score) in selected.items():
        cases = simulation.cases(mode, to_score, decode, f"{neuron} {protocol}")
        words, why_not = explained[protocol]
        if why_not:
            entry["reasons"][f"{protocol} explanation"] = why_not
        true = Answers(mode, cases)
        false = Answers(mode, cases)
        if not MODES[mode].needs_words:
            true.ask(simulator, "")
        else:
            true.ask(simulator, words)
            false.ask(simulator, wrong[protocol])
        entry["simulated"][protocol] = true.given
        entry["simulated wrong"][protocol] = false.given
        entry["failed"][protocol] = true.failed + false.failed
        entry["reasons"] |= true.reasons(protocol) | false.reasons(f"{protocol} wrong")
        for metric, scored in metric_names(protocol, simulator.name, mode).items():
            scores = true.score(scored, to_score), false.score(scored, to_score)
            entry["scores"] |= with_gain(metric, mode, *scores)
    return entry


class Answers:
    """The answers to a neuron's questions, cases [(shown, truth)], asked with some words.

    given: an answer for each case, None where it failed; [] before anything is asked.
    """

    def __init__(self, mode, cases):
        self.mode = mode
        self.cases = cases
        self.given, self.why_not = [], []

    def ask(self, simulator, words):
        """Ask with these words; without any (None), do nothing."""
        for shown, _ in self.cases if words is not None else []:
            answer, reason = simulator.simulate(self.mode, words, shown)
            self.given.append(answer)
            self.why_not.append(reason)

    @property
    def failed(self):
        return self.given.count(None)

    def reasons(self, name):
        """{"NAME i": why answer i failed}."""
        return {f"{name} {i}": reason for i, reason in enumerate(self.why_not) if reason}

    def score(self, protocol, excerpts):
        """(number or None, reason or None) under a protocol."""
        if not self.cases:
            return None, "too few excerpts in which it fires strongly, or does not"
        if not self.given:
            return None, "failed: no explanation"
        if MODES[self.mode].gives_activations:
            return protocols.score_excerpts(protocol, excerpts, padded(self.given, excerpts))
        truths, answers = [], []
        for (_, truth), answer in zip(self.cases, self.given):
            if answer is not None:
                truths.append(truth)
                answers.append(answer)
        message = f"{self.failed} of {len(self.cases)} questions without a readable answer"
        if self.failed > protocols.MISSING * len(self.cases):
            return None, f"failed: {message}"
        value, reason = MODES[self.mode].agreement(truths, answers)
        if value is None:
            return None, reason
        return round(value, 4), f"{message}, left out" if self.failed else None


def padded(rows, excerpts):
    """Rows of activations, None where failed, as wide as the excerpts, NaN after their end."""
    width = np.shape(excerpts.tokens)[1] - 1
    wide = []
    for row in rows:
        wide.append(None if row is None else row + [float("nan")] * (width - len(row)))
    return wide


# ---- scores --------------------------------------------------------------------------------------


def judge_label(simulator, mode):
    """The name of a simulator with its mode in results: "llm:smollm2@json"."""
    return f"llm:{simulator}@{mode}"


def metric_names(protocol, simulator, mode):
    """{metric: protocol that scores it} of the excerpts of one protocol, with the true words."""
    label = judge_label(simulator, mode)
    if not MODES[mode].gives_activations:
        return {f"{mode}({protocol})[{label}]": protocol}
    names = [protocol]
    if protocol == "openai_tar":
        names.append("openai_random")
    return {f"{name}[{label}]": name for name in names}


def all_names(metric, mode):
    """The names of a score, of its control and of the difference; intruder has no control."""
    start = metric.removesuffix("]")
    names = [metric, f"{start}{WRONG}]", f"{start}{GAIN}]"]
    return names if MODES[mode].needs_words else [names[0], names[2]]


def with_gain(metric, mode, true, false):
    """{metric: (number or None, reason or None)} of a score, its control and their difference.

    true, false: the scores with the neuron's own explanation and with another's. A simulation that
    is constant has no correlation, but it predicts nothing: in the difference it counts as chance.
    Without a control, chance is subtracted.
    """
    chance = MODES[mode].chance
    if not MODES[mode].needs_words:
        false = chance, None
    sides = [chance if reason == CONSTANT else value for value, reason in (true, false)]
    if None in sides:
        gain = None, true[1] or false[1]
    else:
        gain = sides[0] - sides[1], None
    scores = [true, false, gain] if MODES[mode].needs_words else [true, gain]
    return dict(zip(all_names(metric, mode), scores))


# ---- progress ------------------------------------------------------------------------------------


def collect(jobs, entries, log):
    """Wait for the neurons in order, put their entries into `entries`, log the progress.

    Raises UserError if too many simulations fail.
    """
    start = time.monotonic()
    asked, failed = 0, 0
    for done, (neuron, job) in enumerate(jobs.items(), 1):
        entries[neuron] = entry = job.result()
        for name in ("simulated", "simulated wrong"):
            asked += sum(map(len, entry[name].values()))
        failed += sum(entry["failed"].values())
        enough = asked >= ENOUGH or done == len(jobs)
        if enough and not probe.few_failures(failed, asked):
            reasons = Counter()
            for known in entries.values():
                reasons.update(known["reasons"].values())
            raise UserError(
                f"{failed} of {asked} simulations have no usable answer (mostly: "
                f"{reasons.most_common(1)[0][0]}); with more than {probe.FAILING:.0%} missing "
                "there is no score."
            )
        remaining = (time.monotonic() - start) / done * (len(jobs) - done)
        log(
            f"neuron {done} of {len(jobs)} ({failed} of {asked} simulations failed)  "
            f"ETA {terminal.eta(remaining)}"
        )
