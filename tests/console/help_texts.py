"""The help of every command, as JSON: {"command": text}.

python help_texts.py           as a script shows it, with as little as it loads
python help_texts.py loaded    after everything has been imported in earnest
"""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import interpret  # noqa: E402
import steer  # noqa: E402
from crate_mini.console import stand_ins  # noqa: E402
from crate_mini.course import __main__ as course  # noqa: E402
from crate_mini.studies import __main__ as studies  # noqa: E402

GROUPS = [  # of commands that one script starts in one way
    ["train.py"],
    ["train.py --task classify"],
    [f"interpret.py {name}" for name in interpret.COMMANDS],
    ["steer.py"],
    [f"steer.py {name}" for name in steer.COMMANDS],
    ["-m crate_mini.export"],
    ["-m crate_mini.compare"],
    [f"-m crate_mini.studies {name}" for name in studies.COMMANDS],
    [f"-m crate_mini.course {name}" for name in course.COMMANDS],
]


def help_text(command):
    """What `python COMMAND --help` prints."""
    words = [*command.split(), "--help"]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    return output.getvalue()


def forget_imports():
    """As if the process had just started; returns the packages that were loaded in earnest."""
    loaded = set()
    for name in list(sys.modules):
        package = name.partition(".")[0]
        if package in stand_ins.PACKAGES | {"crate_mini"}:
            module = sys.modules.pop(name)
            if type(module).__name__ != "StandIn":
                loaded.add(package)
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "Finder"]
    return loaded - {"crate_mini"}


def main():
    given = sys.argv[1:]
    if given == ["loaded"]:
        import torch  # noqa: F401  (then there are no stand-ins)
    texts = {}
    for group in GROUPS:
        for command in group:
            texts[command] = help_text(command)
        if given != ["loaded"]:
            assert not forget_imports(), f"{group[0]} --help loads them"
    print(json.dumps(texts))


if __name__ == "__main__":
    main()
