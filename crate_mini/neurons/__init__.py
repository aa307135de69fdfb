"""How a neuron gets its scores, in the order in which the files are best read.

    documents    held-out documents in two parts: fit, to make tables from, and score
    record       a model's activations on them (accumulate, record_files)
    excerpts     what each protocol explains on and scores on
    simulators   tables that predict activations (labels makes one; trie is a simulator too)
    effects      what raising a neuron does to the next token
    protocols    simulated against true activations (metrics), a row of scores for each neuron
    score        all of this for every neuron of a site (relatives, page_excerpts)
    redraw       intervals over other documents, and how site means move with them (spread)
    summary      means and counts, with intervals

command -> pipeline runs them as the stages of `interpret.py neurons` on a workspace; page, figures
and survey show the results (score_files). planted and selftest test whether a score means anything.
"""
