"""The embedded corpus: English that every Python installation carries, about 2.1 MB.

One document for each language-reference topic (pydoc_data), then one for each standard-library
module: its dotted name and its docstrings in source order. Sources are parsed, never imported.
Topics quote each other and subclasses repeat docstrings, so a paragraph of 40 characters or more is
kept only at its first occurrence: validation text must not have been trained on. "pydocs+deps" adds
the installed numpy, torch and matplotlib. The text depends on the reader's Python.
"""

import ast
import inspect
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path

from crate_mini import UserError

NAMES = {"pydocs": (), "pydocs+deps": ("numpy", "torch", "matplotlib")}
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "testing", "idle_test", "_vendor"}
LONG = 40  # characters; shorter paragraphs ("Returns:", ">>> import os") may recur
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def describe(source: str) -> dict:
    """Name, Python version, versions of the packages read; they nearly determine the text.

    Distributions may leave modules out; the text's sha256 is printed when its token files are made.
    """
    versions = {package: metadata.version(package) for package in NAMES[source]}
    return {"name": source, "python": platform.python_version(), **versions}


def documents(source: str) -> Iterator[str]:
    """Stream the corpus `source`, a key of NAMES.

    Raises UserError if this Python was installed without its documentation.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}
    if not topics or not (stdlib / "ast.py").exists():
        raise UserError(
            f"This Python ({stdlib}) was installed without its documentation: give a text file "
            "instead of pydocs."
        )
    seen = set()
    for name in sorted(topics):
        yield _unseen(topics[name], seen)
    yield from _modules(stdlib, stdlib, seen)
    for package in NAMES[source]:
        root = Path(util.find_spec(package).submodule_search_locations[0])
        yield from _modules(root, root.parent, seen)


def _modules(folder: Path, base: Path, seen: set) -> Iterator[str]:
    """A document for each module in `folder` with docstrings, named by its path from `base`."""
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(base).with_suffix("").parts
        if not SKIPPED.isdisjoint(parts):
            continue
        text = _unseen("\n\n".join(docstrings(path)), seen)
        if text:
            yield ".".join(parts).removesuffix(".__init__") + "\n\n" + text


def _unseen(text: str, seen: set) -> str:
    """`text` without long paragraphs that are already in `seen`; adds the others to it."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        key = " ".join(paragraph.split())
        if len(key) < LONG or key not in seen:
            kept.append(paragraph)
        seen.add(key)
    return "\n\n".join(kept).strip("\n")


def docstrings(path: Path) -> list[str]:
    """All docstrings of a source file in order, also those of C functions from add_docstr(...).

    [] for a file that cannot be parsed, such as a template or Python 2.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return []
    nodes = [node for node in ast.walk(tree) if isinstance(node, (*DOCUMENTED, ast.Call))]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    texts = []
    for node in nodes:
        if isinstance(node, DOCUMENTED):
            texts.append(ast.get_docstring(node))
        elif re.match(r"add_\w*doc", _called(node)):
            texts += _long_strings(node)
    return [text for text in texts if text]


def _called(call: ast.Call) -> str:
    """The name of the function that is called, without its module."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


def _long_strings(call: ast.Call) -> list[str]:
    """The strings of at least LONG characters among the arguments of a call."""
    texts = []
    for argument in call.args:
        for part in ast.walk(argument):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                texts.append(part.value)
    return [inspect.cleandoc(text) for text in texts if len(text) >= LONG]
