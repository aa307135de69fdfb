"""The exercises as text: their facts, the stub that a learner edits, the solution.

Read from the source without importing it, so that listing them costs no import of torch.
"""

import ast
import importlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from crate_mini import UserError
from crate_mini.console.results import ROOT
from crate_mini.course.exercises import ORDER

FOLDER = Path(__file__).with_name("exercises")
COMMAND = "python -m crate_mini.course"
SOLUTION, CHECK = "# ---- solution ", "# ---- check "
COURSE = "crate_mini.course"


@dataclass(frozen=True)
class Exercise:
    """One exercise; `source` is the text of its file, `facts` its constants by name."""

    number: int
    name: str
    source: str
    task: str
    facts: dict

    @property
    def title(self):
        return self.facts["TITLE"]

    @property
    def stars(self):
        return "*" * self.facts["STARS"]

    @property
    def file(self):
        """The name of the learner's file."""
        suffix = Path(self.facts.get("FILE", ".py")).suffix or ".py"
        return f"{self.number:02d}_{self.name}{suffix}"

    def module(self):
        """The imported module, which checks."""
        return importlib.import_module(f"{COURSE}.exercises.{self.name}")

    # ---- what a learner gets ---------------------------------------------------------------------

    def header(self):
        """Title, task and hints, the first lines of a learner's file."""
        hints = []
        for i, hint in enumerate(self.facts["HINTS"], 1):
            hints.append(_wrapped(f"    {i}. {hint}", 7))
        stars = self.facts["STARS"]
        level = (
            f"{stars} star{'s' if stars > 1 else ''} of 3, about {self.facts['MINUTES']} minutes"
        )
        return "\n".join(
            [
                f"Exercise {self.number}. {self.title} ({level})",
                "",
                self.task.strip(),
                "",
                "Hints:",
                *hints,
                "",
                f"Check it with: {COMMAND} check {self.number}",
            ]
        )

    def stub(self):
        """The file that a learner edits."""
        if "FILE" in self.facts:
            comment = [f"// {line}".rstrip() for line in self.header().splitlines()]
            return "\n".join(comment) + "\n\n" + self.module().stub()
        functions = _without_bodies(self._written())
        return f'"""{self.header()}\n"""\n\n{self._imports()}{functions}\n'

    def solution(self):
        """Ours, as a file that passes."""
        if "FILE" in self.facts:
            return (FOLDER / self.facts["FILE"]).read_text(encoding="utf-8")
        return f"{self._imports()}{self._written()}\n"

    def _written(self):
        """The source between the lines `# ---- solution` and `# ---- check`."""
        return self.source.split(SOLUTION, 1)[1].split(CHECK, 1)[0].split("\n", 1)[1].strip()

    def _imports(self):
        """Import lines that the solution needs, each on its own, and two empty lines."""
        used = {node.id for node in ast.walk(ast.parse(self._written())) if _is_name(node)}
        lines = []
        for node in ast.parse(self.source).body:
            if isinstance(node, ast.Import) and node.names[0].name.split(".")[0] in used:
                lines.append(ast.get_source_segment(self.source, node))
        return "\n".join([*lines, "", "", ""]) if lines else ""


def exercises():
    """All of them, in the order of the course."""
    return [_read(number, name) for number, name in enumerate(ORDER, 1)]


def find(number):
    """The exercise with a number. Raises UserError if there is none."""
    if not 1 <= number <= len(ORDER):
        raise UserError(
            f"exercise {number} does not exist; they are 1 to {len(ORDER)}, and `{COMMAND}` lists "
            "them."
        )
    return _read(number, ORDER[number - 1])


def _read(number, name):
    source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    facts = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            with suppress(ValueError):  # MISTAKES holds functions
                facts[node.targets[0].id] = ast.literal_eval(node.value)
    return Exercise(number, name, source, ast.get_docstring(tree), facts)


def in_checkout(*parts):
    """A path in the project's checkout. Raises UserError where only the package is installed."""
    path = ROOT.joinpath(*parts)
    if not path.exists():
        raise UserError(
            f"{'/'.join(parts)} is not part of the installed package; run the course from a "
            "checkout of crate_mini, after `pip install -e .`."
        )
    return path


def _is_name(node):
    return isinstance(node, ast.Name)


def _without_bodies(source):
    """The source with every function's body, but not its docstring, replaced."""
    lines = source.splitlines()
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.FunctionDef):
            start = node.body[0].end_lineno  # the docstring's last line
            lines[start : node.end_lineno] = ["    raise NotImplementedError"]
    return "\n".join(lines)


def _wrapped(text, indent, width=96):
    """A text on several lines, the later ones indented."""
    lines, line = [], ""
    for word in text.strip().split():
        if line and len(line) + len(word) + indent > width:
            lines.append(line)
            line = ""
        line = f"{line} {word}".strip()
    return "    " + f"\n{' ' * indent}".join([*lines, line])
