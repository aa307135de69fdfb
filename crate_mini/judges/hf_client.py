"""Client of a language model in this process, through transformers."""

import inspect
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from threading import Lock

import torch

from crate_mini import UserError
from crate_mini.data.formats import extra
from crate_mini.judges.queries import LEVELS, NoAnswer, level_logprobs, needs_the_next_token

LARGE = 10**9  # weights from which a model is kept in bfloat16
SAME = 0.5  # largest difference of log-probabilities that is rounding, in bfloat16
BEGINNINGS = 20  # most likely tokens among which the first one of an answer is chosen


def locate(name):
    """(folder, GGUF file in it or None) of a model; (name, None) for one on the hub.

    name: a folder, a .gguf file, an installed package that holds either, or a name on the hub,
    which transformers downloads once.
    """
    path = Path(name)
    if not path.exists() and name.isidentifier() and (spec := find_spec(name)):
        path = Path(next(iter(spec.submodule_search_locations or []), spec.origin))
    if path.is_file():
        return str(path.parent), path.name
    if not path.is_dir():
        return name, None
    files = sorted(path.glob("*.gguf"))
    if files and not (path / "config.json").exists():
        return str(path), files[0].name
    return str(path), None


class HfClient:
    """A causal language model on the GPU if there is one, else on the CPU; one query at a time.

    It keeps the keys and values of what a prompt shares with the previous one, so that few-shot
    examples run once. Raises UserError if transformers is missing or cannot load the model.
    """

    def __init__(self, name):
        transformers = extra("transformers", "hf")
        folder, gguf_file = locate(name)
        options = {}
        if gguf_file:
            extra("gguf", "hf")
            options = {"gguf_file": gguf_file}
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
        except Exception as error:  # a damaged file can raise anything
            raise UserError(
                f"hf:{name} cannot be loaded ({' '.join(str(error).split())[:200]}); give a "
                "folder, a .gguf file, a package that holds one, or a name on the hub."
            ) from None
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = smaller(model).to(device).eval()
        self.lock = Lock()
        self.new_cache = transformers.DynamicCache
        self.cache_name = cache_name(model.forward)
        self.level_ids = {level: self._ids_after_tab(level) for level in LEVELS}
        self.digit_ids = {}
        for digit in "0123456789":
            self.digit_ids[digit] = self.tokenizer.encode(digit, add_special_tokens=False)
        self.in_one_pass = None  # whether several continuations can be tried together
        self._forget()

    def _forget(self):
        """Start with an empty cache."""
        self.cached_ids, self.cache = [], self.new_cache()

    def _ids_after_tab(self, text):
        """Ids of a text where it stands in a prompt, after a tab."""
        tab = self.tokenizer.encode("a\t", add_special_tokens=False)
        return self.tokenizer.encode("a\t" + text, add_special_tokens=False)[len(tab) :]

    def ask(self, query):
        """The answer to a query (see queries.py). Raises NoAnswer if a prompt does not fit."""
        answers = {"can": self._can, "text": self._text, "next": self._next, "slots": self._slots}
        with self.lock, torch.inference_mode():
            try:
                return answers[query["ask"]](query)
            except BaseException:
                self._forget()
                raise

    # ---- the four questions ----

    def _can(self, query):
        can, why = ["prompt logprobs", "text logprobs", "text"], {}
        if self.tokenizer.chat_template:
            can += ["chat logprobs", "chat"]
        else:
            why = dict.fromkeys(("chat", "chat logprobs"), "the tokenizer has no chat template")
        return {"can": can, "why": why, "tokens": [0, 0]}

    def _text(self, query):
        ids, _ = self._encode(query)
        one_line = "chat" not in query
        ends = self.model.generation_config.eos_token_id
        if not isinstance(ends, list):
            ends = [ends]
        new_ids, text = [], ""
        while len(new_ids) < query["most"] and not (one_line and "\n" in text):
            token = self._likeliest(ids + new_ids, ends, first=not new_ids)
            if token is None or token in ends:
                break
            new_ids.append(token)
            text = self.tokenizer.decode(new_ids, skip_special_tokens=True)
        if one_line:
            text = text.split("\n")[0]
        if not text.strip():
            raise NoAnswer("an empty answer")
        return {"text": text, "tokens": [len(ids), len(new_ids)]}

    def _next(self, query):
        ids, _ = self._encode(query)
        levels = self._levels(ids, self._logits(ids, len(ids) - 1)[-1])
        return {"next": levels, "tokens": [len(ids), 1]}

    def _slots(self, query):
        ids, spans = self._encode(query)
        starts = {start: i for i, (start, end) in enumerate(spans) if end > start}
        if any(starts.get(slot, 0) == 0 for slot in query["at"]):
            raise NoAnswer("the tokenizer joins a slot with what stands before it")
        positions = [starts[slot] for slot in query["at"]]
        logits = self._logits(ids, positions[0] - 1)
        alternatives = {}
        for i in positions:
            alternatives[i] = single_tokens(self.level_ids, logits[i - positions[0]])
        tried = [i for i in positions if needs_the_next_token(alternatives[i])]
        digits = dict(zip(tried, self._digits_after_ones(ids, tried)))
        slots = []
        for i in positions:
            slots.append(level_logprobs(alternatives[i], partial(digits.get, i)))
        return {"slots": slots, "tokens": [len(ids), 0]}

    # ---- the model ----

    def _encode(self, query):
        """(ids, characters (start, end) of each) of a query's prompt."""
        if "chat" in query:
            messages = [{"role": role, "content": content} for role, content in query["chat"]]
            text = self._chat_text(messages)
            encoded = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        else:
            encoded = self.tokenizer(query["prompt"], return_offsets_mapping=True)
        ids = list(encoded["input_ids"])
        longest = getattr(self.model.config, "max_position_embeddings", 1 << 30)
        if len(ids) + query.get("most", 2) > longest:
            raise NoAnswer(f"a prompt of {len(ids)} tokens exceeds the model's {longest}")
        return ids, encoded["offset_mapping"]

    def _chat_text(self, messages):
        """Messages as the model's template writes them; many templates know no system message."""
        options = {"tokenize": False, "add_generation_prompt": True}
        try:
            return self.tokenizer.apply_chat_template(messages, **options)
        except Exception:  # whatever a template raises
            if messages[0]["role"] != "system":
                raise NoAnswer("the tokenizer's chat template does not take these roles") from None
        system, first, *rest = messages
        joined = {**first, "content": f"{system['content']}\n\n{first['content']}"}
        return self._chat_text([joined, *rest])

    def _logits(self, ids, first):
        """Logits (n - first, V) for what follows each of ids[first:n]."""
        limit = min(first, len(self.cached_ids))
        shared = 0
        while shared < limit and ids[shared] == self.cached_ids[shared]:
            shared += 1
        if len(self.cached_ids) > shared:
            self.cache.crop(shared - len(self.cached_ids))  # a negative number removes that many
        new_ids = torch.tensor([ids[shared:]], device=self.model.device)
        cache = {self.cache_name: self.cache}
        out = self.model(new_ids, **cache, use_cache=True).logits
        if out[0, -1].isnan().any():
            raise NoAnswer("the model computes NaN")
        self.cached_ids = list(ids)
        return out[0, first - shared :].float()

    def _levels(self, ids, logits):
        """{level: log-probability} of what follows ids, whose last logits are given."""
        alternatives = single_tokens(self.level_ids, logits)
        return level_logprobs(alternatives, lambda: self._digits_after_one(ids))

    def _digits_after_one(self, ids):
        """{digit: log-probability} of what follows ids and a "1"."""
        with_one = [*ids, self.level_ids["1"][0]]
        return single_tokens(self.digit_ids, self._logits(with_one, len(ids))[-1])

    def _digits_after_ones(self, ids, positions):
        """The same with a "1" in the place of each of these positions of ids.

        All in one pass, unless the model computes something else then.
        """
        if not positions:
            return []
        if self.in_one_pass is None:
            self.in_one_pass = self._one_pass_is_right(ids, positions)
        if self.in_one_pass:
            if self.cached_ids != ids:
                self._logits(ids, len(ids) - 1)
            return self._ones_in_one_pass(ids, positions)
        backwards = [self._digits_after_one(ids[:i]) for i in reversed(positions)]
        return backwards[::-1]  # so that what precedes a position was still cached

    def _one_pass_is_right(self, ids, positions):
        """Whether one pass over all positions computes the same as the last one by itself."""
        try:
            *_, last = self._ones_in_one_pass(ids, positions)
        except (RuntimeError, TypeError, ValueError, IndexError):  # no such masks
            self._forget()
            return False
        alone = self._digits_after_one(ids[: positions[-1]])
        return all(abs(last[digit] - alone[digit]) < SAME for digit in alone)

    def _ones_in_one_pass(self, ids, positions):
        """Appends a "1" for each position, which attends to what precedes it there and to itself.

        The cache holds ids, before and after.
        """
        n, m = len(ids), len(positions)
        device = self.model.device
        hidden = torch.full((m, n + m), torch.finfo(self.model.dtype).min, dtype=self.model.dtype)
        for row, i in enumerate(positions):
            hidden[row, :i] = 0
            hidden[row, n + row] = 0
        out = self.model(
            torch.full((1, m), self.level_ids["1"][0], device=device),
            attention_mask=hidden[None, None].to(device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=True,
            **{self.cache_name: self.cache},
        )
        self.cache.crop(-m)
        return [single_tokens(self.digit_ids, row.float()) for row in out.logits[0]]

    def _likeliest(self, ids, ends, first):
        """The most likely next token.

        The first of an answer is the most likely one that shows something, or None: small models
        like to begin with a line break, and an answer is one line.
        """
        ranked = self._logits(ids, len(ids) - 1)[-1].argsort(descending=True).tolist()
        if not first:
            return ranked[0]
        for token in ranked[:BEGINNINGS]:
            if token not in ends and self.tokenizer.decode([token]).strip():
                return token
        return None


def cache_name(forward):
    """What a forward pass calls the keys and values that it is given."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def smaller(model):
    """A large model in bfloat16, where this machine computes in it; half the memory and time."""
    weights = sum(weight.numel() for weight in model.parameters())
    able = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return model.to(torch.bfloat16) if weights > LARGE and able else model


def single_tokens(texts, logits):
    """{text: log-probability} of those texts {text: ids} that are one token."""
    logprobs = logits.log_softmax(-1)
    return {text: logprobs[ids[0]].item() for text, ids in texts.items() if len(ids) == 1}
