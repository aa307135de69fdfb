"""The course: `python -m crate_mini.course` lists its exercises.

start N      write the file of exercise N into the folder exercises/
check N      judge your file: passes, or one sentence about what is wrong
solution N   show ours
plan         a class of two hours, with homework
notebook     write the laboratory class, lab.ipynb
"""

import sys

from crate_mini.console import terminal

HERE = "crate_mini.course.command"
COMMANDS = {
    "start": f"{HERE}:START",
    "check": f"{HERE}:CHECK",
    "solution": f"{HERE}:SOLUTION",
    "plan": f"{HERE}:PLAN",
    "notebook": f"{HERE}:NOTEBOOK",
}


def main():
    if sys.argv[1:]:
        return terminal.dispatch("-m crate_mini.course", __doc__, COMMANDS)
    from crate_mini.course.command import overview

    return overview()


if __name__ == "__main__":
    terminal.run(main)
