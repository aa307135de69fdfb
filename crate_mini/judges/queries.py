"""Queries to a language model and their answers: JSON objects, the same for every client.

    {"ask": "can"}                        -> {"can": [capability], "why": {capability: why not}}
    {"ask": "text", "most": n, ...}       -> {"text": str}
    {"ask": "next", ...}                  -> {"next": {level: log-probability}}
    {"ask": "slots", "prompt", "at": []}  -> {"slots": [{level: log-probability}, ...]}

The dots stand for "prompt": str or "chat": [[role, content], ...], and every answer also holds
"tokens": [in, out]. Levels are "0" to "10". `text` is greedy, of at most n tokens; after a prompt
it ends with the line. `next` is about the next token. A slot is a character of the prompt, "?"
after a tab: which levels could have stood there?

Capabilities: "text" and "chat" (an answer to a prompt, to messages), "text logprobs" and "chat
logprobs" (of the next token), "prompt logprobs" (of slots).
"""

import math

from crate_mini.neurons.metrics import LEVELS

SURE = 0.01  # the probability of "1" from which "10" is looked for behind it
LOWEST = -99  # a log-probability for "practically never"
ROUNDING = 1e-3  # above 0, where a log-probability is rounding


class NoAnswer(Exception):
    """One query has no usable answer: its value is missing and counted, the run continues."""


def level_logprobs(alternatives, after_one):
    """{level: log-probability} from alternatives {token: log-probability}.

    Tokens that are not a level are left out. Many vocabularies write 10 as two tokens. "1" then
    stands for both, and `after_one()`, the alternatives for the token after a "1", divides it.
    Raises NoAnswer for a log-probability that cannot be one.
    """
    levels = {}
    for token, value in checked(alternatives).items():
        level = token.strip()  # " 7" is a 7 too
        if level in LEVELS:
            before = math.exp(levels.get(level, -999))
            levels[level] = math.log(math.exp(max(value, LOWEST)) + before)
    if needs_the_next_token(levels):
        digits = {
            token: math.exp(value)
            for token, value in checked(after_one()).items()
            if token[:1].isdigit()
        }
        one = 1 - sum(digits.values())
        ten = digits.get("0", 0)
        whole = levels["1"]
        levels["1"] = whole + math.log(max(one, 1e-9))
        levels["10"] = whole + math.log(max(ten, 1e-9))
    return {level: round(value, 4) for level, value in levels.items()}


def needs_the_next_token(levels):
    """Does a "1" among {level: log-probability} stand for 10, too, and matter?"""
    return "10" not in levels and math.exp(levels.get("1", LOWEST)) >= SURE


def checked(alternatives):
    """Alternatives {token: log-probability}; LOWEST for minus infinity. Raises NoAnswer."""
    values = {}
    for token, value in alternatives.items():
        if not value <= ROUNDING:  # NaN compares false
            raise NoAnswer("a log-probability that is above 0 or not a number")
        values[token] = min(max(value, LOWEST), 0)
    return values
