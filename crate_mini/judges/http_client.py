"""Language models to ask, here: any server that speaks OpenAI's protocol. (transformers: local_lm.py.)

All back ends answer the same queries, JSON objects, with JSON objects:
    {"ask": "can"}                        -> {"can": [capability, ...], "why": {capability: why not}}
    {"ask": "text", "most": n, ...}       -> {"text": str}   greedy, at most n tokens; a prompt's to line end
    {"ask": "next", ...}                  -> {"next": {number: log-probability}}     of the next token
    {"ask": "slots", "prompt", "at": []}  -> {"slots": [{number: log-probability}, ...]}
each with "tokens": [in, out]; numbers are "0" .. "10". The dots are "prompt": str or "chat": [[role,
content], ...]. A slot is a character of the prompt, "?" after a tab: which numbers could have stood there?

Capabilities: "text" and "chat" (an answer to a prompt, to messages), "text logprobs" and "chat logprobs" (of
the next token), "prompt logprobs" (of slots).
"""

import email.utils
import json
import math
import os
import re
import time
import urllib.error
import urllib.request
from contextlib import suppress
from http.client import HTTPException

from crate_mini import UserError

NUMBERS = [str(n) for n in range(11)]
TOP = 20  # alternatives to ask a server for: the most that OpenAI and vLLM give
SURE = 0.01  # a "1" less likely than this is not followed up for "10"
AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
LONGEST = 120  # seconds that a server may ask to wait


class Failed(Exception):
    """One query has no usable answer: its value is missing and counted, the run goes on."""


def numbers(top, after_one):
    """{"0" .. "10": log-probability} among alternatives {token: log-probability}; other tokens are left out.

    Many vocabularies write 10 as two tokens; then "1" holds both, and `after_one()`, the alternatives for the
    token that follows a "1", divides it.
    """
    found = {}
    for token, value in top.items():
        if (number := token.strip()) in NUMBERS:  # " 7" is a 7 too
            found[number] = math.log(math.exp(max(value, -99)) + math.exp(found.get(number, -999)))
    if "10" not in found and math.exp(found.get("1", -99)) >= SURE:
        following = {
            token: math.exp(value) for token, value in after_one().items() if token[:1].isdigit()
        }
        one, ten = 1 - sum(following.values()), following.get("0", 0)
        found |= {n: found["1"] + math.log(max(p, 1e-9)) for n, p in (("1", one), ("10", ten))}
    return {number: round(value, 4) for number, value in found.items()}


# ---- a server --------------------------------------------------------------------------------------------


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would carry the key along to another host."""

    def redirect_request(self, *args):
        return None


class Http:
    """A model behind an OpenAI-compatible base URL; the key comes from the environment and goes nowhere else.

    Raises UserError when the server is down, refuses the key or does not know the model; Failed when one
    query goes wrong (an answer that makes no sense, a status of 400, or of 500 and above after all tries).
    """

    def __init__(self, model, url, key_env, timeout=120, tries=5, sleep=time.sleep):
        host = re.match(r"(https?)://([^/:@]+|\[[^]]+\])(:\d+)?(/|$)", url)
        if not host:
            raise UserError(
                f"--url {url!r} is no base URL; it looks like http://127.0.0.1:8080/v1."
            )
        self.model, self.url, self.key_env = model, url.rstrip("/"), key_env
        self.timeout, self.tries, self.sleep = timeout, tries, sleep
        self.local = host[2] in ("localhost", "[::1]") or host[2].startswith("127.")
        self.open = urllib.request.build_opener(NoRedirect).open
        key = os.environ.get(key_env)
        if not key and not self.local:
            raise UserError(
                f"{host[2]} needs a key: put it into the environment variable {key_env}."
            )
        if key and host[1] == "http" and not self.local:
            raise UserError(
                f"{url} would carry the key in {key_env} over the network unencrypted: use "
                f"https, or unset {key_env} if the server asks for none."
            )

    def ask(self, query):
        """The answer to a query (see above)."""
        try:
            return getattr(self, "_" + query["ask"])(query)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as e:
            raise Failed(f"an answer that is not OpenAI's ({type(e).__name__})") from None

    def _can(self, query):
        can, why, spent = [], {}, [0, 0]
        tests = {
            "prompt logprobs": {"ask": "slots", "prompt": "a\t1\nb\t2\nc\t?\nd\t?", "at": [10, 14]},
            "text logprobs": {"ask": "next", "prompt": "1, 2, 3, 4,"},
            "chat logprobs": {"ask": "next", "chat": [["user", "What is 2 + 2? Only the number."]]},
            "text": {"ask": "text", "prompt": "1, 2, 3,", "most": 2},
            "chat": {"ask": "text", "chat": [["user", "Say yes."]], "most": 2},
        }
        for name, test in tests.items():
            try:
                used = self.ask(test)["tokens"]
                can, spent = [*can, name], [a + b for a, b in zip(spent, used)]
            except Failed as e:
                why[name] = str(e)
        return {"can": can, "why": why, "tokens": spent}

    def _text(self, query):
        stop = {} if "chat" in query else {"stop": ["\n"]}
        reply, choice = self._complete(query, max_tokens=query["most"], **stop)
        text = choice["message"]["content"] if "chat" in query else choice["text"]
        if not text.strip():
            raise ValueError
        return {"text": text, "tokens": self._used(reply)}

    def _next(self, query):
        asked = {"logprobs": True, "top_logprobs": TOP} if "chat" in query else {"logprobs": TOP}
        reply, choice = self._complete(query, max_tokens=2, **asked)
        first, *rest = self._tops(choice)

        def after_one():  # the second token tells, if the first was "1"; a prompt can be continued
            if max(first, key=first.get).strip() == "1":
                return rest[0] if rest else {}
            return {} if "chat" in query else self._following(query["prompt"] + "1")

        found = numbers(first, after_one)
        if not found:
            raise Failed("no number among the next token's alternatives")
        return {"next": found, "tokens": self._used(reply)}

    def _slots(self, query):
        prompt = query["prompt"]
        reply, choice = self._complete(query, max_tokens=1, echo=True, logprobs=TOP)
        found = choice["logprobs"] or {}
        if "tokens" not in found:
            raise Failed("echo is accepted and ignored")
        tokens, tops = found["tokens"][:-1], found["top_logprobs"]
        # Counted from the end, not by offset: servers count in bytes, in characters, or in spellings.
        places = [
            i for i in range(1, len(tokens)) if tokens[i][:1] == "?" and tokens[i - 1][-1:] == "\t"
        ]
        places = places[-len(query["at"]) :]
        if len(places) < len(query["at"]) or not all(tops[i] for i in places):
            raise Failed("no log-probabilities of the prompt's tokens")
        slots = [
            numbers(tops[i], lambda at=at: self._following(prompt[:at] + "1"))
            for i, at in zip(places, query["at"])
        ]
        return {"slots": slots, "tokens": self._used(reply)}

    def _following(self, prompt):
        """Alternatives for the token that follows a prompt."""
        return self._tops(self._complete({"prompt": prompt}, max_tokens=1, logprobs=TOP)[1])[0]

    def _complete(self, query, **parameters):
        """(reply, its one choice) of the endpoint for this kind of prompt."""
        body = {"model": self.model, "temperature": 0, **parameters}
        if "chat" in query:
            body["messages"] = [
                {"role": role, "content": content} for role, content in query["chat"]
            ]
            reply = self._post("/chat/completions", body)
        else:
            reply = self._post("/completions", body | {"prompt": query["prompt"]})
        return reply, reply["choices"][0]

    @staticmethod
    def _tops(choice):
        """[{token: log-probability}] by generated token, in the old form or the chat's: some mix them."""
        found = choice["logprobs"]
        if "content" in found:
            return [
                {t["token"]: t["logprob"] for t in place["top_logprobs"]}
                for place in found["content"]
            ]
        return [top or {} for top in found["top_logprobs"]]

    @staticmethod
    def _used(reply):
        usage = reply.get("usage") or {}
        return [int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))]

    def _post(self, path, body):
        """The JSON of a POST; waits and tries again where that may help, as long as Retry-After asks."""
        key = os.environ.get(self.key_env)
        headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {key}"} if key else {}
        )
        for attempt in range(self.tries):
            code, wait = None, 2**attempt
            request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
            try:
                with self.open(request, timeout=self.timeout) as reply:
                    return json.loads(reply.read())
            except urllib.error.HTTPError as e:
                code, wait, said = e.code, retry_after(e.headers, wait), ""
                with suppress(
                    OSError, HTTPException
                ):  # the connection may end before what it says does
                    said = e.read(300).decode("utf-8", "replace")
            except (OSError, HTTPException) as e:
                said = str(getattr(e, "reason", e)) or type(e).__name__
            said = " ".join((said.replace(key, "***") if key else said).split())
            if code and code not in AGAIN:
                break
            if wait > LONGEST:
                raise UserError(
                    f"{self.url} asks to wait {wait:.0f} s; run the same command again then, "
                    "what was answered is kept."
                )
            if attempt + 1 < self.tries:
                self.sleep(wait)
        if code in (400, 404, 405, 413, 415, 422) or code and code >= 500:
            raise Failed(f"status {code}: {said[:150]}")
        hint = (
            f"; is the key in {self.key_env} right?"
            if code in (401, 403)
            else "; is it the right --url?"
        )
        said = f"status {code}: {said[:150]}" if code else said[:150]
        raise UserError(f"{self.url} does not answer ({said}){hint}")


def retry_after(headers, default):
    """Seconds that a reply asks to wait, given as a number or as a date."""
    asked = headers.get("Retry-After", "")
    try:
        return (
            float(asked)
            if re.fullmatch(r"\d+(\.\d+)?", asked)
            else max(0.0, email.utils.parsedate_to_datetime(asked).timestamp() - time.time())
        )
    except (ValueError, TypeError):
        return default
