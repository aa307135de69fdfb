"""Concepts across layers: word vectors of two layers, what discovers codes among them, how codes are judged.

vectors.py holds what the steps hand over; clusters.py, methods.py discover; health.py judges codebooks.
"""
