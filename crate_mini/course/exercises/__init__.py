"""The exercises, in the order of the course. Each is one file; a new one starts as a copy.

A file holds, from top to bottom:

    docstring    what to write, shapes, a picture
    TITLE, STARS (1 to 3), MINUTES, TEACHES, HINTS
    solution     functions between the lines `# ---- solution` and `# ---- check`; a learner gets
                 them without their bodies, and the imports that they need
    mistakes     functions that err as learners do; the docstring is what the learner reads
    MISTAKES     {function of the solution: its mistakes}
    check        check(learner) raises Wrong, or returns a remark for the learner who passes

then its name goes into ORDER. An exercise in another language has a FILE next to it, which holds
the solution, and check_file(path) instead of check(learner).
"""

ORDER = (
    "rates",
    "gradient",
    "attention",
    "sparse_step",
    "looking_back",
    "counting",
    "cached_tokens",
    "hooked_neuron",
    "token_simulator",
    "controls",
    "autoencoder_loss",
    "proximal_maps",
    "faster_kernel",
    "fused_kernel",
)
