"""The laboratory class (lab_class.py) as a Jupyter notebook: plain JSON, no package needed."""

import json
import re
from pathlib import Path

SOURCE = Path(__file__).with_name("lab_class.py")
MARK = re.compile(r"^# %%(?P<markdown> \[markdown\])?\n", re.M)


def cells():
    """[(kind, text)] in order; kind is "markdown" or "code"."""
    text = SOURCE.read_text(encoding="utf-8")
    marks = list(MARK.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    found = []
    for mark, end in zip(marks, ends):
        body = text[mark.end() : end].strip()
        if mark["markdown"]:
            found.append(("markdown", re.sub(r"^# ?", "", body, flags=re.M)))
        else:
            found.append(("code", body))
    return found


def text():
    """The notebook file."""
    listed = []
    for number, (kind, body) in enumerate(cells()):
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        listed.append(cell | {"source": body.splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = {
        "cells": listed,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(notebook, indent=1) + "\n"
