"""Steer neurons and read what changes: `python steer.py CKPT --layer 2 --neuron 40 --prompt "1 2"`.

    CKPT            next tokens raised and lowered, both continuations; asks if there is no --prompt
    sweep CKPT      chosen neurons at a range of doses: next tokens and continuation at each
    demo CKPT       the paper's demonstration: random neurons, each steered alone, on four prompts
    measure CKPT    dose-response with controls: what steering changes, and its side effects

In CRATE a neuron is a coordinate of the model's own code, so steering inserts nothing.
`python steer.py --help` lists the settings of the first form, `python steer.py COMMAND --help`
those of a command.
"""

import sys

from crate_mini import UserError, cli
from crate_mini.console import terminal

PROMPT = "crate_mini.steering.prompt"  # the first form
COMMANDS = {
    "sweep": "crate_mini.steering.sweep",
    "demo": "crate_mini.steering.demo",
    "measure": "crate_mini.steering.measure",
}


def main():
    words = sys.argv[1:]
    if words and words[0] in COMMANDS:
        return terminal.dispatch("steer.py", __doc__, COMMANDS)
    if len(words) > 1 and not words[1].startswith("-"):
        suggestion = cli.nearest(words[0], COMMANDS)
        raise UserError(
            f"unknown command {words[0]!r}{suggestion}; choose {cli.one_of(COMMANDS)}, or give a "
            "checkpoint followed by flags."
        )
    return terminal.run_command("steer.py", PROMPT, words or ["--help"], __doc__)


if __name__ == "__main__":
    terminal.run(main)
