"""Client of a server that speaks OpenAI's protocol: OpenAI, OpenRouter, vLLM, llama.cpp, Ollama."""

import email.utils
import json
import re
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException

from crate_mini import UserError
from crate_mini.judges.queries import NoAnswer, level_logprobs
from crate_mini.judges.server_key import ServerKey

ALTERNATIVES = 20  # log-probabilities for each token: the most that OpenAI and vLLM return
RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}
QUESTION_AT_FAULT = {400, 404, 405, 413, 415, 422}  # one query fails, the run continues
ADVICE = {  # at the end of the message that ends a run
    401: "is the key in {key_env} right?",
    402: "is the account behind {key_env} paid up?",
    403: "may the key in {key_env} use this model?",
    429: "the quota is used up, or wait; all answers so far are kept",
}
REFUSED_LENGTH = re.compile(
    r"max_completion_tokens|(unsupported|unrecognized|unknown|unexpected).{0,40}max_tokens",
    re.IGNORECASE,
)
LONGEST_WAIT = 120  # seconds that a server may ask for
LARGEST_REPLY = 1 << 24  # bytes
LARGEST_ERROR = 1 << 16
SHOWN = 200  # characters of an error message
UNKNOWN_MODEL = re.compile(
    r"\b(model|deployment)\b.{0,100}not (found|exist)|(unknown|no such|invalid|not a valid) model",
    re.IGNORECASE,
)
ROOM_TO_REASON = 2000  # more tokens for models that think before they answer
MOST_TOKENS = 10**9  # that a server may say it used
CAPABILITY_TESTS = {
    "prompt logprobs": {"ask": "slots", "prompt": "a\t1\nb\t2\nc\t?\nd\t?", "at": [10, 14]},
    "text logprobs": {"ask": "next", "prompt": "1, 2, 3, 4,"},
    "chat logprobs": {"ask": "next", "chat": [["user", "What is 2 + 2? Only the number."]]},
    "text": {"ask": "text", "prompt": "1, 2, 3,", "most": 2},
    "chat": {"ask": "text", "chat": [["user", "Say yes."]], "most": 2},
}
NOT_OPENAI = (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError)


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

    The key comes from the environment variable `key_env`, see server_key.py. Raises UserError if
    the server is down, refuses the key or does not know the model; NoAnswer if one query fails: its
    answer makes no sense or is refused, or the status is 400, or 500 and above in all tries.

    Parameters that models of today refuse are replaced or left out once a server has said so.
    """

    def __init__(self, model, url, key_env, timeout=120, tries=5, sleep=time.sleep):
        self.model = model
        self.key = ServerKey(key_env, url)
        self.url = url.rstrip("/")
        self.timeout = timeout  # seconds
        self.tries = tries
        self.sleep = sleep
        self.length_name = "max_tokens"
        self.temperature = {"temperature": 0}
        handlers = [NoRedirect]
        if self.key.local:
            handlers.append(urllib.request.ProxyHandler({}))  # a proxy would see the key
        self.open = urllib.request.build_opener(*handlers).open

    def ask(self, query):
        """The answer to a query (see queries.py)."""
        answers = {"can": self._can, "text": self._text, "next": self._next, "slots": self._slots}
        try:
            return answers[query["ask"]](query)
        except RecursionError:
            raise NoAnswer("an answer that is too deeply nested") from None
        except NOT_OPENAI:
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
        unknown = [reason for reason in why.values() if UNKNOWN_MODEL.search(reason)]
        if unknown and not can:
            raise UserError(
                f"{self.shown_url} does not serve {self.model} ({unknown[-1]}); name a model that "
                "it serves."
            )
        return {"can": can, "why": why, "tokens": spent}

    def _text(self, query):
        if "chat" in query:
            reply, choice = self._complete(query, query["most"])
            text = message_text(choice)
        else:
            reply, choice = self._complete(query, query["most"], stop=["\n"])
            text = choice["text"]
        why_not = refusal(choice, text)
        if why_not:
            raise NoAnswer(self.key.hidden(why_not)[:SHOWN])
        return {"text": text, "tokens": tokens_used(reply)}

    def _next(self, query):
        if "chat" in query:
            asked = {"logprobs": True, "top_logprobs": ALTERNATIVES}
        else:
            asked = {"logprobs": ALTERNATIVES}
        reply, choice = self._complete(query, 2, **asked)
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
        reply, choice = self._complete(query, 1, echo=True, logprobs=ALTERNATIVES)
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
        _, choice = self._complete({"prompt": prompt}, 1, logprobs=ALTERNATIVES)
        return alternatives(choice)[0]

    def _complete(self, query, most, **parameters):
        """(reply, its one choice) of the endpoint for this kind of prompt; most: tokens."""
        if "chat" in query:
            path = "/chat/completions"
            chat = query["chat"]
            prompt = {"messages": [{"role": role, "content": text} for role, text in chat]}
        else:
            path, prompt = "/completions", {"prompt": query["prompt"]}
        while True:
            length_name, temperature = self.length_name, self.temperature
            room = most if length_name == "max_tokens" else most + ROOM_TO_REASON
            body = {"model": self.model, **temperature, length_name: room, **prompt, **parameters}
            try:
                reply = self._post(path, body)
                return reply, reply["choices"][0]
            except NoAnswer as error:
                if not self._adapted(str(error), length_name, temperature):
                    raise

    def _adapted(self, message, length_name, temperature):
        """Whether a parameter of the refused request can be sent otherwise, from now on.

        A thread may find that another one has already changed it.
        """
        if length_name == "max_tokens" and REFUSED_LENGTH.search(message):
            self.length_name = "max_completion_tokens"
            return True
        if temperature and re.search(r"status 4\d\d: .*temperature", message):
            self.temperature = {}
            return True
        return False

    def _post(self, path, body):
        """The JSON reply to a POST; waits and tries again where that may help."""
        for attempt in range(self.tries):
            try:
                return self._send(path, body)
            except urllib.error.HTTPError as error:
                failed = self._refused(error, 2**attempt)
            except (OSError, HTTPException) as error:
                reason = str(getattr(error, "reason", error)) or "the connection broke off"
                failed = FailedTry(None, self.key.hidden(reason)[:SHOWN], 2**attempt)
            if failed.status and failed.status not in RETRIED:
                break
            if failed.wait > LONGEST_WAIT:
                raise UserError(
                    f"{self.shown_url} asks to wait {failed.wait:.0f} s; run the same command "
                    "again then, all answers so far are kept."
                )
            if attempt + 1 < self.tries:
                self.sleep(failed.wait)
        raise self._failure(failed)

    @property
    def shown_url(self):
        return self.key.hidden(self.url)

    def _send(self, path, body):
        headers = {"Content-Type": "application/json", **self.key.headers()}
        content = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, content, headers)
        with self.open(request, timeout=self.timeout) as reply:
            received = reply.read(LARGEST_REPLY + 1)
            if len(received) > LARGEST_REPLY:
                raise NoAnswer(f"a reply of more than {LARGEST_REPLY:,} bytes")
            if reply.length:  # bytes still to come
                raise OSError("the connection broke off")
        return self.key.hidden_in(json.loads(received))

    def _refused(self, error, default_wait):
        """The FailedTry of a reply with an error status."""
        received = b""
        with suppress(OSError, HTTPException):  # the connection may break in the message
            received = error.read(LARGEST_ERROR + 1)
            if len(received) > LARGEST_ERROR:  # its end may be a part of the key
                received = b"a message that is too long to be read"
        message = error_message(received.decode("utf-8", "replace"))
        if 300 <= error.code < 400:
            message = f"it redirects to {error.headers.get('Location', 'nowhere')}"
        message = self.key.hidden(message)[:SHOWN]  # in this order
        return FailedTry(error.code, message, retry_after(error.headers, default_wait))

    def _failure(self, failed):
        """The exception for the last try."""
        message, status = failed.message, failed.status
        if status:
            message = f"status {status}: {message}"
            if status in QUESTION_AT_FAULT or status >= 500:
                return NoAnswer(message)
        advice = ADVICE.get(status, "is it the right --url?").format(key_env=self.key.variable)
        return UserError(f"{self.shown_url} does not answer ({message}); {advice}")


# ---- replies -------------------------------------------------------------------------------------


def message_text(choice):
    """The text of a chat's answer, which some servers send in parts; None if there is none."""
    content = choice["message"]["content"]
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part.get("type") == "text")
    return content


def refusal(choice, text):
    """Why a choice holds no answer, in words, or None if it does."""
    message = choice.get("message") or {}
    if message.get("refusal"):
        return f"the model refuses: {message['refusal']}"
    finish = choice.get("finish_reason")
    if finish == "content_filter":
        return "stopped by the server's content filter"
    if text is not None and text.strip():
        return None
    if finish == "length":
        return "no answer within the tokens allowed; does the model reason first?"
    return "an empty answer"


def error_message(text):
    """The message in the body of an error, or the body itself if it has no known form."""
    try:
        content = json.loads(text)
        error = content.get("error", content)
        if isinstance(error, dict):
            error = error.get("message") or error.get("detail")
    except (ValueError, AttributeError, RecursionError):
        return text
    return error if isinstance(error, str) else text


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
    """[in, out], 0 where a server does not say, or says something impossible."""
    usage = reply.get("usage") or {}
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    return [n if type(n) is int and 0 <= n <= MOST_TOKENS else 0 for n in counts]


def retry_after(headers, default):
    """Seconds that a reply asks to wait, given as a number or as a date."""
    asked = headers.get("Retry-After", "")
    if re.fullmatch(r"\d+(\.\d+)?", asked):
        return float(asked)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(asked).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, OSError):
        return default
