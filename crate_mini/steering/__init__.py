"""Steering: the effect of setting a neuron, and its side effects."""
