"""The playground: a model, its tokenizer and its neurons in one HTML file that runs anywhere."""
