"""The embedded corpus: English that every Python installation carries, about 2.1 MB. Nothing to download.

One document per language-reference topic (pydoc_data), then one per standard-library module: its dotted name
and its docstrings in source order. Sources are parsed, never imported. Topics quote each other and subclasses
repeat docstrings, so a paragraph of 40 characters or more that came before is dropped: validation text must
not have been trained on. "pydocs+deps" goes on through the installed numpy, torch and matplotlib.
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


def describe(source: str) -> dict:
    """Name, Python version, versions of the packages read: what decides the text, nearly.

    Distributions may leave modules out, so the text's sha256 is told when its token files are made.
    """
    versions = {package: metadata.version(package) for package in NAMES[source]}
    return {"name": source, "python": platform.python_version(), **versions}


def documents(source: str) -> Iterator[str]:
    """Stream the corpus `source`, a key of NAMES. Raises UserError if this Python has no documentation."""
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
    yield from (_unseen(topics[name], seen) for name in sorted(topics))
    packages = [Path(util.find_spec(name).submodule_search_locations[0]) for name in NAMES[source]]
    for root in [stdlib, *packages]:
        for path in sorted(root.rglob("*.py")):
            parts = (
                path.relative_to(stdlib if root is stdlib else root.parent).with_suffix("").parts
            )
            if SKIPPED.isdisjoint(parts) and (text := _unseen("\n\n".join(docstrings(path)), seen)):
                yield ".".join(parts).removesuffix(".__init__") + "\n\n" + text


def _unseen(text: str, seen: set) -> str:
    """`text` without the paragraphs that are in `seen` already; adds the others to it.

    Short paragraphs ("Returns:", ">>> import os") may recur: they give nothing away, and text reads on.
    """
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        key = " ".join(paragraph.split())
        if len(key) < 40 or key not in seen:
            kept.append(paragraph)
        seen.add(key)
    return "\n\n".join(kept).strip("\n")


def docstrings(path: Path) -> list[str]:
    """All docstrings of a source file in its order, and what add_docstr(...) or the like give C functions."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources
            nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (SyntaxError, ValueError, OSError):
        return []  # templates and Python 2 leftovers
    found = []
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.append(ast.get_docstring(node) or "")
        elif isinstance(node, ast.Call) and re.match(
            r"add_\w*doc", ast.unparse(node.func).split(".")[-1]
        ):
            parts = [
                part
                for arg in node.args
                for part in ast.walk(arg)
                if isinstance(part, ast.Constant)
            ]
            texts = [part.value for part in parts if isinstance(part.value, str)]
            found += [inspect.cleandoc(text) for text in texts if len(text) >= 40]
    return [text for text in found if text]
