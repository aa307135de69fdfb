"""Text as batches of tokens: sources, formats, tokenizers, token files, batches."""
