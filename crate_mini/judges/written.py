"""What a language model wrote, as values: models add fences, preambles and spellings of their own.

Nothing here guesses what a model meant: a value is read if only its notation is unusual, and the
caller checks it. Everything is bounded, since a server may send anything.
"""

import json
import re

from crate_mini.judges.queries import NoAnswer

LONGEST = 200_000  # characters of an answer
DEEPEST = 6  # brackets inside one another
BEGINNINGS = 20  # brackets at which a value may begin
QUOTED = r"""\"(?:[^"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'"""
WORD = r"""[^\s\[\](){},:"']+"""
LEXEME = re.compile(rf"({QUOTED})|([\[({{])|([\])}}])|([,:])|(['\"])|{WORD}", re.DOTALL)
ROUND = {"(": "[", ")": "]"}  # Python's tuples are lists
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
CONSTANTS = {"none": "null", "true": "true", "false": "false", "null": "null"}


def answer_part(text):
    """The text after a model's reasoning. Raises NoAnswer for one that is too long to be read."""
    if len(text) > LONGEST:
        raise NoAnswer(f"an answer of {len(text):,} characters")
    return text.rpartition("</think>")[2]


def lists(text):
    """The lists and objects in a text, in order: JSON, or Python's notation, or a mixture.

    Read are single quotes, tuples, trailing commas, True and None, line breaks in strings and
    numbers in words. At most BEGINNINGS brackets are tried.
    """
    text = answer_part(text)
    start = 0
    for _ in range(BEGINNINGS):
        bracket = re.compile(r"[\[{]").search(text, start)
        if not bracket:
            return
        try:
            notation, start = as_json(text, bracket.start())
            yield json.loads(notation, strict=False)
        except ValueError:
            start = max(start, bracket.start() + 1)


def as_json(text, start):
    """(JSON of the value whose bracket is at `start`, the position after it).

    Raises ValueError if its brackets do not close, or are too deep.
    """
    parts, depth = [], 0
    for match in LEXEME.finditer(text, start):
        quoted, opening, closing, mark, quote = match.groups()
        if quote:  # never closed
            break
        if quoted:
            parts.append(double_quoted(quoted))
        elif opening:
            depth += 1
            parts.append(ROUND.get(opening, opening))
        elif closing:
            depth -= 1
            if parts[-1] == ",":
                parts.pop()
            parts.append(ROUND.get(closing, closing))
        else:
            parts.append(mark or plain_word(match[0]))
        if depth == 0:
            return "".join(parts), match.end()
        if depth > DEEPEST:
            break
    raise ValueError("no value")


def double_quoted(string):
    """A string in single or double quotes, with the escapes of JSON."""

    def escape(match):
        return {"\\'": "'", '"': '\\"'}.get(match[0], match[0])

    inside = re.sub(r'\\.|"', escape, string[1:-1], flags=re.DOTALL)
    return f'"{inside}"'


def plain_word(word):
    """A number or constant in the spelling of JSON; any other word as it is."""
    lower = word.lower()
    if lower in NUMBERS:
        return str(NUMBERS.index(lower))
    return CONSTANTS.get(lower, word)


def whole_number(value):
    """A value as an int: 7, 7.0, "7" and "seven" are 7; None for anything else."""
    if isinstance(value, str):
        word = plain_word(value.strip())
        return int(word) if re.fullmatch(r"[0-9]{1,4}", word) else None
    if type(value) is int:
        return value
    if type(value) is float and value.is_integer():
        return int(value)
    return None


def choice(text, choices):
    """The value of the one choice {word: value} with which a short answer begins or ends.

    Raises NoAnswer if there is none, or two that differ.
    """
    words = re.findall(r"-?[^\W_]+(?:\.[0-9]+)?", answer_part(text).lower())
    edges = {choices[word] for word in words[:1] + words[-1:] if word in choices}
    if len(edges) != 1:
        known = ", ".join(dict.fromkeys(map(str, choices.values())))
        raise NoAnswer(f"not one of {known}")
    return edges.pop()
