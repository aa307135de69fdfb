"""Client of a server that speaks OpenAI's protocol: OpenAI, OpenRouter, vLLM, llama.cpp, Ollama."""

import email.utils
import json
import os
import re
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException

from crate_mini import UserError
from crate_mini.judges.queries import NoAnswer, level_logprobs

ALTERNATIVES = 20  # log-probabilities for each token: the most that OpenAI and vLLM return
RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}
QUESTION_AT_FAULT = {400, 404, 405, 413, 415, 422}  # one query fails, the run continues
LONGEST_WAIT = 120  # seconds that a server may ask for
CAPABILITY_TESTS = {
    "prompt logprobs": {"ask": "slots", "prompt": "a\t1\nb\t2\nc\t?\nd\t?", "at": [10, 14]},
    "text logprobs": {"ask": "next", "prompt": "1, 2, 3, 4,"},
    "chat logprobs": {"ask": "next", "chat": [["user", "What is 2 + 2? Only the number."]]},
    "text": {"ask": "text", "prompt": "1, 2, 3,", "most": 2},
    "chat": {"ask": "text", "chat": [["user", "Say yes."]], "most": 2},
}


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would carry the key along to another host."""

    def redirect_request(self, *args):
        return None


@dataclass
class FailedTry:
    """Why one try failed, and how long to wait before the next. status: None without a reply."""

    status: int | None
    message: str
    wait: float  # seconds


class HttpClient:
    """A model behind an OpenAI-compatible base URL.

    The key comes from the environment variable `key_env` and goes nowhere but to the server. Raises
    UserError if the server is down, refuses the key or does not know the model; NoAnswer if one
    query fails: its answer makes no sense, or the status is 400, or 500 and above in all tries.
    """

    def __init__(self, model, url, key_env, timeout=120, tries=5, sleep=time.sleep):
        parts = re.match(r"(https?)://([^/:@]+|\[[^]]+\])(:\d+)?(/|$)", url)
        if not parts:
            raise UserError(
                f"--url {url!r} is not a base URL; it looks like http://127.0.0.1:8080/v1."
            )
        self.model = model
        self.url = url.rstrip("/")
        self.key_env = key_env
        self.timeout = timeout  # seconds
        self.tries = tries
        self.sleep = sleep
        self.open = urllib.request.build_opener(NoRedirect).open
        self._check_key(scheme=parts[1], host=parts[2])

    def _check_key(self, scheme, host):
        """Raise UserError where a key is missing or would travel unencrypted."""
        local = host in ("localhost", "[::1]") or host.startswith("127.")
        key = os.environ.get(self.key_env)
        if not key and not local:
            raise UserError(
                f"{host} needs a key: put it into the environment variable {self.key_env}."
            )
        if key and scheme == "http" and not local:
            raise UserError(
                f"{self.url} would carry the key in {self.key_env} over the network unencrypted: "
                f"use https, or unset {self.key_env} if the server needs no key."
            )

    def ask(self, query):
        """The answer to a query (see queries.py)."""
        answers = {"can": self._can, "text": self._text, "next": self._next, "slots": self._slots}
        try:
            return answers[query["ask"]](query)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise NoAnswer("an answer that is not OpenAI's") from None

    # ---- the four questions ----

    def _can(self, query):
        can, why = [], {}
        spent = [0, 0]
        for capability, test in CAPABILITY_TESTS.items():
            try:
                tokens = self.ask(test)["tokens"]
            except NoAnswer as error:
                why[capability] = str(error)
                continue
            can.append(capability)
            spent = [spent[0] + tokens[0], spent[1] + tokens[1]]
        return {"can": can, "why": why, "tokens": spent}

    def _text(self, query):
        if "chat" in query:
            reply, choice = self._complete(query, max_tokens=query["most"])
            text = choice["message"]["content"]
        else:
            reply, choice = self._complete(query, max_tokens=query["most"], stop=["\n"])
            text = choice["text"]
        if not text.strip():
            raise ValueError
        return {"text": text, "tokens": tokens_used(reply)}

    def _next(self, query):
        if "chat" in query:
            asked = {"logprobs": True, "top_logprobs": ALTERNATIVES}
        else:
            asked = {"logprobs": ALTERNATIVES}
        reply, choice = self._complete(query, max_tokens=2, **asked)
        first, *rest = alternatives(choice)

        def after_one():
            # If the first token was "1", the second tells; otherwise a prompt can be continued.
            if max(first, key=first.get).strip() == "1":
                return rest[0] if rest else {}
            return {} if "chat" in query else self._following(query["prompt"] + "1")

        levels = level_logprobs(first, after_one)
        if not levels:
            raise NoAnswer("no number among the next token's alternatives")
        return {"next": levels, "tokens": tokens_used(reply)}

    def _slots(self, query):
        prompt, slots = query["prompt"], query["at"]
        reply, choice = self._complete(query, max_tokens=1, echo=True, logprobs=ALTERNATIVES)
        logprobs = choice["logprobs"] or {}
        if "tokens" not in logprobs:
            raise NoAnswer("echo is accepted and ignored")
        # Found from the end, not by offset: servers count bytes, characters, or spellings.
        positions = slot_tokens(logprobs["tokens"][:-1])[-len(slots) :]
        tops = logprobs["top_logprobs"]
        if len(positions) < len(slots) or not all(tops[i] for i in positions):
            raise NoAnswer("no log-probabilities of the prompt's tokens")
        levels = []
        for position, slot in zip(positions, slots):

            def after_one(slot=slot):
                return self._following(prompt[:slot] + "1")

            levels.append(level_logprobs(tops[position], after_one))
        return {"slots": levels, "tokens": tokens_used(reply)}

    # ---- requests ----

    def _following(self, prompt):
        """Alternatives for the token that follows a prompt."""
        _, choice = self._complete({"prompt": prompt}, max_tokens=1, logprobs=ALTERNATIVES)
        return alternatives(choice)[0]

    def _complete(self, query, **parameters):
        """(reply, its one choice) of the endpoint for this kind of prompt."""
        body = {"model": self.model, "temperature": 0, **parameters}
        if "chat" in query:
            chat = query["chat"]
            body["messages"] = [{"role": role, "content": content} for role, content in chat]
            reply = self._post("/chat/completions", body)
        else:
            body["prompt"] = query["prompt"]
            reply = self._post("/completions", body)
        return reply, reply["choices"][0]

    def _post(self, path, body):
        """The JSON reply to a POST; waits and tries again where that may help."""
        for attempt in range(self.tries):
            try:
                return self._send(path, body)
            except urllib.error.HTTPError as error:
                failed = self._refused(error, 2**attempt)
            except (OSError, HTTPException) as error:
                reason = str(getattr(error, "reason", error)) or "the connection broke off"
                failed = FailedTry(None, self._without_key(reason), 2**attempt)
            if failed.status and failed.status not in RETRIED:
                break
            if failed.wait > LONGEST_WAIT:
                raise UserError(
                    f"{self.url} asks to wait {failed.wait:.0f} s; run the same command again "
                    "then, all answers so far are kept."
                )
            if attempt + 1 < self.tries:
                self.sleep(failed.wait)
        raise self._failure(failed)

    def _send(self, path, body):
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self.key_env)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        content = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, content, headers)
        with self.open(request, timeout=self.timeout) as reply:
            return json.loads(reply.read())

    def _refused(self, error, default_wait):
        """The FailedTry of a reply with an error status."""
        message = ""
        with suppress(OSError, HTTPException):  # the connection may break in the message
            message = error.read(300).decode("utf-8", "replace")
        wait = retry_after(error.headers, default_wait)
        return FailedTry(error.code, self._without_key(message), wait)

    def _without_key(self, message):
        """A message in one line, with *** where a server has sent the key back."""
        key = os.environ.get(self.key_env)
        if key:
            message = message.replace(key, "***")
        return " ".join(message.split())

    def _failure(self, failed):
        """The exception for the last try."""
        message, status = failed.message[:150], failed.status
        if status:
            message = f"status {status}: {message}"
            if status in QUESTION_AT_FAULT or status >= 500:
                return NoAnswer(message)
        advice = "is it the right --url?"
        if status in (401, 403):
            advice = f"is the key in {self.key_env} right?"
        return UserError(f"{self.url} does not answer ({message}); {advice}")


# ---- replies -------------------------------------------------------------------------------------


def alternatives(choice):
    """[{token: log-probability}, ...] of the generated tokens, in either form that servers use."""
    logprobs = choice["logprobs"]
    if "content" not in logprobs:
        return [top or {} for top in logprobs["top_logprobs"]]
    tokens = []
    for generated in logprobs["content"]:
        tops = generated["top_logprobs"]
        tokens.append({top["token"]: top["logprob"] for top in tops})
    return tokens


def slot_tokens(tokens):
    """Positions of the prompt tokens that begin with the "?" of a slot."""
    after_tab = range(1, len(tokens))
    return [i for i in after_tab if tokens[i][:1] == "?" and tokens[i - 1][-1:] == "\t"]


def tokens_used(reply):
    """[in, out], 0 where a server does not say."""
    usage = reply.get("usage") or {}
    return [int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))]


def retry_after(headers, default):
    """Seconds that a reply asks to wait, given as a number or as a date."""
    asked = headers.get("Retry-After", "")
    if re.fullmatch(r"\d+(\.\d+)?", asked):
        return float(asked)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(asked).timestamp() - time.time())
    except (ValueError, TypeError):
        return default
