"""A language model in this process, through transformers: the back end `hf` (queries: see clients.py)."""

from importlib.util import find_spec
from pathlib import Path
from threading import Lock

import torch

from crate_mini import UserError
from crate_mini.data.formats import extra
from crate_mini.judges.http_client import Failed, numbers

BEGINNINGS = 20  # most likely tokens among which an answer's first one is looked for


def find(name):
    """(folder, GGUF file in it or None) of a folder, a .gguf file or a package with one; or (hub name, None).

    Hub names are left to transformers, which downloads them once.
    """
    path = Path(name)
    if not path.exists() and name.isidentifier() and (spec := find_spec(name)):
        path = Path(next(iter(spec.submodule_search_locations or []), spec.origin))
    if path.is_file():
        return str(path.parent), path.name
    if not path.is_dir():
        return name, None
    weights = sorted(path.glob("*.gguf"))
    return str(path), weights[0].name if weights and not (path / "config.json").exists() else None


class Hf:
    """A causal language model of transformers on the CPU, or the GPU if there is one. One query at a time.

    The keys and values of what a prompt shares with the one before are kept: few-shot examples run once.
    Raises UserError when transformers is missing or finds no such model.
    """

    def __init__(self, name):
        transformers = extra("transformers", "hf")
        folder, weights = find(name)
        options = {}
        if weights:
            extra("gguf", "hf")
            options = {"gguf_file": weights}
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
        except (OSError, ValueError, KeyError, ImportError) as e:
            raise UserError(
                f"hf:{name} cannot be loaded ({' '.join(str(e).split())[:200]}); give a folder, "
                "a .gguf file, a package that holds one, or a name on the hub."
            ) from None
        self.model, self.lock = model.to(device).eval(), Lock()
        self.new_cache = transformers.DynamicCache
        self.pieces = {str(n): self._after_tab(str(n)) for n in range(11)}
        self._forget()

    def _forget(self):
        self.ids, self.cache = [], self.new_cache()

    def _after_tab(self, text):
        """Ids of a number where it stands in a prompt, after a tab."""
        tab = self.tokenizer.encode("a\t", add_special_tokens=False)
        return self.tokenizer.encode("a\t" + text, add_special_tokens=False)[len(tab) :]

    def ask(self, query):
        """The answer to a query (see clients.py). Raises Failed when a prompt does not fit."""
        with self.lock, torch.inference_mode():
            try:
                return getattr(self, "_" + query["ask"])(query)
            except BaseException:
                self._forget()
                raise

    def _can(self, query):
        can = ["prompt logprobs", "text logprobs", "text"]
        chat = ["chat logprobs", "chat"] if self.tokenizer.chat_template else []
        why = (
            {}
            if chat
            else dict.fromkeys(("chat", "chat logprobs"), "the tokenizer has no chat template")
        )
        return {"can": can + chat, "why": why, "tokens": [0, 0]}

    def _encode(self, query):
        """(ids, characters (start, end) of each) of a query's prompt."""
        if "chat" in query:
            messages = [{"role": role, "content": content} for role, content in query["chat"]]
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            found = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        else:
            found = self.tokenizer(query["prompt"], return_offsets_mapping=True)
        longest = getattr(self.model.config, "max_position_embeddings", 1 << 30)
        if len(found["input_ids"]) + query.get("most", 2) > longest:
            raise Failed(
                f"a prompt of {len(found['input_ids'])} tokens exceeds the model's {longest}"
            )
        return list(found["input_ids"]), found["offset_mapping"]

    def _logits(self, ids, first):
        """Logits (n - first, V) for what follows each of ids[first:n]."""
        shared, limit = 0, min(first, len(self.ids))
        while shared < limit and ids[shared] == self.ids[shared]:
            shared += 1
        if len(self.ids) > shared:
            self.cache.crop(shared - len(self.ids))  # a negative number: so many are removed
        fed = torch.tensor([ids[shared:]], device=self.model.device)
        out = self.model(fed, past_key_values=self.cache, use_cache=True).logits
        self.ids = list(ids)
        return out[0, first - shared :].float()

    def _numbers(self, ids, logits):
        """Log-probabilities of "0" .. "10" as what follows ids, whose last logits are given."""

        def among(pieces, logits):
            logp = logits.log_softmax(-1)
            return {text: logp[ids[0]].item() for text, ids in pieces.items() if len(ids) == 1}

        def after_one():
            digits = {d: self.tokenizer.encode(d, add_special_tokens=False) for d in "0123456789"}
            return among(digits, self._logits([*ids, self.pieces["1"][0]], len(ids))[-1])

        return numbers(among(self.pieces, logits), after_one)

    def _text(self, query):
        ids, _ = self._encode(query)
        new, text, ends = [], "", self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        while len(new) < query["most"] and ("chat" in query or "\n" not in text):
            best = self._logits(ids + new, len(ids + new) - 1)[-1].argsort(descending=True).tolist()
            token = best[0] if new else self._beginning(best[:BEGINNINGS], ends)
            if token is None or token in ends:
                break
            new.append(token)
            text = self.tokenizer.decode(new, skip_special_tokens=True)
        text = text if "chat" in query else text.split("\n")[0]
        if not text.strip():
            raise Failed("an empty answer")
        return {"text": text, "tokens": [len(ids), len(new)]}

    def _beginning(self, tokens, ends):
        """The first of some tokens that says something: small models like to begin with a line break, and
        an answer is one line. None if none does."""
        return next(
            (t for t in tokens if t not in ends and self.tokenizer.decode([t]).strip()), None
        )

    def _next(self, query):
        ids, _ = self._encode(query)
        return {
            "next": self._numbers(ids, self._logits(ids, len(ids) - 1)[-1]),
            "tokens": [len(ids), 1],
        }

    def _slots(self, query):
        ids, spans = self._encode(query)
        starts = {start: i for i, (start, end) in enumerate(spans) if end > start}
        if any(starts.get(at, 0) == 0 for at in query["at"]):
            raise Failed("the tokenizer joins a slot with what stands before it")
        places = [starts[at] for at in query["at"]]
        logits = self._logits(ids, places[0] - 1)
        # From the last slot to the first: what precedes a slot is still there when a "1" is tried in it.
        slots = [self._numbers(ids[:i], logits[i - places[0]]) for i in reversed(places)]
        return {"slots": slots[::-1], "tokens": [len(ids), 0]}
