"""From selected excerpts of neurons to scores: probe the simulator, explain, simulate, score.

An excerpt without a usable answer is missing and counted; it never becomes a zero.
"""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from crate_mini import UserError
from crate_mini.console import terminal
from crate_mini.judges import explanation, probe, prompt_files, simulation
from crate_mini.judges.answer_cache import AnswerCache, BudgetSpent, answer_key, token_estimate
from crate_mini.judges.language_model import LanguageModel
from crate_mini.judges.queries import NoAnswer
from crate_mini.judges.simulation import MODES
from crate_mini.neurons import protocols
from crate_mini.training.device import machine

PROMPTS = ("explain", "puzzles", *(mode.prompt for mode in MODES.values()))
ENOUGH = 40  # simulations after which too many failures end the run
SAMPLE_EXPLANATION = "some ten words on what this neuron fires on"  # for an estimate


def run(selected, decode, settings, folder, log=print):
    """Explain and simulate neurons.

    selected: {neuron: {protocol: (Excerpts to explain, Excerpts to score)}}. decode(ids) -> str.
    settings: command.Settings. folder: where the answers are kept.

    Returns a JSON-able dict, the same for the same answers: explainer, simulator, prompts
    (versions), rung (the mode), probe (results by mode), saw (a sentence), despite_probe, stopped
    (a sentence or None), total (questions, failed, tokens), and neurons: {neuron: what
    `simulate_neuron` returns}. A neuron that the budget did not reach is missing; the same call
    continues there. With dry_run it returns an `estimate`.

    Raises UserError if there is no such model, the server is down, the probe fails, or more than
    5 % of the simulations have no answer.
    """
    if settings.dry_run:
        return estimate(selected, decode, settings, log)
    Path(folder).mkdir(parents=True, exist_ok=True)
    cache = AnswerCache(Path(folder, "llm-cache.jsonl"), settings.budget, settings.replay)
    simulator, explainer = open_models(settings, cache)
    result = {
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
    threads = ThreadPoolExecutor(settings.workers if simulator.kind == "http" else 1)
    try:
        for model in dict.fromkeys([simulator, explainer or simulator]):
            # Here, before several threads ask at once.
            log(f"{model.name}: {', '.join(model.can['can']) or 'no usable capability'}")
        mode, result["probe"] = probe.choose_mode(simulator, settings, threads, log)
        result["rung"] = mode
        result["saw"] = MODES[mode].saw
        result["despite_probe"] = not probe.passed(result["probe"][mode])
        jobs = {}
        for neuron, excerpts in selected.items():
            jobs[neuron] = threads.submit(
                simulate_neuron, simulator, explainer, mode, excerpts, decode
            )
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


# ---- one neuron ----------------------------------------------------------------------------------


def simulate_neuron(simulator, explainer, mode, selected, decode):
    """Explain one neuron, simulate it, score it; selected: {protocol: (to explain, to score)}.

    Returns {"explanations", "simulated" (rows, None where failed), "failed" (counts)} by protocol,
    "scores": {"PROTOCOL[llm:NAME@MODE]": (number or None, reason or None)} and "reasons" of what
    failed. openai_random is scored on the excerpts of openai_tar, at no extra cost.
    """
    entry = {"explanations": {}, "simulated": {}, "failed": {}, "scores": {}, "reasons": {}}
    for protocol, (to_explain, to_score) in selected.items():
        words = None
        answers = [(None, "no explanation")] * len(to_score.tokens)
        try:
            words = explanation.explain(explainer, to_explain, decode)
            texts = [token_strings(tokens, decode) for tokens in to_score.tokens]
            answers = [simulator.simulate(mode, words, tokens) for tokens in texts]
        except NoAnswer as error:
            entry["reasons"][f"{protocol} explanation"] = str(error)
        rows = [row for row, _ in answers]
        entry["explanations"][protocol] = words
        entry["failed"][protocol] = rows.count(None)
        for i, (_, reason) in enumerate(answers):
            if reason:
                entry["reasons"][f"{protocol} {i}"] = reason
        metrics = metric_names(protocol, simulator.name, mode)
        if mode == "detection":
            entry["scores"] |= dict.fromkeys(metrics, detection_score(to_score, rows))
            entry["simulated"][protocol] = [None if row is None else row[0] for row in rows]
        else:
            entry["scores"] |= activation_scores(metrics, to_score, rows)
            entry["simulated"][protocol] = rows
    return entry


def token_strings(tokens, decode):
    """The tokens of one excerpt as strings, after the first column and without padding."""
    return [decode([int(id)]) for id in tokens[1:] if id >= 0]


def judge_label(simulator, mode):
    """The name of a simulator with its mode in results: "llm:smollm2@json"."""
    return f"llm:{simulator}@{mode}"


def metric_names(protocol, simulator, mode):
    """{metric: protocol that scores it} of a simulation of the excerpts of one protocol."""
    label = judge_label(simulator, mode)
    if mode == "detection":
        return {f"detection({protocol})[{label}]": protocol}
    names = [protocol]
    if protocol == "openai_tar":
        names.append("openai_random")
    return {f"{name}[{label}]": name for name in names}


def activation_scores(metrics, excerpts, rows):
    """{metric: (number or None, reason or None)} of simulated activations, None where failed.

    metrics: {metric: protocol}.
    """
    width = np.shape(excerpts.tokens)[1] - 1
    padded = []
    for row in rows:
        if row is None:
            padded.append(None)
        else:
            padded.append(row + [float("nan")] * (width - len(row)))
    return {
        metric: protocols.score_excerpts(protocol, excerpts, padded)
        for metric, protocol in metrics.items()
    }


def detection_score(excerpts, rows):
    """(balanced accuracy or None, reason or None) of rows [0] or [1], None where failed."""
    answered = [(acts, row) for acts, row in zip(excerpts.acts, rows) if row is not None]
    if not answered:
        return None, "failed: no answer"
    truth, answers = zip(*answered)
    return simulation.detection_accuracy(truth, answers)


def collect(jobs, entries, log):
    """Wait for the neurons in order, put their entries into `entries`, log the progress.

    Raises UserError if too many simulations fail.
    """
    start = time.monotonic()
    asked, failed = 0, 0
    for done, (neuron, job) in enumerate(jobs.items(), 1):
        entries[neuron] = entry = job.result()
        asked += sum(map(len, entry["simulated"].values()))
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


# ---- a dry run -----------------------------------------------------------------------------------


def estimate(selected, decode, settings, log):
    """Log what a run would ask: prompts, tokens, dollars. Nothing is asked.

    Returns {mode: [questions, tokens in, tokens out]}.
    """
    style = "chat" if settings.style == "chat" else "text"
    pairs = []
    for neuron, excerpts in selected.items():
        pairs += [(neuron, *pair) for pair in excerpts.values()]
    explaining = []
    if settings.explainer != "template":
        explaining = [explanation.query(to_explain, decode, style) for _, to_explain, _ in pairs]
    if explaining:
        log(f"to explain:\n{prompt_text(explaining[0])}\n")
    totals = {}
    for mode in simulation.chosen_modes(settings.rung):
        asked = []
        for neuron, _, to_score in pairs:
            words = f"{SAMPLE_EXPLANATION} {neuron}"  # no two neurons share an explanation
            for tokens in to_score.tokens:
                asked.append(MODES[mode].ask(style, words, token_strings(tokens, decode)))
        totals[mode] = total(explaining + asked)
        questions, tokens_in, tokens_out = totals[mode]
        cost = dollars(settings.price, tokens_in, tokens_out)
        log(
            f"{mode}: {questions:,} questions, about {tokens_in:,} tokens in and "
            f"{tokens_out:,} out{cost}; the probe comes on top. The last:"
        )
        if asked:
            log(f"{prompt_text(asked[-1])}\n")
    return totals


def total(queries):
    """[questions, tokens in, tokens out] of queries, the same one counted once."""
    estimates = {answer_key("", query): token_estimate(query) for query in queries}
    tokens_in = sum(tokens for tokens, _ in estimates.values())
    tokens_out = sum(tokens for _, tokens in estimates.values())
    return [len(estimates), tokens_in, tokens_out]


def dollars(price, tokens_in, tokens_out):
    """The cost as text, ", about $1.23"; "" without a price.

    price: dollars per million tokens in and out, like "0.15,0.60".
    """
    if not price:
        return ""
    price_in, price_out = map(float, price.split(","))
    return f", about ${price_in * tokens_in / 1e6 + price_out * tokens_out / 1e6:.2f}"


def prompt_text(query):
    """A query's prompt for people to read."""
    return query.get("prompt") or "\n".join(f"[{role}] {text}" for role, text in query["chat"])
