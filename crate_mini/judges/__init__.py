"""Language models that explain and simulate: clients, what each can do (rungs), tapes to replay, prompts."""
