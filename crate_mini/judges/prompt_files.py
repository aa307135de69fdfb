"""Prompts are plain text files in prompts/, each with a version.

A file begins with comments, then come sections: "== ROLE" and the text of that role. {fields} in
the text are filled in.
"""

import json
import re
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).with_name("prompts")
GAPS = {"system": "\n\n", "user": "\n", "assistant": "\n\n"}  # after a role in a plain prompt


@cache
def load(name):
    """(version, [(heading, text), ...]) of prompts/NAME.txt."""
    text = FOLDER.joinpath(f"{name}.txt").read_text(encoding="utf-8")
    comments, *parts = re.split(r"^== ", text, flags=re.MULTILINE)
    sections = []
    for part in parts:
        heading, body = part.split("\n", 1)
        sections.append((heading, body.strip("\n")))
    return int(re.search(r"Version (\d+)", comments)[1]), sections


def fill(name, style, **values):
    """A prompt file with its fields filled in.

    Returns {"chat": [[role, content], ...]} for the style "chat", else {"prompt": str}. All fields
    of a section are filled in one pass, so nothing in a corpus can become a field or a role.
    """

    def value(match):
        return values.get(match[1], match[0])

    sections = [[role, re.sub(r"\{(\w+)\}", value, text)] for role, text in load(name)[1]]
    if style == "chat":
        return {"chat": [section for section in sections if section[1]]}
    *context, (_, last) = sections
    return {"prompt": "".join(text + GAPS[role] for role, text in context) + last}


def json_string(text):
    """Text as a JSON string: its line breaks and tabs are escaped, unlike those of the prompt."""
    return json.dumps(text, ensure_ascii=False)
