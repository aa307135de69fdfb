"""Write a checkpoint for other tools: `python -m crate_mini.export CKPT --to hf --out FOLDER`.

    safetensors   weights and settings, for any tool that reads tensors; every model
    hf            a folder for AutoModelForCausalLM: GPT-2's own names for the twin, else with the
                  model's code in it (trust_remote_code=True); with a tokenizer for AutoTokenizer
    nanogpt       ckpt.pt as nanoGPT and CRATE-LM write it; the paper's CRATE, and the twin
    saelens       a sparse autoencoder of `interpret.py sae`, for SAE.load_from_disk

Wherever a tool here takes a checkpoint, it takes a folder of the first two and ckpt.pt as well.
"""

import sys

from crate_mini.console import terminal

HERE = "crate_mini.export.command"


def main():
    words = sys.argv[1:] or ["--help"]
    return terminal.run_command("-m crate_mini.export", HERE, words, __doc__)


if __name__ == "__main__":
    terminal.run(main)
