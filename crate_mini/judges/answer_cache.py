"""Each question to a language model is asked once: cache on disk, budget, recording and replay.

All three are files of JSON lines {"key": ..., "answer": ...}; the key is a hash of client, model,
prompt and parameters:
    llm-cache.jsonl    in the output folder; grows with each answer, so that a stopped run can
                       continue. Its keys also hold where a model is: two folders or two servers
                       may use the same name
    --record FILE      the answers that one run used, failures too; its first line describes the
                       run
    --replay FILE      such a file, from which all answers are taken; a question that it does not
                       hold is an error
"""

import hashlib
import json
from pathlib import Path
from threading import Lock

from crate_mini import UserError
from crate_mini.console import results
from crate_mini.console.results import atomic_write
from crate_mini.judges.queries import NoAnswer

UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
CHARACTERS_PER_TOKEN = 3  # in quoted words


class BudgetSpent(Exception):
    """The budget does not cover the next question."""


def answer_key(model, query):
    """The key of an answer. model: [client, name, ...]; query: a JSON object."""
    return hashlib.sha256(json.dumps([model, query], sort_keys=True).encode()).hexdigest()[:32]


def token_estimate(query):
    """(in, out): about how many tokens a query costs."""
    text = query.get("prompt") or "".join(content for _, content in query.get("chat", []))
    return len(text) // CHARACTERS_PER_TOKEN + 1, query.get("most", 1)


def read_answers(path):
    """{key: answer} of a file. A last line without its end, left by a kill, does not count."""
    lines = results.read_bytes(path).decode().split("\n")[:-1]
    entries = [json.loads(line) for line in lines]
    if not all(results.is_intact(entry) for entry in entries):
        raise ValueError("a line does not fit its digest")
    return {entry["key"]: entry["answer"] for entry in entries if "key" in entry}


def json_line(key, answer):
    entry = results.sealed({"key": key, "answer": answer})
    return json.dumps(entry, sort_keys=True) + "\n"


class AnswerCache:
    """Passes questions on to a model unless their answers are known; threads may share it.

    budget: tokens, in and out, that this run may spend; 0 for no limit. answers: all known ones by
    key. used: those of this run. spent: tokens [in, out] of questions really asked. closed: once
    True, nothing more is asked. Raises UserError for a file that cannot be read.
    """

    def __init__(self, path, budget=0, replay=""):
        self.path = Path(path)
        self.budget = budget
        self.replay = replay
        self.lock = Lock()
        self.answers = {}
        self.used = {}
        self.spent = [0, 0]
        self.closed = False
        self._worst_estimate = 1.0  # largest ratio of real to estimated tokens
        self._cut_line_removed = False
        source = Path(replay) if replay else self.path
        if source.exists() or replay:
            try:
                self.answers = read_answers(source)
            except (*UNREADABLE, OSError) as error:
                advice = "give another file"
                if not replay:
                    advice = "remove it, and its questions are asked again"
                reason = getattr(error, "strerror", None) or "it is damaged, or holds other things"
                raise UserError(
                    f"{source} cannot be read as recorded answers: {reason}; {advice}."
                ) from None

    def ask(self, model, query):
        """The answer to a query, from the cache or from model.client.

        model.identity is [client, name], model.location its folder or URL. Raises NoAnswer,
        BudgetSpent, and UserError for a question that a replayed file does not hold.
        """
        recorded_key = answer_key(model.identity, query)
        if self.replay:
            key = recorded_key
        else:
            key = answer_key([*model.identity, model.location], query)
        answer = self._known(key, query)
        if answer is None:
            try:
                answer = model.client.ask(query)
            except NoAnswer as error:
                answer = {"failed": str(error)}
            with self.lock:
                self._correct_spending(query, answer)
                self._keep(key, query, answer)
        self.used[recorded_key] = answer
        if "failed" in answer:
            raise NoAnswer(answer["failed"])
        return answer

    def total(self):
        """{"questions", "failed", "tokens": [in, out]} of all answers used, old and new."""
        answers = self.used.values()
        tokens = [answer.get("tokens", (0, 0)) for answer in answers]
        return {
            "questions": len(answers),
            "failed": sum("failed" in answer for answer in answers),
            "tokens": [sum(pair[0] for pair in tokens), sum(pair[1] for pair in tokens)],
        }

    def record(self, path, about):
        """Write the answers of this run to a file for --replay.

        about: a JSON-able dict that describes the run.
        """
        with atomic_write(path) as file:
            file.write((json.dumps({"about": about}, sort_keys=True) + "\n").encode())
            for key in sorted(self.used):
                file.write(json_line(key, self.used[key]).encode())

    def _known(self, key, query):
        """The answer if it is known, else None, and the estimated tokens count as spent."""
        with self.lock:
            if self.closed:
                raise BudgetSpent
            answer = self.answers.get(key)
            if answer is not None:
                return answer
            if self.replay:
                raise UserError(
                    f"{self.replay} has no answer to a question of this run: it was made with "
                    "other prompts, models, neurons or settings; make it again with --record."
                )
            estimate = token_estimate(query)
            cost = self._worst_estimate * sum(estimate)
            if self.budget and sum(self.spent) + cost > self.budget:
                raise BudgetSpent
            self.spent = [self.spent[0] + estimate[0], self.spent[1] + estimate[1]]
        return None

    def _correct_spending(self, query, answer):
        """Replace the estimated tokens of a question by the real ones, where they are known."""
        real = answer.get("tokens", [0, 0])
        estimate = token_estimate(query)
        ratio = sum(real) / sum(estimate)
        self._worst_estimate = max(self._worst_estimate, ratio)  # never too low again
        for i in (0, 1):
            self.spent[i] += (real[i] or estimate[i]) - estimate[i]

    def _keep(self, key, query, answer):
        """Append an answer to the cache; the next run asks again for what has failed."""
        if "failed" in answer:
            return
        self.answers[key] = answer
        if query["ask"] == "can":
            return  # a server may have learned more by the next run
        try:
            self._remove_cut_line()
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json_line(key, answer))
        except OSError as error:
            raise UserError(
                f"Cannot write {self.path}: {error.strerror}; make room or choose another folder "
                "with --out."
            ) from None

    def _remove_cut_line(self):
        """Before the first write: remove a last line without its end, which a kill may leave."""
        if self._cut_line_removed:
            return
        self._cut_line_removed = True
        if self.path.exists():
            content = results.read_bytes(self.path)
            if not content.endswith(b"\n"):
                with atomic_write(self.path) as file:
                    file.write(content[: content.rfind(b"\n") + 1])
