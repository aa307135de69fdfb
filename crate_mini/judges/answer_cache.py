"""Each question to a language model is asked once: cache on disk, budget, recording and replay.

All three are files of JSON lines {"key": hash of back end, model, prompt and parameters, "answer": ...}:
    llm-cache.jsonl    in the output folder; grows with each answer, so that a stopped run goes on; in its
                       keys is also where a model lies: two folders, two servers may use the same name
    --record FILE      what one run used, failures too; a first line says how it was made
    --replay FILE      such a file; nothing else is asked, and a question it does not know is an error
"""

import hashlib
import json
from pathlib import Path
from threading import Lock

from crate_mini import UserError, atomic_write
from crate_mini.judges.http_client import Failed


class Spent(Exception):
    """The budget does not hold the next question."""


def key(name, query):
    """What an answer is filed under. name: [back end, model]; query: a JSON object."""
    return hashlib.sha256(json.dumps([name, query], sort_keys=True).encode()).hexdigest()[:32]


def size(query):
    """(in, out): about how many tokens a query costs. Quoted words take about three characters a token."""
    said = query.get("prompt") or "".join(content for _, content in query.get("chat", []))
    return len(said) // 3 + 1, query.get("most", 1)


def read(path):
    """{key: answer} of a tape. A last line without its end, left by a kill, does not count."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1]
    entries = [json.loads(line) for line in lines]
    return {entry["key"]: entry["answer"] for entry in entries if "key" in entry}


class Tape:
    """Asks through what is known already; threads may share it.

    budget: tokens (in and out) that this run may spend, 0 for any number. answers: what is known by key;
    used: what this run used. asked: questions really sent; spent: their tokens [in, out].
    closed: set it, and nothing is asked any more.
    Raises UserError for a tape that cannot be read.
    """

    def __init__(self, cache, budget=0, replay=""):
        self.path, self.budget, self.replay, self.lock = Path(cache), budget, replay, Lock()
        self.answers, self.used, self.spent = {}, {}, [0, 0]
        self.asked, self.closed, self.dear = 0, False, 1.0
        source = Path(replay) if replay else self.path
        if source.exists() or replay:
            try:
                self.answers = read(source)
            except (OSError, ValueError, KeyError, TypeError) as e:
                raise UserError(
                    f"{source} cannot be read as recorded answers ({type(e).__name__}); "
                    f"{'give' if replay else 'remove it or give'} another file."
                ) from None
        self.start = not replay

    def ask(self, name, model, query):
        """The answer of model.back_end.ask(query), model.where being where it lies. Raises Failed (none that
        can be used), Spent."""
        filed = key(name, query)
        known = filed if self.replay else key([*name, model.where], query)
        with self.lock:
            answer = self.answers.get(known)
            if self.closed:
                raise Spent
            if answer is None and self.replay:
                raise UserError(
                    f"{self.replay} has no answer to a question of this run: it was made with "
                    "other prompts, models, neurons or settings; make it again with --record."
                )
            if answer is None:
                if self.budget and sum(self.spent) + self.dear * sum(size(query)) > self.budget:
                    raise Spent
                self.asked += 1
                self.spent = [a + b for a, b in zip(self.spent, size(query))]  # corrected by _file
        if answer is None:
            try:
                answer = model.back_end.ask(query)
            except Failed as e:
                answer = {"failed": str(e)}
            with self.lock:
                self._file(known, query, answer)
        self.used[filed] = answer
        if "failed" in answer:
            raise Failed(answer["failed"])
        return answer

    def total(self):
        """{"questions", "failed", "tokens"} of all that this run used, wherever its answers came from."""
        tokens = [sum(a.get("tokens", (0, 0))[i] for a in self.used.values()) for i in (0, 1)]
        failed = sum("failed" in a for a in self.used.values())
        return {"questions": len(self.used), "failed": failed, "tokens": tokens}

    def _file(self, filed, query, answer):
        real = answer.get("tokens", [0, 0])
        self.dear = max(
            self.dear, sum(real) / sum(size(query))
        )  # so that no guess is too low again
        self.spent = [
            s - guess + (r or guess) for s, guess, r in zip(self.spent, size(query), real)
        ]
        if "failed" in answer:
            return  # asked again by the next run
        self.answers[filed] = answer
        if query["ask"] == "can":
            return  # a server may have learned more by then
        try:
            if self.start and self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
                text = self.path.read_bytes()  # cut off what a kill left
                with atomic_write(self.path) as file:
                    file.write(text[: text.rfind(b"\n") + 1])
            self.start = False
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line(filed, answer))
        except OSError as e:
            raise UserError(
                f"Cannot write {self.path}: {e.strerror}; make room or choose another folder "
                "with --out."
            ) from None

    def record(self, path, about):
        """Write what this run used to a file for --replay; about: a JSON-able dict on how it was made."""
        with atomic_write(path) as file:
            file.write((json.dumps({"about": about}, sort_keys=True) + "\n").encode())
            file.writelines(line(filed, self.used[filed]).encode() for filed in sorted(self.used))


def line(filed, answer):
    return json.dumps({"key": filed, "answer": answer}, sort_keys=True) + "\n"
