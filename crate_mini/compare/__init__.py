"""Training runs next to each other: `python -m crate_mini.compare out/a out/b`."""
