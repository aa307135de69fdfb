"""How a neuron gets its scores: recorded in one pass, explained by tables, simulated, compared, summed up.

record: parts -> tally -> excerpts -> recorded; stages and neurons run it; metrics, summary and results count;
puzzles and selftest ask whether a score means anything. Doors: activations.py, explain.py, score.py above.
"""
