"""Language models as judges: they explain neurons, simulate them, and rate concepts.

command          `interpret.py llm`: neurons that `interpret.py neurons` has scored
pipeline         probe, explain, simulate, score: with true and with wrong explanations
probe            can the model tell true from false explanations of planted neurons?
price            what a run would ask; the cheapest mode
explanation      excerpts -> a few words
simulation       the modes: what is asked about a neuron, how an answer is read and scored
written          lists and verdicts in what a model wrote, whatever their notation
language_model   one model: a client behind the answer cache
queries          what a client is asked and what it answers
http_client      a server that speaks OpenAI's protocol
server_key       where its key may travel, and that nothing shows it
hf_client        a model in this process, through transformers
answer_cache     each question is asked once: cache, budget, record, replay
prompt_files     reads prompts/
"""
