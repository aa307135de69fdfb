"""From text to token files, for data.py: formats -> corpora -> prepare; tokenizer and its default ranks."""
