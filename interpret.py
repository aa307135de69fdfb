"""Look inside a checkpoint: `python interpret.py COMMAND CKPT`.

    layers     coding rate, sparsity, lasso objective of each layer: does the theory hold?
    neurons    what makes each neuron fire, and how predictable is it? scores, controls, pages
    text       which neurons fire on a text of yours? a table and a page with coloured tokens
    sae        sparse autoencoders on one layer's codes, the baseline: how sparse, at what loss?
    selftest   planted neurons: which simulators and metrics can be trusted? (takes no CKPT)
    llm        a language model explains neurons and simulates them from its explanations
    concepts   discrete concepts across layers of a classifier (CLVQ-VAE): does it rely on them?
    playground the model in one page: type, see neurons fire, steer (takes one or two CKPT)
    report     pages and figures from the results of `neurons`; evaluates survey answers

Results go to the folder `interpret` next to the checkpoint.
"""

from crate_mini.console import terminal

COMMANDS = {
    "layers": "crate_mini.layers.command",
    "neurons": "crate_mini.neurons.command",
    "text": "crate_mini.neurons.text",
    "sae": "crate_mini.sae.command",
    "selftest": "crate_mini.neurons.selftest",
    "llm": "crate_mini.judges.command",
    "concepts": "crate_mini.concepts.command",
    "playground": "crate_mini.playground.command",
    "report": "crate_mini.neurons.report",
}


def main():
    return terminal.dispatch("interpret.py", __doc__, COMMANDS)


if __name__ == "__main__":
    terminal.run(main)
