"""Make the numbers of results/ again: `python -m crate_mini.studies NAME`.

    models      CRATE, crate+, the GPT-2 twin and every variant; gzip and trigrams
    theory      does each of them do what the theory says, layer by layer?
    deps        do docstrings of more packages make a better model in the same time?
    speed       tokens per second of train.py, next to a bare training loop
    front       loss against what neurons know: dense, top-k, autoencoders
    neurons     what do neurons know beyond the token, and how predictable are they?
    judges      a language model explains those neurons and simulates them
    concepts    do classifiers rely on the concepts found in them?
    codes       do the codes of a CLVQ-VAE leave the clusters that they start from?
    steering    dose and response of steering the models of `models`
    bench       kernels against eager and compiled PyTorch
    gpu         everything that needs a GPU: tests, kernels, training steps
    matrix      the README's two commands on every Python that this machine has
    tables      the README's tables, from results/ alone

Parts that have finished are kept: call a study again to go on where it stopped.
"""

import sys

from crate_mini.console import terminal

COMMANDS = {
    "models": "crate_mini.studies.models",
    "theory": "crate_mini.studies.theory",
    "deps": "crate_mini.studies.training:DEPS",
    "speed": "crate_mini.studies.training:SPEED",
    "front": "crate_mini.studies.front",
    "neurons": "crate_mini.studies.neurons",
    "judges": "crate_mini.studies.judges",
    "concepts": "crate_mini.studies.concepts",
    "codes": "crate_mini.studies.codes",
    "steering": "crate_mini.studies.steering",
    "bench": "crate_mini.studies.bench",
    "gpu": "crate_mini.studies.gpu",
    "matrix": "crate_mini.studies.matrix",
    "tables": "crate_mini.studies.tables",
}


def main():
    words = sys.argv[1:]
    if words[1:2] == ["table"]:  # `neurons table` is short for `neurons --table`
        words[1] = "--table"
    return terminal.dispatch("-m crate_mini.studies", __doc__, COMMANDS, words)


if __name__ == "__main__":
    terminal.run(main)
