"""Two planted neurons, their excerpts, and a run of a language model over them."""

import json
from types import SimpleNamespace

import numpy as np

from crate_mini.judges import command, pipeline

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
COLOURS = ["red", "green", "blue", "yellow", "grey"]
WIDTH = 7  # tokens in an excerpt, the last ones may be padding


def decode(ids):
    return "".join(WORDS[i] for i in ids)


def colour(word):
    """The activation of neuron 0 on a word."""
    return 3.5 if word == "red" else 2.5 * (word in COLOURS)


def article(word):
    """The activation of neuron 1 on a word."""
    return 0.7 * (word == "the")


def excerpts(lines, activation, origin):
    """Excerpts of a planted neuron on some sentences."""
    tokens = np.full((len(lines), WIDTH + 1), -1, np.int32)
    acts = np.zeros((len(lines), WIDTH), np.float32)
    for i, line in enumerate(lines):
        words = line.split()[:WIDTH]
        tokens[i, 1 : len(words) + 1] = [WORDS.index(f" {word}") for word in words]
        acts[i, : len(words)] = [activation(word) for word in words]
    return SimpleNamespace(tokens=tokens, acts=acts, origin=origin, doc=np.arange(len(lines)))


def selected():
    """{neuron: {protocol: (excerpts to explain, excerpts to score)}} of the two neurons."""
    neurons = {}
    for neuron, activation in enumerate((colour, article)):
        firing = [line for line in SENTENCES if any(map(activation, line.split()))]
        top = firing[:5]
        rest = [line for line in SENTENCES if line not in top]
        to_explain = excerpts(top, activation, ["top"] * 5)
        to_score = excerpts(rest[:8], activation, ["top"] * 4 + ["random"] * 4)
        neurons[neuron] = {"openai_tar": (to_explain, to_score)}
    return neurons


def settings(**changes):
    values = {"simulator": "hf:m", "explainer": "template", "rung": "logprobs", **changes}
    return command.Settings(**values)


def run(folder, work=None, **changes):
    """(result, logged lines) of a run over the two neurons, or over other work."""
    work = selected() if work is None else work
    log = []
    result = pipeline.run(work, decode, settings(**changes), folder, log.append)
    return result, log


def text(result):
    return json.dumps(result, indent=1, sort_keys=True) + "\n"
