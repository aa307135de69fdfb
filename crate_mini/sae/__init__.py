"""Sparse autoencoders of a layer's codes, the baseline for CRATE's own neurons.

autoencoder.py defines one, splices it into a model, saves and loads it; train.py fits several on
the same codes; evaluate.py measures them on held-out text; figure.py draws the results.
"""
