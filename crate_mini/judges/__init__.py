"""Language models as judges: they explain neurons, simulate them, and rate concepts.

command          `interpret.py llm`: neurons that `interpret.py neurons` has scored
pipeline         probe, explain, simulate, score
probe            can the model tell true from false explanations of planted neurons?
explanation      excerpts -> a few words
simulation       words and tokens -> activations: the three modes
language_model   one model: a client behind the answer cache
queries          what a client is asked and what it answers
http_client      a server that speaks OpenAI's protocol
hf_client        a model in this process, through transformers
answer_cache     each question is asked once: cache, budget, record, replay
prompt_files     reads prompts/
"""
