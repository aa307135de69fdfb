"""Models and autoencoders in the files of other tools: `python -m crate_mini.export CKPT`."""
